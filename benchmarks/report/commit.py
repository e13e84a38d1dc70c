"""`python -m benchmarks commit`: a run becomes the committed result of its device, in README.md too."""

import argparse
import shutil
import subprocess
from pathlib import Path

from benchmarks.machine import ROOT, device_slug, source_hash
from benchmarks.report import markdown
from benchmarks.report.runs import read

# What this command changes itself, so that the runs of two machines go into one commit.
OURS = ("README.md", "benchmarks/results")


def changed(root: Path) -> list[str]:
    """Return what git does not have as it is here, without what this command writes."""
    command = ["git", "status", "--porcelain", "--", ".", *(f":!{path}" for path in OURS)]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"commit: git must be installed, got {error}") from None
    if done.returncode:
        raise ValueError(f"commit: {root} must be a git checkout, got {done.stderr.strip()!r}")
    return [line[3:] for line in done.stdout.splitlines()]


def commit(file: Path, root: Path = ROOT) -> int:
    """Copy a whole run of these very kernels to benchmarks/results, and write README.md's tables."""
    run = read(file)
    if files := changed(root):
        raise ValueError(
            f"commit: the checkout must be clean, got changes in {', '.join(files[:5])}; "
            "commit or stash them first"
        )
    if run["machine_info"].get("rehearsal") or run.get("only") or run.get("quick"):
        raise ValueError(f"commit: {file} must be a whole run, got a part of one; run `make bench`")
    if run["machine_info"]["sources"] != source_hash(root):
        raise ValueError(
            f"commit: {file} must be a run of the kernels of this commit, got one of others; "
            "run `make bench` again"
        )
    target = root / "benchmarks" / "results" / f"{run['machine_info']['device']}.json"
    shutil.copyfile(file, target)
    print(target)
    return markdown.update_readme(root / "README.md", root)


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks commit",
        description="Copy a run to benchmarks/results, from a clean checkout, and write README.md's tables.",
    )
    default = ROOT / "build" / "bench" / f"{device_slug()}.json"
    p.add_argument(
        "file", nargs="?", type=Path, default=default, help="default: the last run of `make bench`"
    )
    return commit(p.parse_args(arguments).file)
