"""The training step on the page: ratios, what a step is, and where its time goes."""

from benchmarks.machine import DATASHEET
from benchmarks.providers import label
from benchmarks.report.charts import ratio_chart, spread_note
from benchmarks.report.html import paragraph, section, table
from benchmarks.report.losses import comparisons
from benchmarks.report.numbers import between, digits, times, utilisation
from benchmarks.report.runs import case, groups, kind, times_fused
from benchmarks.report.svg import Mark, Row, around, dots


def training_step(result: dict) -> str:
    title = "The training step"
    steps = {g: p for g, p in groups(result).items() if g.startswith("step, ")}
    if not steps:
        return section(title, paragraph("It was not timed in this run."))
    found = [c for c in comparisons(result) if c.group in steps]
    what = "Mask, generate, sample, discriminate, backward, clip, AdamW."
    parts = [paragraph(f"{what} {spread_note(found)}"), ratio_chart(found)]
    for group, providers in steps.items():
        parts += [f"<h4>{case(group).size}</h4>", _table(providers, result), *_components(providers)]
    return section(title, *parts)


def _table(providers: dict[str, dict | str], result: dict) -> str:
    cpu = "CPU " if kind(result) == "cpu" else ""  # a second of all threads together
    mfu = result["machine_info"]["device"] in DATASHEET
    head = ["provider", f"{cpu}ms", "p20 - p80", f"tokens / {cpu}s", f"{cpu}hours, paper's schedule"]
    head += [
        *(["MFU"] if mfu else []),
        "operators",
        *(["launches"] if not cpu else []),
        "peak MB",
        "fused is",
    ]
    rows = []
    for provider, benchmark in providers.items():
        if isinstance(benchmark, str):
            rows.append([label(provider), benchmark] + [""] * (len(head) - 2))
            continue
        extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
        row = [label(provider), digits(median * 1e3), between(extra), digits(extra["work"] / median)]
        row += [digits(extra["paper_steps"] * median / 3600)]
        row += [utilisation(extra, median, result)] if mfu else []
        counts = ("operators", *(["launches"] if not cpu else []))
        row += [digits(extra[name]) if name in extra else "" for name in counts]
        rows.append([*row, digits(extra["peak_bytes"] / 1e6), times(times_fused(benchmark))])
    return table(head, rows)


def _components(providers: dict[str, dict | str]) -> list[str]:
    """Return where the time of a step of ours goes, beside the least that each part takes."""
    charts = []
    for provider, benchmark in providers.items():
        parts = benchmark["extra_info"].get("components") if isinstance(benchmark, dict) else None
        if not parts:
            continue
        whole = sum(part["seconds"] for part in parts.values())
        rows = []
        for name, part in sorted(parts.items(), key=lambda item: -item[1]["seconds"]):
            ms, least = part["seconds"] * 1e3, part.get("bound")
            marks = [Mark(provider, ms, digits(ms), 0, ms)]
            marks += [Mark("roofline", least * 1e3, digits(least * 1e3))] if least else []
            rows.append(Row(name, f"{part['seconds'] / whole:.1%}", marks))
        axis = around("milliseconds of a step", [m.value for row in rows for m in row.marks], log=False)
        charts.append(f"<h4>Where its time goes ({label(provider)})</h4>{dots(rows, axis)}")
    return charts
