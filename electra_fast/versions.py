"""The tested versions of other packages, and how an installed version compares with them."""

import re
from importlib import metadata

from electra_fast.tables import text_table

# Oldest first. `make test` uses the pinned versions, `make test-torch` other versions of torch and Triton,
# and tests/test_hf_versions.py every version of transformers.
TESTED = {
    "torch": ("2.11.0", "2.13.0", "2.14.1"),
    "triton": ("3.6.0", "3.7.1", "3.8.0"),
    "transformers": ("5.0.0", "5.4.0", "5.8.0", "5.12.0", "5.16.0", "5.20.0", "5.23.0", "5.24.0"),
}


def installed(package: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def standing(package: str, version: str | None) -> str:
    """Return in a few words how a version compares with the tested ones."""
    if version is None:
        return "not installed"
    release, tested = _release(version), [_release(v) for v in TESTED[package]]
    if release in tested:
        return "tested"
    if release > tested[-1]:
        return "newer than tested: the checks below ran with it"
    return "older than tested" if release < tested[0] else "between tested versions"


def report() -> str:
    """Return a line per package: the installed version, how it compares, and the tested ones."""
    rows = []
    for package, tested in TESTED.items():
        version = installed(package)
        found = f"{version}, {standing(package, version)}" if version else "not installed"
        rows.append((f"  {package}", f"{found} ({', '.join(tested)})"))
    return text_table(rows)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))
