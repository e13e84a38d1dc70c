"""The tables in README.md, made of benchmarks/results."""

import sys
from pathlib import Path

from benchmarks.machine import ROOT, source_hash
from benchmarks.providers import ORDER, label
from benchmarks.report.checks import sentence
from benchmarks.report.numbers import digits, utilisation
from benchmarks.report.runs import case, files, headline, kind, read, times_fused, with_backward
from benchmarks.report.text import BASIS

BEGIN = "<!-- benchmarks: made by `python -m benchmarks report` -->"
END = "<!-- /benchmarks -->"


def tables(result: dict, sources: str) -> str:
    """Return one device's tables: a row a case, how many times as fast `fused` is as each provider.

    Times are given for GPUs alone: a CPU's say more about the machine than about the kernels.
    """
    found = with_backward(result)
    rivals = [p for p in ORDER[1:-1] if any(p in providers for providers in found.values())]
    timed = kind(result) == "cuda"
    head = ["fused is this many times as fast as", "", *(["fused, ms"] if timed else [])]
    head += [label(p) for p in rivals]
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for group, providers in found.items():
        op, size, _ = case(group)
        fused = providers.get("fused", "")
        ms = fused if isinstance(fused, str) else digits(fused["stats"]["median"] * 1e3)
        name = "**training step**" if op == "step" else op
        rows.append([name, size, *([ms] if timed else []), *(_cell(providers.get(p)) for p in rivals)])
    stale = "" if result["machine_info"]["sources"] == sources else " (kernels changed since)"
    lines = [f"**{headline(result)}**{stale}", "", *(f"| {' | '.join(cells)} |" for cells in rows)]
    basis = BASIS["cuda"] if timed else "By CPU time, of all threads together."
    lines += ["", f"{basis} Ops with their backward, where they have one. {sentence(result)}".rstrip()]
    steps = {group: providers for group, providers in found.items() if group.startswith("step, ")}
    for group, providers in steps.items():
        lines += ["", *(f"| {' | '.join(cells)} |" for cells in step_table(group, providers, result))]
    return "\n".join(lines)


def step_table(group: str, providers: dict[str, dict | str], result: dict) -> list[list[str]]:
    """Return what one wants to know of a step of each provider; absolute times are a GPU's alone."""
    timed = kind(result) == "cuda"
    head = [
        f"training step, {case(group).size}",
        *(["ms", "tokens/s", "MFU", "hours, paper"] if timed else []),
    ]
    head += ["fused is", "operators", *(["launches"] if timed else []), "peak MB"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for provider, benchmark in providers.items():
        if isinstance(benchmark, str):
            rows.append([label(provider), benchmark] + [""] * (len(head) - 2))
            continue
        extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
        times = [digits(median * 1e3), digits(extra["work"] / median), utilisation(extra, median, result)]
        times += [digits(extra["paper_steps"] * median / 3600)]
        counts = [f"{extra['operators']:,}" if "operators" in extra else ""]
        counts += [f"{extra['launches']:,}" if "launches" in extra else ""] if timed else []
        ratio = f"{times_fused(benchmark):.2f}x as fast" if times_fused(benchmark) else ""
        cells = [*(times if timed else []), ratio, *counts, digits(extra["peak_bytes"] / 1e6)]
        rows.append([label(provider), *cells])
    return rows


def _cell(benchmark: dict | str | None) -> str:
    if benchmark is None or isinstance(benchmark, str):
        return benchmark or ""
    return f"{times_fused(benchmark):.2f}" if times_fused(benchmark) else ""


def update_readme(readme: Path = ROOT / "README.md", root: Path = ROOT) -> int:
    """Write the tables of benchmarks/results/*.json between the two comments in README.md."""
    found = files(root)
    text = readme.read_text() if readme.exists() else ""
    if not found or BEGIN not in text or END not in text.split(BEGIN)[1]:
        need = "python -m benchmarks first" if not found else f"the lines {BEGIN} and {END} in {readme}"
        print(f"report: needs {need}", file=sys.stderr)
        return 1
    sources = source_hash(root)
    made = [tables(read(file), sources) for file in found]
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text("\n\n".join([f"{before}{BEGIN}", *made, f"{END}{after}"]))
    return 0
