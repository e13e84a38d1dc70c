"""The stages of a command of `make gpu-learn`.

1. Tokenize the text.
2. Train: ELECTRA for the steps that fit into its seconds, or the masked model with the same number of FLOPs.
3. Probe the checkpoint of each tenth.
4. Pack the encoder and the log.
5. Fine-tune the trained encoders and new weights, until the budget ends.

Each result is written at once. Only the first two stages must succeed. If a result of the others is missing,
`left_out` has the reason.
"""

import dataclasses
import functools
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.learning import equal_compute, parts, transfer
from benchmarks.learning.equal_compute import HALVES, Comparison
from benchmarks.learning.on_gpu import RESULT, TEXTS, VOCABULARY, WORDS, Folders, Size
from benchmarks.learning.runs import pooled_until, save
from electra_fast.train.recipe import Recipe, TokenizeRecipe
from electra_fast.train.tokens import tokenize

RESERVE = 10.0  # seconds at the end, to stop the processes
PROBING = 40.0  # seconds that the probes need at most
LINES = 100  # of the log of a run


class Session:
    """The result so far, and the time that is left: `end` of `time.monotonic`."""

    def __init__(self, folders: Folders, end: float, before: dict[str, Any]):
        self.folders, self.end = folders, end
        self.found: dict[str, Any] = {"models": {}, "tasks": [], "seconds": {}, "left_out": {}} | before

    def write(self) -> None:
        for folder in (self.folders.runs, self.folders.out):
            folder.mkdir(parents=True, exist_ok=True)
            save(folder / RESULT, self.found)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measure a stage, and write the result at its end."""
        began = time.monotonic()
        print(f"{name}: {self.end - began:.0f} s are left", flush=True)
        try:
            yield
        finally:
            self.found["seconds"][name] = round(time.monotonic() - began, 1)
            self.write()

    def optional(self, name: str, needs: float, stage: Callable[[], None]) -> None:
        """Run a stage if `needs` seconds are left; without its result, the next stages continue."""
        left = self.end - time.monotonic()
        try:
            if left < needs:
                raise TimeoutError(f"it needs {needs:.0f} s, and {left:.0f} s were left")
            with self.timed(name):
                stage()
                self.found["left_out"].pop(name, None)
        except Exception as error:
            traceback.print_exc()
            self.found["left_out"][name] = str(error) or repr(error)
            self.write()


def command(folders: Folders, size: Size, device: str, end: float, before: dict[str, Any]) -> None:
    """Run all stages of a command: the first one, or with the result of the first one the second.

    Raises:
        ValueError, OSError: the text cannot be tokenized, or the model cannot be trained.
    """
    model = "masked" if before else "fused"
    if model == "fused":
        shutil.rmtree(folders.runs, ignore_errors=True)
    session = Session(folders, end, before)
    found, text = session.found, folders.runs / "text"
    with session.timed(f"tokenizing for {model}"):
        data = tuple(str(folders.data / name) for name in TEXTS)
        print(tokenize(TokenizeRecipe(data=data, vocab=str(folders.data / VOCABULARY)), str(text), None))
        found["words"] = json.loads((folders.data / WORDS).read_text())
    recipe = Recipe(preset=size.preset, data=(str(text),), precision="bf16")
    comparison = Comparison(folders.runs, recipe, folders.data, device, size.seeds, size.share)
    if model == "fused":
        with session.timed("the speed of both models"):
            steps = equal_compute.steps_in(comparison, size.seconds, size.tried)
        found["steps"] = max(1, round(steps / LINES)) * LINES
    recipe = dataclasses.replace(recipe, steps=found["steps"], log_every=found["steps"] // LINES)
    comparison = comparison._replace(recipe=recipe)
    with session.timed(f"training {model}"):
        equal_compute.pretrain(comparison, model)
        to_bfloat16(folders.runs / model / HALVES[model] / "model.safetensors")
        found |= facts(comparison, before)
        found["models"][model] = equal_compute.trained(comparison, model)

    def probe() -> None:
        found["models"][model]["probes"] = equal_compute.probe(comparison, model)

    def pack() -> None:
        files = (HALVES[model], "recipe.json", "log.jsonl", "probes.json")
        names = [f"{model}/{name}" for name in files if (folders.runs / model / name).exists()]
        parts.write(folders.runs, names, folders.out / f"{model}.tar.xz")

    session.optional(f"probes of {model}", PROBING, probe)
    session.optional(f"files of {model}", 0.0, pack)
    session.optional(f"fine-tuning after {model}", 0.0, lambda: fine_tune(session, comparison))
    for name, seconds in found["seconds"].items():
        print(f"{seconds:7.1f} s  {name}")
    for name, why in found["left_out"].items():
        print(f"left out: {name}: {why}")
    print(folders.out / RESULT, flush=True)


def facts(comparison: Comparison, before: dict[str, Any]) -> dict[str, Any]:
    """Return the options, and the machine or, if the first command ran on another one, both."""
    found = equal_compute.facts(comparison)
    machines = dict.fromkeys([*before.get("machine", found["machine"]).split(" and "), found["machine"]])
    return found | {"machine": " and ".join(machines)}


def to_bfloat16(file: Path) -> None:
    """Round the weights of a file, so that both commands fine-tune the weights that come back."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def fine_tune(session: Session, comparison: Comparison) -> None:
    """Fine-tune in several processes, seed by seed; runs with a result are not repeated."""
    tasks, left_out = session.found["tasks"], session.found["left_out"]
    done = {name_of(each["task"], each["start"], each["seed"]) for each in tasks}
    runs = {name_of(run.task, run.start, run.seed): run for run in equal_compute.tuning(comparison)}
    waiting = {name: run for name, run in runs.items() if name not in done}
    left_out |= dict.fromkeys(waiting, "no time was left")
    session.write()
    train = functools.partial(tried, device=comparison.device)
    for name, result in pooled_until(session.end - RESERVE, train, waiting.items()):
        if isinstance(result, str):
            left_out[name] = result
        else:
            del left_out[name]
            tasks.append(result)
        session.write()


def name_of(task: str, start: str, seed: int) -> str:
    return f"fine-tuning {task} from {start}, seed {seed}"


def tried(named: tuple[str, transfer.Run], device: str) -> tuple[str, dict[str, Any] | str]:
    """Return the name of a run with its result, or with its error."""
    name, run = named
    try:
        return name, transfer.train(run, device)
    except Exception as error:
        return name, str(error) or repr(error)
