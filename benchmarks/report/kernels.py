"""The section of the page on the compiled kernels. It does not depend on a machine, so it is the last one."""

from benchmarks.harness.machine import slug
from benchmarks.report.html import folded, paragraph, section, table
from benchmarks.report.svg import Stack, stacks
from benchmarks.static import gpus, summary

KERNELS = "The compiled kernels"
FIRST = 90  # the GPU for which the kernels were written
COLOURS = {"tensor": "blue", "mufu": "vermilion", "float": "green", "integer": "orange"}
COLOURS |= {"shared": "purple", "global": "sky", "other": "grey"}
NOTE = (
    "Compiled without a GPU; the tests check every figure exactly. A bar shows a kernel's instructions by "
    "the unit that executes them: tensor cores, MUFU (exponentials), arithmetic, shared and global memory. "
    "The text next to it names the longest wait of the main loop and the lowest occupancy of the variants. "
    "These figures compare two versions of a kernel; they do not predict times (benchmarks/static/gpus.py)."
)


def kernels(committed: dict) -> str:
    """Return the article about the committed figures: a chart of one GPU, and a table per GPU."""
    versions = ", ".join(f"{name} {version}" for name, version in committed["compilers"].items())
    by_gpu = {arch: [row for row in committed["rows"] if row["arch"] == arch] for arch in gpus.GPUS}
    first = by_gpu.pop(FIRST)
    others = [folded(name(arch), figures_of(rows)) for arch, rows in by_gpu.items()]
    return (
        f'<article id="{slug(KERNELS)}"><h2>{KERNELS}</h2>{paragraph(versions, "when")}'
        f"{section(name(FIRST), paragraph(NOTE), mix(first), folded('Each kernel', figures_of(first)))}"
        f"{section('Other GPUs', paragraph(spills(committed['rows'])), *others)}</article>"
    )


def name(arch: int) -> str:
    return f"sm_{arch}, {gpus.GPUS[arch].name}"


def mix(rows: list[dict]) -> str:
    bars = []
    for line in sorted(summary.lines(rows), key=lambda line: line.name):
        bound, _ = gpus.bound(line.heaviest)
        bars.append(Stack(line.name, line.mix(), f"{bound}, {line.occupancy}%"))
    return stacks(bars, COLOURS, "share of the instructions; longest wait, occupancy")


def figures_of(rows: list[dict]) -> str:
    return table(summary.HEAD, [line.cells() for line in summary.lines(rows)])


def spills(rows: list[dict]) -> str:
    spilling = [row for row in rows if row["spill_bytes"]]
    kinds = sorted({f"{row['kernel']} in {row['variant'].split(',')[0]}" for row in spilling})
    which = f": {', '.join(kinds)}" if kinds else ""
    return f"Of {len(rows)} compiled kernels {len(spilling)} spill registers{which}."
