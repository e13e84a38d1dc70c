"""The command `python -m benchmarks commit`: make a run the committed result of its device."""

import argparse
import shutil
import subprocess
from pathlib import Path

from benchmarks.harness.machine import ROOT, device_slug, source_hash
from benchmarks.report import markdown
from benchmarks.report.runs import read
from electra_fast.errors import must

# Files that this command writes. They may have changes, so that one commit can contain runs of two machines.
OURS = (*markdown.PAGES, "benchmarks/results")


def changed(root: Path) -> list[str]:
    """Return the files with uncommitted changes, except those that this command writes."""
    command = ["git", "status", "--porcelain", "--", ".", *(f":!{path}" for path in OURS)]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(must("commit: git", "be installed", error)) from None
    if done.returncode:
        raise ValueError(must(f"commit: {root}", "be a git checkout", repr(done.stderr.strip())))
    return [line[3:] for line in done.stdout.splitlines()]


def commit(file: Path, root: Path = ROOT) -> int:
    """Copy a complete run of the current kernels to benchmarks/results, and update the documents."""
    run = read(file)
    if files := changed(root):
        got = f"changes in {', '.join(files[:5])}"
        raise ValueError(must("commit: the checkout", "be clean", got, "commit or stash them first"))
    if run["machine_info"].get("rehearsal") or run.get("only") or run.get("quick"):
        raise ValueError(must(f"commit: {file}", "be a whole run", "a part of one", "run `make bench`"))
    if run["machine_info"]["sources"] != source_hash(root):
        rule, remedy = "be a run of the kernels of this commit", "run `make bench` again"
        raise ValueError(must(f"commit: {file}", rule, "a run of other kernels", remedy))
    target = root / "benchmarks" / "results" / f"{run['machine_info']['device']}.json"
    shutil.copyfile(file, target)
    print(target)
    return markdown.update(root)


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks commit",
        description="Copy a run to benchmarks/results, and update README.md and docs/results.md. "
        "The checkout must be clean.",
    )
    default = ROOT / "build" / "bench" / f"{device_slug()}.json"
    p.add_argument(
        "file", nargs="?", type=Path, default=default, help="default: the last run of `make bench`"
    )
    return commit(p.parse_args(arguments).file)
