"""ELECTRA and a masked language model at equal FLOPs, in two commands of eight minutes on a GPU.

    make gpu-learn-pack DATA=folder   # before that, without a GPU: build/gpu-learn/data
    make gpu-learn PY=python3         # train ELECTRA
    make gpu-learn PY=python3 MORE=1  # train the masked model, on the same machine or another one
    make gpu-learn-rehearse           # both commands on a CPU, with pretended data

`equal_compute.py` describes the experiment and `gpu_stages.py` the stages of a command. Each command writes
its files to $OUT, or to build/gpu-learn. If $OUT is another folder and the second command runs on another
machine, copy the files of the first one to build/gpu-learn. Checkpoints stay in runs/gpu-learn.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import STARTED
from benchmarks.gpu.command import prepare
from benchmarks.harness import machine
from benchmarks.learning import parts
from electra_fast.errors import must
from electra_fast.local import json_object

RESULT = "equal_compute.json"
BUDGET = 480.0  # seconds of a command
START = 60.0  # of them, before the training of the masked model
TEXTS = ("wiki/train.txt.xz", "wiki/extra.txt.xz")
VOCABULARY, WORDS = "vocabulary", "words.json"  # made by `pack`


class Size(NamedTuple):
    preset: str
    pieces: int  # of the vocabulary
    seconds: float  # of training ELECTRA
    tried: int  # number of steps that measure the speed of a model
    seeds: int  # of fine-tuning
    share: float  # of the epochs of fine-tuning


FULL = Size("small", 8192, seconds=240.0, tried=2000, seeds=3, share=1.0)


class Folders(NamedTuple):
    packed: Path  # data/, and the files of the first command
    runs: Path  # the folders of the runs, which stay on the machine
    out: Path  # the files that come back

    @property
    def data(self) -> Path:
        return self.packed / "data"


def pack(source: Path, folders: Folders, size: Size = FULL) -> None:
    """Copy the files that are used, and make what needs no GPU: the vocabulary and bags of words.

    Raises:
        ValueError: files are missing, or `source` is where they are copied to.
    """
    from benchmarks.learning.equal_compute import words
    from benchmarks.learning.transfer import NEEDED, require_files
    from electra_fast import data

    patterns = {*TEXTS, *NEEDED}
    require_files("gpu-learn-pack: DATA", source, patterns)
    if source.resolve().is_relative_to(folders.data.resolve()):
        rule = "be another folder, because this one is removed and made again"
        raise ValueError(must("gpu-learn-pack: DATA", rule, source))
    shutil.rmtree(folders.data, ignore_errors=True)
    for file in {file for pattern in patterns for file in source.glob(pattern)}:
        target = folders.data / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    tokenizer = data.train_tokenizer(data.documents([folders.data / text for text in TEXTS]), size.pieces)
    data.save_tokenizer(tokenizer, folders.data / VOCABULARY)
    (folders.data / WORDS).write_text(json.dumps(words(folders.data / VOCABULARY, folders.data)))
    bytes_ = sum(file.stat().st_size for file in folders.data.rglob("*") if file.is_file())
    print(f"{folders.data}: {bytes_ / 2**20:.1f} MB")


def first_result(folders: Folders) -> dict[str, Any]:
    """Return the result of the first command; unpack ELECTRA if this is another machine.

    Raises:
        ValueError, OSError: the files of the first command are missing or damaged.
    """
    for file in (folders.runs / RESULT, folders.packed / RESULT):
        found = json_object("gpu-learn", file) if file.exists() else {}
        if "fused" in found.get("models", {}):
            if file.parent == folders.packed:
                parts.read(folders.packed / "fused.tar.xz", folders.runs)
            return found
    remedy = f"run it first, or copy its files to {folders.packed}"
    raise ValueError(must("gpu-learn MORE=1: the first command", "have trained ELECTRA", "no result", remedy))


def required(folders: Folders, more: bool, budget: float) -> dict[str, Any]:
    """Return the result of the first command for the second one; {} for the first.

    It imports no op, because `prepare` has not yet built their extension.

    Raises:
        ValueError, OSError: a command cannot be run: there is no GPU, no data, no result or not enough time.
    """
    if machine.device() != "cuda":
        raise ValueError(
            must("gpu-learn: torch", "see a GPU", "none", "`make gpu-learn-rehearse` needs none")
        )
    if not (folders.data / WORDS).exists():  # `pack` writes it last
        raise ValueError(must("gpu-learn", f"find {folders.data}", "none", "make gpu-learn-pack DATA=folder"))
    if not more:
        return {}
    before = first_result(folders)
    if budget < (needed := before["seconds"]["training fused"] + START):
        rule = f"be {needed:.0f} or more, because the training of ELECTRA was that long"
        raise ValueError(must("gpu-learn: BUDGET", rule, budget))
    return before


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="default: 480")
    p.add_argument("--more", action="store_true", help="the second command")
    p.add_argument("--rehearse", action="store_true", help="both commands on a CPU")
    p.add_argument("--pack", type=Path, metavar="DATA", help="copy the data from this folder")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that run in parallel, each of which has one core
    os.environ["TQDM_DISABLE"] = "1"
    packed = machine.ROOT / "build" / "gpu-learn"
    folders = Folders(packed, machine.ROOT / "runs" / "gpu-learn", Path(os.environ.get("OUT") or packed))
    if options.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from benchmarks.learning.gpu_rehearsal import rehearse

        return rehearse(machine.ROOT / "build" / "gpu-learn-rehearsal")
    try:
        if options.pack:
            pack(options.pack, folders)
            return 0
        before = required(folders, options.more, options.budget)
    except (ValueError, OSError) as error:  # its message is for the user
        print(error, file=sys.stderr)
        return 2
    print("\n".join(prepare()), flush=True)
    from benchmarks.learning.gpu_stages import command  # after `prepare`, because it needs the extension

    size = FULL._replace(seconds=min(FULL.seconds, options.budget / 2))
    command(folders, size, "cuda", STARTED + options.budget, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
