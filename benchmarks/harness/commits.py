"""Time a commit and the working tree in turn: make a worktree, build it, run its tests, time both.

The commit is built in its own virtual environment, which also sees the packages of the current one. It is
timed by the benchmarks of the working tree, so only the kernels differ.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.harness.machine import ROOT
from benchmarks.report.runs import read
from electra_fast.errors import must

ROUNDS = 2  # pairs of processes; the second pair starts with the other tree


class Tree:
    """A checkout, and the Python interpreter in which it is installed."""

    def __init__(self, name: str, root: Path, python: str):
        self.name, self.root, self.python = name, root, python

    def run(self, *arguments: str) -> str:
        """Run python in the tree and return stdout; ValueError contains the last lines of its output."""
        shell = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("PYTEST_")}
        command = [self.python, *arguments]
        done = subprocess.run(command, cwd=self.root, env=shell, capture_output=True, text=True)
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            subject, got = f"compare: `python {' '.join(arguments)}`", f"status {done.returncode}"
            raise ValueError(must(subject, f"pass in {self.name}", got, f"fix that first\n{tail}"))
        return done.stdout


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(must(f"compare: git {' '.join(arguments)}", "pass", done.stderr.strip()))
    return done.stdout.strip()


@contextmanager
def checked_out(rev: str) -> Iterator[Tree]:
    """Check a commit out and build it; remove everything afterwards."""
    commit = git("rev-parse", "--verify", f"{rev}^{{commit}}")
    folder = Path(tempfile.mkdtemp(prefix="electra_fast-"))
    root = folder / "tree"
    try:
        git("worktree", "add", "--detach", str(root), commit)
        shutil.rmtree(root / "benchmarks")
        shutil.copytree(
            ROOT / "benchmarks", root / "benchmarks", ignore=shutil.ignore_patterns("__pycache__")
        )
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        packages = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"])
        # Python ignores .pth files in folders that a .pth file adds, so the working tree is not importable.
        Path(packages.decode().strip(), "packages.pth").write_text("\n".join(site.getsitepackages()))
        tree = Tree(f"{rev} ({commit[:7]})", root, str(python))
        print(f"building {tree.name}", flush=True)
        options = ("-q", "--no-index", "--no-deps", "--no-build-isolation")
        tree.run("-m", "pip", "install", *options, "-e", ".")
        yield tree
    finally:
        if root.exists():
            git("worktree", "remove", "--force", str(root))
        shutil.rmtree(folder)


def ops_timed(tree: Tree, only: str | None) -> list[str]:
    """Return the names of the bench files that have cases selected by `only`."""
    arguments = ("-m", "pytest", "--collect-only", "-q", "benchmarks", "--quick")
    listed = tree.run(*arguments, *([f"--only={only}"] if only else []))
    return list(dict.fromkeys(re.findall(r"bench_(\w+)\.py::", listed)))


def measured(rev: str, only: str | None, budget: float) -> tuple[dict, dict]:
    """Return the results of a commit and of the working tree."""
    with checked_out(rev) as base:
        head = Tree("the working tree", ROOT, sys.executable)
        ops = ops_timed(head, only)
        for tree in (base, head):
            files = [f"tests/test_{op}.py" for op in ops if (tree.root / "tests" / f"test_{op}.py").exists()]
            print(f"testing {tree.name}: {' '.join(files)}", flush=True)
            tree.run("-m", "pytest", "-q", "-x", *files)
        found: dict[Tree, list[dict]] = {base: [], head: []}
        for i in range(ROUNDS):
            for tree in (base, head) if i % 2 == 0 else (head, base):
                print(f"timing {tree.name}, {i + 1} of {ROUNDS}", flush=True)
                found[tree].append(timed(tree, only, budget))
    return merged(found[base]), merged(found[head])


def timed(tree: Tree, only: str | None, budget: float) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        options = [f"--budget={budget}", "--quick", f"--json={file}", *([f"--only={only}"] if only else [])]
        tree.run("-m", "benchmarks", *options)
        return read(file)


def merged(results: list[dict]) -> dict:
    """Combine the results of several processes: medians of the medians, and the widest percentiles."""
    result = json.loads(json.dumps(results[0]))
    others = [{b["fullname"]: b for b in r["benchmarks"]} for r in results]
    result["benchmarks"] = [
        b for b in result["benchmarks"] if all(b["fullname"] in other for other in others)
    ]
    result["wrong"] = sorted({line for r in results for line in r["wrong"]})
    for benchmark in result["benchmarks"]:
        same = [other[benchmark["fullname"]] for other in others]
        extra = benchmark["extra_info"]
        benchmark["stats"]["median"] = median(b["stats"]["median"] for b in same)
        extra["p20"] = min(b["extra_info"]["p20"] for b in same)
        extra["p80"] = max(b["extra_info"]["p80"] for b in same)
        extra["ratio"] = {p: median(b["extra_info"]["ratio"][p] for b in same) for p in extra["ratio"]}
        extra.pop("spread", None)  # it is that of one process
    return result
