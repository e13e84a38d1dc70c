"""The committed figures, figures.json, one kernel per line, and the differences from them.

A kernel is worse if it spills more, if fewer of its warps are resident on a multiprocessor, if it has fewer
tensor-core instructions, or if its instructions per block or the clocks of its longest wait grow by over 5%.
A new kernel is worse if it spills. Figures of different compiler versions are not compared, nor is `source`,
the hash by which aot.py recognises a kernel.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import NamedTuple

from benchmarks.static import cuda, gpus, sass

FILE = Path(__file__).with_name("figures.json")
KEY = ("arch", "part", "kernel", "variant")
COLUMNS = (*KEY, "shape", "source", "warps", "registers", "spill_bytes", "shared_bytes", "occupancy")
COLUMNS += ("products", "instructions", *sass.CLASSES, "other", "main")
COLUMNS += tuple(f"{name}_clocks" for name in gpus.WAITS)
SLACK = 1.05
UPDATE = "if intended: python -m benchmarks static --update, and commit benchmarks/static/figures.json"


class Change(NamedTuple):
    line: str
    worse: bool


def compilers() -> dict[str, str | None]:
    """Return the versions of the installed compilers, None for one that is missing."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"triton": triton, "nvcc": cuda.version()}


def compiler(row: dict) -> str:
    return "nvcc" if row["part"].endswith(".cu") else "triton"


def load(file: Path = FILE) -> dict:
    """Return {compilers, rows}; refuse any other file."""
    remedy = "python -m benchmarks static --update writes it again"
    try:
        found = json.loads(file.read_text())
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in found["rows"]]
        if found["columns"] != list(COLUMNS) or set(found["compilers"]) != {"triton", "nvcc"}:
            raise ValueError("its columns or compilers differ")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"static: {file} must contain the figures of this version, got {error!r}; {remedy}"
        ) from error
    return {"compilers": found["compilers"], "rows": rows}


def of_source(arch: int, source: str) -> list[dict]:
    """Return the committed rows of an architecture with this hash of source and compiler."""
    return [row for row in load()["rows"] if (row["arch"], row["source"]) == (arch, source)]


def save(rows: list[dict], versions: dict, file: Path = FILE) -> None:
    """Write the rows sorted, one per line, so that the diff of a changed kernel is readable."""
    rows = sorted(rows, key=lambda row: [row[column] for column in KEY])
    lines = ",\n".join(json.dumps([row[column] for column in COLUMNS]) for row in rows)
    head = f'"compilers": {json.dumps(versions)},\n"columns": {json.dumps(COLUMNS)},\n"rows"'
    file.write_text(f"{{\n{head}: [\n{lines}\n]\n}}\n")


def update(rows: list[dict], file: Path = FILE) -> None:
    """Replace the committed rows; keep the rows of a compiler that is not installed."""
    versions = compilers()
    if missing := [name for name, version in versions.items() if version is None]:
        old = load(file)
        rows = [*rows, *(row for row in old["rows"] if compiler(row) in missing)]
        versions |= {name: old["compilers"][name] for name in missing}
    save(rows, versions, file)


def not_compared(rows: list[dict], committed: dict) -> dict[str, str]:
    """Return by compiler a sentence that says why its rows are not compared."""
    here, then = compilers(), committed["compilers"]
    return {
        name: f"not compared: the committed figures are from {name} {then[name]}, installed is {here[name]}"
        for name in sorted({compiler(row) for row in rows})
        if here[name] != then[name]
    }


def changes(rows: list[dict], committed: dict) -> list[Change]:
    """Return how these rows differ from the committed ones of the same parts and architectures."""
    skipped = not_compared(rows, committed)
    made = {(row["arch"], row["part"]) for row in rows}
    new = {key(row): row for row in rows if compiler(row) not in skipped}
    old = {
        key(row): row
        for row in committed["rows"]
        if (row["arch"], row["part"]) in made and compiler(row) not in skipped
    }
    found = []
    for name in sorted({*old, *new}):
        if name in old and name in new:
            found += changed(old[name], new[name])
        elif name in old:
            found.append(Change(f"{title(name)}: no longer compiled", False))
        else:
            spilled = new[name]["spill_bytes"]
            what = f"new, spills {spilled} bytes" if spilled else "new"
            found.append(Change(f"{title(name)}: {what}", spilled > 0))
    return found


def changed(old: dict, new: dict) -> list[Change]:
    moves = [f"{c} {old[c]} -> {new[c]}" for c in COLUMNS if old[c] != new[c] and c != "source"]
    if not moves:
        return []
    worse = (
        new["spill_bytes"] > old["spill_bytes"]
        or new["occupancy"] < old["occupancy"]
        or new["tensor"] < old["tensor"]
        or new["instructions"] * new["warps"] > SLACK * old["instructions"] * old["warps"]
        or gpus.bound(new)[1] > SLACK * gpus.bound(old)[1]
    )
    return [Change(f"{title(key(new))}: {', '.join(moves)}{'; worse' * worse}", worse)]


def key(row: dict) -> tuple:
    return tuple(row[column] for column in KEY)


def title(key: tuple) -> str:
    arch, _, kernel, variant = key
    return f"sm_{arch} {kernel} ({variant})" if variant else f"sm_{arch} {kernel}"
