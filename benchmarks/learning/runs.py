"""The training runs of the learning experiments: their FLOPs, training, and reading the logs."""

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.learning.objectives import MODELS
from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.ops import TORCH
from electra_fast.train.pretrain import Pretraining
from electra_fast.train.recipe import Recipe
from electra_fast.train.run_folder import find_recipe

ROOT = Path("runs/learning")
WORKERS = max(2, min(12, (os.cpu_count() or 2) - 2))


class Run(NamedTuple):
    folder: Path
    model: str  # a name in `MODELS`
    recipe: Recipe


def flops(make_model: Callable, config: ElectraConfig, seq: int) -> int:
    """Return the FLOPs of the products of a training step, per sequence, in plain PyTorch."""
    ids = torch.randint(200, config.vocab_size, (8, seq))
    # The counter does not support the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make_model(config, TORCH)(ids, key_mask=torch.ones_like(ids, dtype=torch.bool)).loss.backward()
    return counter.get_total_flops() // len(ids)


def train(run: Run, device: str = "cpu") -> None:
    """Train, or continue an interrupted run; a complete one is not trained again."""
    require_same(run)
    if device == "cpu":
        torch.set_num_threads(1)
    make_model, ops = MODELS[run.model]
    Pretraining(run.recipe, run.folder, ops=ops, make_model=make_model, device=device).run()


def require_same(run: Run) -> None:
    """Check that the run in the folder, if there is one, was started with the same options.

    `Pretraining` would continue it with another rate or number of steps, and keep its fields of `set`: the
    result would be that of another experiment.

    Raises:
        ValueError: an option differs.
    """
    if (file := find_recipe(run.folder)) is None:
        return
    wanted, found = (dataclasses.asdict(each.resolved()) for each in (run.recipe, Recipe.load(file)))
    for name, value in wanted.items():
        if value != found[name]:
            rule = f"be {found[name]!r}, as in {run.folder}"
            raise ValueError(must(f"learning: {name}", rule, repr(value), "or remove that folder"))


def save(file: Path, found: dict[str, Any]) -> None:
    """Write a result as JSON; a kill or a full disk leaves the old file or the new one."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(file)


def pooled(function: Callable, *arguments: Iterable) -> list[Any]:
    """Return the results of all calls; up to WORKERS run at a time, each in a process of its own."""
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(function, *arguments))


def pooled_until(end: float, function: Callable, items: Iterable) -> Iterator[Any]:
    """Yield the results of the items in the order in which they arrive; stop at `end` of `time.monotonic`.

    Calls that have not ended at `end` are killed, with all other child processes.
    """
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        calls = [pool.submit(function, item) for item in items]
        try:
            for call in as_completed(calls, max(0.0, end - time.monotonic())):
                yield call.result()
        except TimeoutError:
            print("the time is over", flush=True)
        finally:
            if not all(call.done() for call in calls):
                for process in multiprocessing.active_children():  # the pool then gives up its other calls
                    process.kill()


KEPT = ("step", "mlm_loss", "mlm_accuracy", "rtd_loss", "replaced", "auc", "auc_low", "auc_high", "logit_std")


def collect(folder: Path) -> dict[str, Any]:
    """Return the results of a run from its log; the last line counts if a step was taken twice."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    begin, trained, evaluated = (
        {line["step"]: line for line in lines if line["kind"] == kind}
        for kind in ("begin", "train", "held_out")
    )
    curve = []
    for step, line in evaluated.items():
        tokens = sum(each["tokens"] for last, each in trained.items() if last <= step)
        curve.append({"tokens": tokens} | {name: line[name] for name in KEPT})
    names = ("parameters", "vocabulary", "train_tokens", "loss_without_context")
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in trained.values())
    return {name: begin[0][name] for name in names} | {"seconds": seconds, "curve": curve}
