"""CONTRIBUTING.md, "A new op in an hour": applied to a copy of the tree, its blocks add a working op."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text().split("## A new op in an hour\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"^```(?:python|diff)\n# ([^\n]*)\n(.*?)^```", GUIDE, re.M | re.S)
TESTS = ["test_layer_scale", "test_implementations", "test_compile_lengths", "test_doctor", "test_benchmarks"]


def with_diff(source: str, diff: str) -> str:
    """Return `source` with the lines that have a "+" in `diff`.

    Each is inserted after the line above it in the diff; at the top of the diff, before the line below it.
    The lines without "+" are lines of the source in its order, but need not be neighbours there.
    """
    lines, at, top = source.splitlines(keepends=True), 0, []
    for line in diff.splitlines(keepends=True):
        if not line.startswith("+"):
            at = lines.index(line[1:], at)
            lines[at:at] = top
            at, top = at + len(top) + 1, []
        elif at == 0:
            top.append(line[1:])
        else:
            lines.insert(at, line[1:])
            at += 1
    return "".join(lines)


def apply(title: str, block: str, tree: Path) -> None:
    """Apply one block: `title` is its first line."""
    how, _, name = title.rpartition(" ")
    file = tree / name
    if how == "new file":
        assert not file.exists(), f"{name} is there already"
        file.write_text(block)
    elif how == "at the end of":
        file.write_text(f"{file.read_text()}\n\n{block}")
    else:
        assert how == "into", f"a block must say where it belongs, got {title!r}"
        file.write_text(with_diff(file.read_text(), block))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with the op."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ("electra_fast", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (tree / "electra_fast" / "kernels").symlink_to(ROOT / "kernels")  # `package_dir` in setup.py maps it
    shutil.copy(ROOT / "pyproject.toml", tree)
    for title, block in BLOCKS:
        apply(title, block, tree)
    return tree


def pytest_in(tree: Path, seed: int, *arguments: str) -> subprocess.CompletedProcess:
    # With an empty PATH there is no compiler, so tests/host does not build csrc/cuda for this copy.
    variables = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"PATH": "", "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--seed={seed}", *arguments]
    return subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True)


def test_the_guide_names_six_places():
    assert len(re.findall(r"^### \d\. ", GUIDE, re.M)) == 6


def test_the_op_of_the_guide_passes_its_tests_and_those_of_all_ops(tree, seed):
    files = [f"tests/{name}.py" for name in TESTS]
    done = pytest_in(tree, seed, *files, "-k", "layer_scale or every_op_is or every_op_has")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 20, done.stdout


def test_its_test_finds_a_wrong_gradient(tree, seed):
    file = tree / "electra_fast" / "ops" / "layer_scale.py"
    right = file.read_text()
    wrong = right.replace("dx = wide(dy) * wide(weight)", "dx = wide(dy)")
    assert wrong != right
    file.write_text(wrong)
    try:
        done = pytest_in(tree, seed, "tests/test_layer_scale.py", "-k", "gradients")
    finally:
        file.write_text(right)
    assert done.returncode == 1 and "gradient of x" in done.stdout, done.stdout + done.stderr
