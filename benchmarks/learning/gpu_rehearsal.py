"""`make gpu-learn` on a CPU: both commands at about a hundredth, the second one as on another machine."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.learning import equal_compute_report, gpu_stages, pretend_data
from benchmarks.learning.on_gpu import RESULT, Folders, Size, first_result, pack

SIZE = Size("tiny", 400, seconds=2.0, tried=20, seeds=1, share=0.01)
BUDGET = 600.0  # seconds of a command, so that nothing is left out on a busy machine
FILES, BYTES, TOGETHER = 8, 16 << 20, 64 << 20  # the most that comes back from a GPU machine


def rehearse(folder: Path, size: Size = SIZE) -> int:
    """Run both commands in a folder; print what is wrong and return the exit status."""
    began, wrong = time.monotonic(), []
    shutil.rmtree(folder, ignore_errors=True)
    folders = Folders(folder / "packed", folder / "runs", folder / "first")
    pretend_data.write(folder / "data")
    pack(folder / "data", folders, size)
    found: dict[str, Any] = {}
    for model in ("fused", "masked"):
        gpu_stages.command(folders, size, "cpu", time.monotonic() + BUDGET, found)
        wrong += wrong_files(folders.out, {RESULT, f"{model}.tar.xz.0"})
        if model == "fused":  # the next machine has only the packed folder
            shutil.rmtree(folders.runs)
            shutil.copytree(folders.out, folders.packed, dirs_exist_ok=True)
            folders = folders._replace(out=folder / "second")
            found = first_result(folders)
    wrong += [f"left out: {name}: {why}" for name, why in found["left_out"].items()]
    wrong += [f"{model} has no probes" for model in found["models"] if "probes" not in found["models"][model]]
    wrong += wrong_section(found)
    lines = [f"the rehearsal is incomplete: {len(wrong)} of its results are wrong or missing", *wrong]
    if not wrong:
        lines = [f"the rehearsal is complete, in {time.monotonic() - began:.0f} s; its numbers mean nothing"]
    print("\n  ".join(lines), file=sys.stderr if wrong else sys.stdout, flush=True)
    return int(bool(wrong))


def wrong_files(out: Path, names: set[str]) -> list[str]:
    """Return what is wrong with the files of a command, which must have these names, or more parts."""
    sizes = {file.name: file.stat().st_size for file in out.iterdir()}
    wrong = [f"{out / name} does not exist" for name in sorted(names - sizes.keys())]
    wrong += [f"{out / name} has {size:,} bytes" for name, size in sizes.items() if size > BYTES]
    if len(sizes) > FILES or sum(sizes.values()) > TOGETHER:
        wrong.append(f"{out} has {len(sizes)} files of {sum(sizes.values()):,} bytes")
    return wrong


def wrong_section(found: dict[str, Any]) -> list[str]:
    """Return why LEARNING.md could not have a section about a result."""
    try:
        equal_compute_report.section(found, "picture.svg")
    except Exception as error:
        return [f"the section of LEARNING.md: {error!r}"]
    return []
