"""The training step on the page: ratios, figures of each provider, and the time of each component."""

from benchmarks.harness.providers import label
from benchmarks.report.charts import ratio_chart, spread_note
from benchmarks.report.html import paragraph, section, table
from benchmarks.report.losses import comparisons
from benchmarks.report.numbers import digits, provider_rows, step_columns, titles
from benchmarks.report.runs import case, groups
from benchmarks.report.svg import Mark, Row, around, dots


def training_step(result: dict) -> str:
    title = "The training step"
    steps = {g: p for g, p in groups(result).items() if g.startswith("step, ")}
    if not steps:
        return section(title, paragraph("It was not timed in this run."))
    found = [c for c in comparisons(result) if c.group in steps]
    what = "Mask, generate, sample, discriminate, backward, clip, AdamW."
    parts = [paragraph(f"{what} {spread_note(found)}"), ratio_chart(found)]
    columns = step_columns(result)
    for group, providers in steps.items():
        rows = provider_rows(providers, result, columns)
        numbers = table(["provider", *titles(columns, result)], rows)
        parts += [f"<h4>{case(group).size}</h4>", numbers, *_components(providers)]
    return section(title, *parts)


def _components(providers: dict[str, dict | str]) -> list[str]:
    """Return charts of the time of each component of our steps, with the bound of each."""
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
        charts.append(f"<h4>Time per component ({label(provider)})</h4>{dots(rows, axis)}")
    return charts
