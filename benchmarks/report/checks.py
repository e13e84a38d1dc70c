"""The checks of `make gpu`: whether each kernel is right, and its error relative to the error budget."""

from benchmarks.report.html import paragraph, section, table
from benchmarks.report.numbers import digits


def sentence(result: dict) -> str:
    """Return one sentence about the checks of all kernels, or an empty string for a run without checks."""
    checks = result.get("checks") or []
    if not checks:
        return ""
    wrong = sorted({f"{c['op']} ({c['implementation']}, {c['dtype']})" for c in checks if c["wrong"]})
    ran, every = sum(c["ran"] for c in checks), sum(c["examples"] for c in checks)
    worst = max((c for c in checks if "ratio" in c), key=lambda c: c["ratio"], default=None)
    said = f"Error budget: {ran - sum(len(c['wrong']) for c in checks)} of {every} examples right"
    if worst:
        of = f"{worst['op']}, {worst['dtype']}"
        said += f", the largest error {digits(worst['ratio'])} times the allowed error ({of})"
    return f"{said}; wrong: {', '.join(wrong)}." if wrong else f"{said}."


def kernels_checked(result: dict) -> str:
    """Return a table with one row per op, implementation and dtype; empty for a run without checks."""
    if not result.get("checks"):
        return ""
    cells = [
        [
            f"{c['op']}, {c['implementation']}",
            c["dtype"],
            f"{c['ran']} of {c['examples']}",
            digits(c["ratio"]) if "ratio" in c else "",
            f"wrong in {len(c['wrong'])}: {c['wrong'][0]['why']}" if c["wrong"] else "right",
        ]
        for c in result["checks"]
    ]
    head = ["kernel", "dtype", "examples", "worst error / allowed", "verdict"]
    return section(
        "Each kernel on this machine", paragraph(sentence(result)), table(head, cells, ("verdict",))
    )
