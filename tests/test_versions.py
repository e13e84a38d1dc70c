"""The table of tested versions agrees with the files that select the versions."""

import re
from pathlib import Path

import pytest

from electra_fast import versions
from electra_fast.versions import TESTED

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M))


@pytest.mark.parametrize("package", TESTED)
def test_the_pinned_version_is_in_the_table(package):
    assert PINS[package] in TESTED[package]
    assert list(TESTED[package]) == sorted(TESTED[package], key=versions._release)


def test_the_readme_names_the_tested_transformers():
    first, last = (TESTED["transformers"][i].rsplit(".", 1)[0] for i in (0, -1))
    assert f"tested from {first} to {last}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_the_oldest_version_is_the_minimum_of_pyproject(package):
    (oldest,) = set(re.findall(rf"\b{package}>=([\d.]+)", (ROOT / "pyproject.toml").read_text()))
    assert TESTED[package][0] == f"{oldest}.0"


def test_the_oldest_torch_is_the_default_of_make_test_torch():
    assert re.search(r"^TORCH \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)[1] == TESTED["torch"][0]


def test_transformers_own_tests_are_of_the_pinned_version():
    text = (ROOT / "tests/test_hf_versions.py").read_text()
    assert re.search(r'^TESTED = "(.*)"', text, re.M)[1] == PINS["transformers"]


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "not installed"),
        ("2.13.0+cpu", "tested"),
        ("2.12.1", "between tested versions"),
        ("2.10.0", "older than tested"),
        ("3.0.0.dev20261128", "newer than tested: the checks below ran with it"),
    ],
)
def test_how_an_installed_version_compares(version, words):
    assert versions.standing("torch", version) == words


def test_the_report_has_a_line_per_package(monkeypatch):
    monkeypatch.setattr(versions, "installed", {"torch": "9.9", "triton": None, "transformers": "5.24.0"}.get)
    lines = versions.report().splitlines()
    assert lines[0].startswith(
        "  torch         9.9, newer than tested: the checks below ran with it (2.11.0,"
    )
    assert lines[1].startswith("  triton        not installed (3.6.0,")
    assert "5.24.0, tested (5.0.0," in lines[2]
