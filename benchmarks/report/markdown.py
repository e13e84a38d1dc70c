"""The tables in README.md and docs/results.md and the pictures, made from benchmarks/results."""

import sys
from pathlib import Path

from benchmarks.harness.machine import ROOT, source_hash
from benchmarks.harness.providers import in_order, label
from benchmarks.report import picture
from benchmarks.report.checks import sentence
from benchmarks.report.inference import inference, rates
from benchmarks.report.numbers import digits, provider_rows, step_columns
from benchmarks.report.runs import (
    MODELS,
    case,
    files,
    headline,
    kind,
    ours,
    read,
    times_fused,
    with_backward,
)
from benchmarks.report.text import BASIS, absent

BEGIN = "<!-- benchmarks: made by `python -m benchmarks report` -->"
END = "<!-- /benchmarks -->"


def tables(result: dict, sources: str) -> str:
    """Return one device's tables: ops and steps, models of transformers, inference, and each training step.

    The first two have the ratio of each provider's time to that of fused.
    """
    found = with_backward(result)
    models = {g: providers for g, providers in found.items() if case(g).op in MODELS}
    ops = {g: providers for g, providers in found.items() if g not in models}
    timed = kind(result) == "cuda"
    basis = BASIS["cuda"] if timed else "Measured by CPU time, summed over all threads."
    passes = "Each op is timed with its backward pass, if it has one."
    missing = f"Absent: {found}." if (found := absent(result)) else ""
    note = " ".join(filter(None, [basis, passes, sentence(result), missing]))
    numbers = [_table(*numbers) for numbers in inference(result)]
    parts = [_ratios(ops, timed), note, *([_ratios(models, timed)] if models else [])]
    return "\n\n".join([_title(result, sources), *parts, *numbers, *_steps(result)])


def _ratios(found: dict[str, dict[str, dict | str]], timed: bool) -> str:
    """Return a table with one row per case and one column per provider.

    Times are given for GPUs only: those of a CPU depend more on the machine than on the kernels.
    """
    every = in_order(p for providers in found.values() for p in providers)
    rivals = [p for p in every if p not in ("fused", "reference")]
    rows = []
    for group, providers in found.items():
        op, size, _ = case(group)
        fused = providers.get("fused", "")
        ms = fused if isinstance(fused, str) else digits(fused["stats"]["median"] * 1e3)
        name = "**training step**" if op == "step" else op
        rows.append([name, size, *([ms] if timed else []), *(_cell(providers.get(p)) for p in rivals)])
    head = ["fused is this many times as fast as", "size", *["fused, ms"] * timed, *map(label, rivals)]
    return _table(head, rows, words=2)


def summary(result: dict, sources: str) -> str:
    """Return one device's tables for README.md: its first training step, and texts of real lengths."""
    texts = [_table(*numbers) for numbers in rates(result)]
    return "\n\n".join([_title(result, sources), *_steps(result)[:1], *texts])


def _title(result: dict, sources: str) -> str:
    stale = "" if result["machine_info"]["sources"] == sources else " (the kernels have changed since)"
    return f"**{headline(result)}**{stale}"


def _steps(result: dict) -> list[str]:
    """Return one table per training step, with one row per provider."""
    columns = [c for c in step_columns(result) if c != "p20 - p80"]
    columns = columns if kind(result) == "cuda" else columns[-3:]  # without times
    return [
        _table([f"training step, {case(group).size}", *columns], provider_rows(providers, result, columns))
        for group, providers in with_backward(result).items()
        if case(group).op == "step"
    ]


def _table(head: list[str], rows: list[list[str]], words: int = 1) -> str:
    """Return a Markdown table; its columns after the first `words` are numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _cell(benchmark: dict | str | None) -> str:
    if benchmark is None or isinstance(benchmark, str):
        return benchmark or ""
    note = "" if ours(benchmark) == "fused" else f" ({label(ours(benchmark))})"
    return f"{times_fused(benchmark):.2f}{note}" if times_fused(benchmark) else ""


PAGES = {"README.md": summary, "docs/results.md": tables}


def update(root: Path = ROOT) -> int:
    """Write the tables between the two comments in each of PAGES, and the pictures next to the results."""
    found = {file: read(file) for file in files(root)}
    texts = {name: (root / name).read_text() for name in PAGES if (root / name).exists()}
    marked = [name for name, text in texts.items() if BEGIN in text and END in text.split(BEGIN)[1]]
    if not found or len(marked) < len(PAGES):
        lines = f"the lines {BEGIN} and {END} in {' and '.join(PAGES)}"
        print(f"report: needs {lines if found else 'python -m benchmarks first'}", file=sys.stderr)
        return 1
    sources = source_hash(root)
    for name, tables_of in PAGES.items():
        before, _, rest = texts[name].partition(BEGIN)
        parts = [tables_of(result, sources) for result in found.values()]
        text = "\n\n".join([f"{before}{BEGIN}", *parts, f"{END}{rest.partition(END)[2]}"])
        (root / name).write_text(text)
    for file, result in found.items():
        for theme in picture.THEMES:
            file.with_name(f"{file.stem}-{theme}.svg").write_text(picture.ratios(result, theme))
    return 0
