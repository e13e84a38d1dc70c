"""Every transformers from 5.0 on, and transformers' own tests of its ELECTRA and BERT, patched and not.

Both need a network, so that `make test-all` alone runs them. What pip brings stays in build/.
"""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSIONS = ("5.0.0", "5.4.0", "5.8.0", "5.12.0", "5.16.0", "5.20.0", "5.23.0", "5.24.0")
TESTED = "5.23.0"  # whose own tests are run
SUITE = ("hf", "hf_patch", "hf_patch_beside", "hf_patch_refusals", "hf_pretrainer", "hf_trainer")
SUITE = [f"tests/test_{name}.py" for name in (*SUITE, "accuracy")]
# What the common tests import of others that the source distribution leaves out.
ABSENT = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def pip(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def run(folder: Path, cwd: Path, *arguments: str | Path, **environment: str) -> str:
    """Run pytest with what is in `folder` before what is installed; return its last lines."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.stdout[-3000:] + done.stderr[-500:]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_works_with_transformers(version):
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


def verdicts(upstream: Path, patch: str) -> dict[str, list[str]]:
    """Return how each test ended, by name: nothing, or "failure", "error", "skipped"."""
    report = upstream / f"verdicts{patch}.xml"
    # Not with this project's settings, which make errors of warnings.
    settings = ("-c", os.devnull, f"--rootdir={upstream}")
    run(upstream, upstream, "test_models.py", *settings, f"--junitxml={report}", ELECTRA_FAST_PATCH=patch)
    cases = xml.etree.ElementTree.parse(report).iter("testcase")
    return {f"{c.get('classname')}.{c.get('name')}": [end.tag for end in c] for c in cases}


@pytest.mark.slow
def test_transformers_own_tests_say_the_same_of_patched_models(upstream):
    """Left out: pipelines, generation and ExportTesterMixin, whose files the distribution lacks."""
    plain, patched = verdicts(upstream, ""), verdicts(upstream, "1")
    assert sum(not ends for ends in plain.values()) > 150, plain
    assert patched == plain
