"""Every transformers from 5.0 on, and transformers' own tests of its ELECTRA and BERT, patched and not.

Both need a network, so only `make test-all` runs them. The downloads stay in build/.
"""

import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree
from pathlib import Path

import pytest

from electra_fast import versions

ROOT = Path(__file__).parents[1]
VERSIONS = versions.TESTED["transformers"]
TESTED = "5.23.0"  # the version whose own tests run
SUITE = (
    "hf",
    "hf_export",
    "hf_patch",
    "hf_decoders",
    "hf_patch_calls",
    "hf_patch_refusals",
    "hf_patch_with_others",
)
SUITE += ("hf_patch_unknown", "hf_pretrainer", "hf_trainer", "accuracy", "heads", "heads_of_folders")
SUITE = [f"tests/test_{name}.py" for name in SUITE]
# Modules that the common tests import, but that are not in the source distribution.
ABSENT = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def pip(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def run(folder: Path, cwd: Path, *arguments: str | Path, **environment: str) -> str:
    """Run pytest with the packages in `folder` before the installed ones; return its last lines."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.stdout[-3000:] + done.stderr[-500:]


def newest() -> str:
    """Return the newest version of transformers; skip the test if it is in the table or cannot be found."""
    arguments = ("-q", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", "transformers")
    command = [sys.executable, "-m", "pip", "install", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip finds no newest transformers: {done.stderr.strip()[-300:]}")
    (found,) = json.loads(done.stdout)["install"]
    version = found["metadata"]["version"]
    if versions.standing("transformers", version) == "tested":
        pytest.skip(f"the newest is {version}, which has a test of its own")
    return version


@pytest.mark.slow
@pytest.mark.parametrize("version", [*VERSIONS, "newest"])
def test_works_with_transformers(version):
    version = newest() if version == "newest" else version
    folder = ROOT / "build" / f"transformers-{version}"
    if not folder.exists():
        pip("install", "-q", "--target", folder, f"transformers=={version}")
    out = run(folder, ROOT, *SUITE)
    assert " passed" in out and "failed" not in out and "error" not in out, out


@pytest.fixture(scope="module")
def upstream() -> Path:
    """transformers' tests as a folder, with tests/upstream/models.py in it."""
    folder = ROOT / "build" / f"transformers-{TESTED}-tests"
    if not folder.exists():
        part = folder.with_suffix(".part")
        pip("download", "-q", "--no-deps", "--no-binary=transformers", f"transformers=={TESTED}", "-d", part)
        pip("install", "-q", "--target", part, "parameterized")
        archive = tarfile.open(part / f"transformers-{TESTED}.tar.gz")
        archive.extractall(part, filter="data")
        (part / f"transformers-{TESTED}" / "tests").rename(part / "tests")
        for file, mixin in ABSENT.items():
            (part / "tests" / file).parent.mkdir(exist_ok=True)
            (part / "tests" / file).write_text(f"class {mixin}:\n    pass\n")
        for package in ("", "exporters", "generation"):
            (part / "tests" / package / "__init__.py").touch()
        part.rename(folder)
    (folder / "test_models.py").write_text((ROOT / "tests/upstream/models.py").read_text())
    return folder


def outcomes(upstream: Path, patch: str) -> dict[str, list[str]]:
    """Return the outcome of each test by name: nothing if it passed, or "failure", "error", "skipped"."""
    report = upstream / f"outcomes{patch}.xml"
    # This project's settings would turn warnings into errors.
    settings = ("-c", os.devnull, f"--rootdir={upstream}")
    run(upstream, upstream, "test_models.py", *settings, f"--junitxml={report}", ELECTRA_FAST_PATCH=patch)
    cases = xml.etree.ElementTree.parse(report).iter("testcase")
    return {f"{c.get('classname')}.{c.get('name')}": [end.tag for end in c] for c in cases}


@pytest.mark.slow
def test_transformers_own_tests_have_the_same_outcomes_with_patched_models(upstream):
    """Not tested: pipelines, generation and ExportTesterMixin, whose files are not in the distribution."""
    plain, patched = outcomes(upstream, ""), outcomes(upstream, "1")
    assert sum(not ends for ends in plain.values()) > 150, plain
    assert patched == plain
