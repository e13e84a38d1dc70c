"""The command `python -m benchmarks scaling`: several processes here, and predictions for many GPUs."""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import roofline
from benchmarks.harness.machine import REACHED, ROOT
from benchmarks.report.numbers import digits
from benchmarks.scaling import failures, measure, memory, prediction
from benchmarks.scaling.prediction import GPUS, PER_NODE, PRESETS, Model, Network
from electra_fast.errors import must
from electra_fast.tables import text_table

PAGE = ROOT / "docs" / "scaling.md"
BEGIN = "<!-- scaling: made by `python -m benchmarks scaling --write` -->"
END = "<!-- /scaling -->"
GPU = "h200"
STEP_COLUMNS = ("GPUs", "sequences per GPU", "forward and backward, ms", "optimizer, ms", "all-reduce, ms")
STEP_COLUMNS += ("of it exposed, ms", "step, ms", "efficiency", "M tokens/s", "days", "step with ZeRO-1, ms")
MEMORY_COLUMNS = ("", "weights", "16-bit copies", "gradients", "averages", "activations", "total")
MEMORY_COLUMNS += ("with ZeRO-1 on 8 GPUs", "on 64 GPUs")
FAILURE_COLUMNS = ("GPUs", "failures per day", "minutes between checkpoints", "lost time")
Rows = list[list[str]]
Tabulate = Callable[[tuple[str, ...], Rows], str]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks scaling",
        description="Print the predicted step of the paper's batch on 1 to 1,024 GPUs, and a GPU's memory.",
    )
    default = Network()
    p.add_argument("--gpu", choices=REACHED, default=GPU, help=f"default: {GPU}")
    for name, where in (("nvlink", "in its node"), ("network", "to other nodes")):
        value = getattr(default, name) / 1e9
        help = f"GB/s that each GPU sends {where}; default: {value:g}"
        p.add_argument(f"--{name}", type=float, metavar="GB/s", default=value, help=help)
    here = "measure one and two processes of this machine instead"
    p.add_argument("--measure", action="store_true", help=here)
    p.add_argument("--steps", type=int, default=200, help="steps of such a run; default: 200")
    p.add_argument("--write", action="store_true", help="write the predictions into docs/scaling.md")
    return p


def ms(seconds: float) -> str:
    return digits(1e3 * seconds)


def step_rows(of: Model, gpu: str, network: Network) -> Rows:
    """Return a line of cells for each number of GPUs."""
    alone = prediction.step(of, 1, gpu, network).seconds
    rows = []
    for gpus in GPUS:
        step = prediction.step(of, gpus, gpu, network)
        if step is None:
            few = [f"{of.sequences / gpus:g}", "less than one sequence"]
            rows.append([str(gpus), *few, *[""] * (len(STEP_COLUMNS) - 3)])
            continue
        parts = (step.compute, step.optimizer, step.reduction, step.exposed, step.seconds)
        rate = of.sequences * of.length / step.seconds / 1e6
        days = of.steps * step.seconds / 86400
        cells = [*map(ms, parts), f"{alone / gpus / step.seconds:.0%}", digits(rate), digits(days)]
        zero = ms(memory.sharded(of, step, gpus, network)) if gpus > 1 else ""
        rows.append([str(gpus), str(step.sequences), *cells, zero])
    return rows


def memory_rows() -> Rows:
    """Return a line of cells, in GB, for each preset."""
    rows = []
    for of in map(prediction.model, PRESETS):
        whole = memory.memory(of, of.micro)
        shards = (memory.memory(of, of.micro, n).total for n in (8, 64))
        cells = [digits(x / 1e9) for x in (*whole, whole.total, *shards)]
        rows.append([f"{of.name}, {of.micro} sequences", *cells])
    return rows


def failure_rows(size: float) -> Rows:
    """Return a line of cells for each number of GPUs, with checkpoints of `size` bytes."""
    plans = [(gpus, failures.plan(gpus, size)) for gpus in failures.GPUS]
    return [
        [str(gpus), digits(plan.per_day), digits(plan.interval / 60), f"{plan.lost:.1%}"]
        for gpus, plan in plans
    ]


def text(gpu: str, network: Network, tabulate: Tabulate) -> str:
    """Return the predictions; `tabulate(columns, rows)` makes a table of them."""
    rates = f"{network.nvlink / 1e9:g} GB/s per GPU in a node and {network.network / 1e9:g} between nodes"
    parts = [f"**Predicted, not measured**, for {gpu}, {PER_NODE} per node: {rates}."]
    for of in map(prediction.model, PRESETS):
        reached, source = prediction.share(of.name, gpu)
        size = f"{of.parameters / 1e6:.1f} M parameters, {of.gradients / 1e6:.0f} MB of gradients"
        batch = f"{of.steps:,} steps".replace(",", " ") + f" of {of.sequences} sequences of {of.length}"
        parts += [
            f"**{of.name}**: {batch}, {size}; {reached:.0%} of the bound, by {source}.",
            tabulate(STEP_COLUMNS, step_rows(of, gpu, network)),
        ]
    parts += ["Memory of one GPU in GB:", tabulate(MEMORY_COLUMNS, memory_rows())]
    replicated, divided = (memory.largest(memory.CAPACITY[gpu], n) / 1e9 for n in (1, 64))
    saved = prediction.model("large").parameters * 3 * roofline.MASTER  # weights and averages
    parts += [
        f"This GPU is full at {digits(replicated)} billion parameters without any activation, and at "
        f"{digits(divided)} billion with ZeRO-1 on 64 GPUs.",
        f"Failures of a run of large, whose checkpoints have {saved / 1e9:.1f} GB:",
        tabulate(FAILURE_COLUMNS, failure_rows(saved)),
    ]
    return "\n\n".join(parts)


def plain(columns: tuple[str, ...], rows: Rows) -> str:
    return text_table([columns, *rows], right=range(len(columns)))


def markdown(columns: tuple[str, ...], rows: Rows) -> str:
    rule = ["---:"] * len(columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def write(page: Path = PAGE) -> None:
    """Write the predictions for the default options between the two comments of the page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    if not begin or END not in rest:
        raise ValueError(must(f"scaling: {page.name}", f"have the lines {BEGIN} and {END}", "none"))
    tables = text(GPU, Network(), markdown)
    page.write_text("\n\n".join([f"{before}{BEGIN}", tables, f"{END}{rest.partition(END)[2]}"]))


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    network = Network(options.nvlink * 1e9, options.network * 1e9)
    for name in ("nvlink", "network", "steps"):
        if not getattr(options, name) > 0:
            raise ValueError(must(f"scaling: --{name}", "be positive", getattr(options, name)))
    if options.measure:
        print(measure.table(measure.measure(options.steps)))
    elif options.write:
        if (options.gpu, network) != (GPU, Network()):
            raise ValueError(must("scaling: --write", "come without --gpu and rates", "other ones"))
        write()
    else:
        print(text(options.gpu, network, plain))
    return 0
