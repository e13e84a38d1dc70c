"""What `make gpu` found of each kernel: right or wrong, and how far from the error budget."""

from benchmarks.report.html import paragraph, section, table
from benchmarks.report.numbers import digits


def sentence(result: dict) -> str:
    """Return the verdict on all kernels in one sentence, nothing where a run has none."""
    checks = result.get("checks") or []
    if not checks:
        return ""
    wrong = sorted({f"{c['op']} ({c['implementation']}, {c['dtype']})" for c in checks if c["wrong"]})
    ran, every = sum(c["ran"] for c in checks), sum(c["examples"] for c in checks)
    worst = max((c for c in checks if "ratio" in c), key=lambda c: c["ratio"], default=None)
    said = f"Against the error budget: {ran - sum(len(c['wrong']) for c in checks)} of {every} examples right"
    if worst:
        of = f"{worst['op']}, {worst['dtype']}"
        said += f", the largest error {digits(worst['ratio'])} times what is allowed ({of})"
    return f"{said}; wrong: {', '.join(wrong)}." if wrong else f"{said}."


def kernels_checked(result: dict) -> str:
    """Show each op, implementation and dtype; nothing where a run has no checks."""
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
