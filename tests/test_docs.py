"""The documents: their links, files and tests exist, pages of ops have one form, no file is too long."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("docs/**/*.md")]
PAGES = [*ROOT.glob("docs/kernels/*.md")]
HEADINGS = ["Algorithm", "Launch table", "Registers", "Predicted and measured", "What was tried"]
SOURCES = ("*.py", "*.md", "*.cpp", "*.h", "*.cu", "*.cuh", "*.c", "Makefile")

each = pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


@each
def test_links_resolve(file):
    text = file.read_text()
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", text) + re.findall(r'\b(?:src|srcset|href)="([^"#]+)', text)
    assert [link for link in links if "://" not in link and not (file.parent / link).exists()] == []


@each
def test_named_tests_exist(file):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", file.read_text())
    missing = [f"{path}::{name}" for path, name in named if not defines(ROOT / path, name)]
    assert missing == []


def defines(file: Path, name: str) -> bool:
    return file.exists() and f"def {name}(" in file.read_text()


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_the_pages_of_ops_have_the_same_headings(file):
    assert re.findall(r"^## (.*)$", file.read_text(), re.M) == HEADINGS


def test_every_op_with_a_kernel_has_a_page():
    kernels = {file.stem for file in (*ROOT.glob("kernels/[a-z]*.py"), *ROOT.glob("csrc/cpu/*.cpp"))}
    on_another_page = {"attention_qkv", "fingerprint"}  # attention's and encoder_layer's
    candidates = {"linear_gelu"}  # the kernel of no op yet, kernels/_linear_gelu.py
    assert kernels - on_another_page | candidates == {file.stem for file in PAGES}


def test_the_readme_is_five_minutes_and_no_file_is_longer_than_its_reader():
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SOURCES]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout:  # an ignored folder of a checkout has no files of its own
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in done.stdout.splitlines()]
    lines = {file: len(file.read_text().splitlines()) for file in files if file.exists()}
    assert lines[ROOT / "README.md"] <= 160
    assert {file: n for file, n in lines.items() if n > 400} == {}
