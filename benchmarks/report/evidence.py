"""The evidence on the page: where others win, memory, errors, every number, the machine."""

from benchmarks.harness.providers import OURS, label
from benchmarks.report.answers import worst
from benchmarks.report.charts import names, share_chart
from benchmarks.report.html import folded, items, paragraph, section, table
from benchmarks.report.losses import comparisons, losses
from benchmarks.report.numbers import digits, provider_rows, times, titles
from benchmarks.report.runs import groups, kind, with_backward
from benchmarks.report.svg import Mark, Row, around, dots


def where_others_win(result: dict) -> str:
    """Return the table of lost comparisons, or a sentence if there are none. The section is always shown."""
    title = "Where others win"
    found, count = losses(result), len(comparisons(result))
    if not found:
        return section(title, paragraph(f"Another provider is faster in none of {count} comparisons."))
    rows = []
    for c in found:
        spread = f"{c.spread[0]:.2f} - {c.spread[1]:.2f}" if c.spread else ""
        rows.append([c.group, label(c.provider), times(c.ratio), spread, digits(c.seconds * 1e3), c.why])
    ours = f", {sum(c.provider in OURS for c in found)} of them with other forms of ours"
    note = f"{len(found)} of {count} comparisons{ours}; the largest loss first. Below 1 the other is faster."
    head = ["case", "provider", "fused is", "p20 - p80", "ms", "why"]
    return section(title, paragraph(note), table(head, rows, ("provider", "why")))


def memory(result: dict) -> str:
    title = "Memory and host time"
    peak: list[Row] = []
    host: list[Row] = []
    for group, providers in with_backward(result).items():
        timed = [
            (p, b["extra_info"]) for p, b in providers.items() if isinstance(b, dict) and p != "reference"
        ]
        for rows, name, factor in ((peak, "peak_bytes", 1e-6), (host, "host", 1e6)):
            values = {p: extra[name] * factor for p, extra in timed if extra[name] > 0}  # a logarithmic axis
            marks = [Mark(p, value, digits(value)) for p, value in values.items()]
            rows += [Row(*names(group), marks)] if marks else []
    if not peak:
        return section(title, paragraph("Nothing was timed in this run."))

    def chart(rows: list[Row], unit: str) -> str:
        return dots(rows, around(f"{unit} (logarithmic)", [m.value for row in rows for m in row.marks]))

    what = "wall time of a call" if kind(result) == "cpu" else "time until a call returns to the host"
    note = "Peak memory is the memory that PyTorch's allocator held during one call, minus that before it. "
    note += "Calls that allocate nothing there are left out, such as those of another process."
    folds = folded(f"Host: {what}", chart(host, f"microseconds, {what}"))
    return section(title, paragraph(note), chart(peak, "peak MB"), folds)


def errors(result: dict) -> str:
    """Return the errors that the gate measured before timing, of fused and of plain PyTorch."""
    title = "Error and allowed error"
    shares, cells = {}, []
    for group, providers in with_backward(result).items():
        of = {p: b["extra_info"].get("errors") for p, b in providers.items() if isinstance(b, dict)}
        known = {p: worst(found)[0] for p, found in of.items() if found}
        shares |= {group: known} if known else {}
        for quantity, (error, allowed) in (of.get("fused") or {}).items():
            own = (of.get("torch") or {}).get(quantity)
            row = [", ".join(names(group)), quantity, f"{error:.1e}", f"{own[0]:.1e}" if own else ""]
            cells.append([*row, f"{allowed:.1e}", f"{error / allowed:.1%}" if allowed else ""])
    if not shares:
        return section(title, paragraph("These results do not contain the errors."))
    note = (
        "The largest difference from the definition in float64, over results and gradients, without dropout. "
        "A provider above 100% gets no number. The allowed error is four times the error of the definition "
        "in the timed dtype, plus some roundings (benchmarks/harness/gate.py). Integers must be equal."
    )
    head = ["case", "result", "fused", "torch", "allowed", "fused / allowed"]
    each = folded("Each result", table(head, cells, ("result",)))
    return section(title, paragraph(note), share_chart(shares, "the allowed error", "wrong: no number"), each)


def everything(result: dict) -> str:
    columns = ["ms", "p20 - p80", "rounds", "host us", "rate, share of bound", "peak MB", "fused is"]
    columns.append("served by")
    head = ["case", "provider", *titles(columns, result)]
    rows = [
        [group, *row]
        for group, providers in groups(result).items()
        for row in provider_rows(providers, result, columns)
    ]
    numbers = folded(f"{len(result['benchmarks'])} numbers", table(head, rows, ("provider", "served by")))
    without = [f"{word}: {line}" for word in ("wrong", "fails", "dropped") for line in result[word]]
    missing = items(without) if without else paragraph("No provider was wrong, failed or was dropped.")
    return section("Everything", numbers, "<h4>Providers without a number</h4>", missing)


def environment(result: dict) -> str:
    m, commit = result["machine_info"], result.get("commit_info") or {}
    names = ("device_name", "threads", "cpu_capability", "torch", "triton", "cuda", "cudnn", "transformers")
    facts = [
        [name.replace("_", " "), str(m[name])] for name in (*names, "clocks", "python_version") if m.get(name)
    ]
    facts += [["measured", result["datetime"][:19].replace("T", " ")]]
    dirty = ", with uncommitted changes" if commit.get("dirty") else ""
    facts += [["commit", f"{commit['id'][:12]}{dirty}"]] if commit.get("id") else []
    facts += [["SHA-256 of the kernels", m["sources"]]]
    return section("The machine", table(["", "value"], facts, ("value",)))
