"""Tables from the JSON of a run: one for the terminal, a small one in Markdown for README.md."""

import collections
import json
import sys
from pathlib import Path

from benchmarks.machine import DATASHEET, ROOT, source_hash

BEGIN = "<!-- benchmarks: made by `python -m benchmarks report` -->"
END = "<!-- /benchmarks -->"
LABELS = {
    "compile": "torch.compile",
    "compile_max": "torch.compile, max-autotune",
    "huggingface": "Hugging Face",
    "huggingface_compile": "Hugging Face, compiled",
    "eager": "fused, no graph",
    "linear_ce": "F.linear_cross_entropy",
    "linear_ce_chunked": "F.linear_cross_entropy, chunked",
    "liger": "Liger",
    "cce": "cut-cross-entropy",
    "sdpa_flash": "SDPA, flash",
    "sdpa_efficient": "SDPA, efficient",
    "sdpa_cudnn": "SDPA, cuDNN",
    "sdpa_math": "SDPA, math",
    "flex": "FlexAttention",
    "flash_attn": "flash-attn",
}
RIVALS = ("linear_ce_chunked", "linear_ce", "liger", "cce")
RIVALS += ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "sdpa_math", "flex", "flash_attn")
COMPILED = ("compile", "compile_max", "huggingface_compile")
LATE = (*RIVALS, *COMPILED)  # timed after all others, each beside fused alone
ORDER = ["fused", "eager", "packed", "torch", "compile", "compile_max", "huggingface", "huggingface_compile"]
ORDER += [*RIVALS, "reference"]
COLUMNS = ["provider", "ms", "p20 - p80", "host us", "rate, of the bound", "peak MB", "fused is"]
BASIS = {
    "cpu": "Milliseconds and rates by CPU time, of all threads together.",
    "cuda": "Milliseconds and rates by events around graph replays, with a cold L2.",
}


def digits(x: float) -> str:
    """Return x with the three digits that count, without an exponent."""
    for places, limit in ((3, 1), (2, 10), (1, 100)):
        if x < limit:
            return f"{x:.{places}f}"
    return f"{x:,.0f}".replace(",", " ")


def rate(extra: dict, seconds: float) -> str:
    """Return the declared work over the time, in a unit that reads well, and the share of what can be had."""
    value, unit = extra["work"] / seconds, extra["unit"]
    if unit == "tokens/s":
        return f"{digits(value)} tokens/s"
    share = f", {extra['bound'] / seconds:.0%}" if extra.get("bound") else ""
    for factor, letter in ((1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{digits(value / factor)} {letter}{unit}{share}"
    return f"{digits(value / 1e6)} M{unit}{share}"


def groups(result: dict) -> dict[str, dict[str, dict | str]]:
    """Return by group and provider a benchmark, or the word that stands in its place."""
    found: dict[str, dict[str, dict | str]] = {}
    for benchmark in result["benchmarks"]:
        found.setdefault(benchmark["group"], {})[benchmark["extra_info"]["provider"]] = benchmark
    for word in ("wrong", "fails"):
        for line in result[word]:
            group, _, provider = line.split(": ")[0].rpartition(", ")
            if provider in ORDER:
                found.setdefault(group, {})[provider] = word
    return {g: {p: found[g][p] for p in ORDER if p in found[g]} for g in found}


def times_fused(benchmark: dict) -> float | None:
    """Return this provider's time over that of fused, both measured in the same rounds."""
    ratio = benchmark["extra_info"]["ratio"]
    return 1 / ratio["fused"] if "fused" in ratio else None


def faster_than(provider: str, benchmark: dict) -> str:
    """Say how many times as fast fused is; beside a late provider it was timed again."""
    times = times_fused(benchmark)
    if times is None:
        return ""
    then = f" (then {digits(benchmark['stats']['median'] / times * 1e3)})" if provider in LATE else ""
    return f"{times:.2f}x as fast{then}"


def row(provider: str, benchmark: dict | str) -> list[str]:
    label = LABELS.get(provider, provider)
    if isinstance(benchmark, str):
        return [label, benchmark] + [""] * (len(COLUMNS) - 2)
    extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
    return [
        f"{label}, no baseline" if extra.get("no_baseline") else label,
        digits(median * 1e3),
        f"{digits(extra['p20'] * 1e3)} - {digits(extra['p80'] * 1e3)}",
        digits(extra["host"] * 1e6),
        rate(extra, median),
        digits(extra["peak_bytes"] / 1e6),
        faster_than(provider, benchmark),
    ]


def kind(result: dict) -> str:
    return "cpu" if result["machine_info"]["device"] == "cpu" else "cuda"


def headline(result: dict) -> str:
    """Return the device, the date and the version of torch."""
    m = result["machine_info"]
    on_cpu = f" ({m['threads']} threads, {m['cpu_capability']})" if kind(result) == "cpu" else ""
    return f"{m['device_name']}{on_cpu}, {result['datetime'][:10]}, torch {m['torch']}"


def table(result: dict) -> str:
    """Return the whole run as text: its cases, what has no number, and why."""
    found = groups(result)
    rows = {group: [row(p, b) for p, b in providers.items()] for group, providers in found.items()}
    head = [c.replace("host", "wall") if kind(result) == "cpu" else c for c in COLUMNS]
    columns = zip(head, *(cells for group in rows.values() for cells in group), strict=True)
    widths = [max(map(len, column)) for column in columns]

    def line(cells: list[str]) -> str:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        return ("  " + f"{cells[0]:<{widths[0]}}  " + "  ".join(list(aligned)[1:])).rstrip()

    lines = [headline(result), BASIS[kind(result)], "", line(head)]
    for group, its_rows in rows.items():
        lines += ["", group, *map(line, its_rows)]
    return "\n".join([*lines, "", *endings(result)])


def endings(result: dict) -> list[str]:
    """Return what is wrong, how the times were taken if not all alike, and what was dropped."""
    lines = [f"{word}: {line}" for word in ("wrong", "fails") for line in result[word]]
    plain = {b["extra_info"]["op"] for b in result["benchmarks"] if _is_plain(b["extra_info"])}
    lines += components(result)
    lines += (
        [f"without a kernel here, so that fused is plain PyTorch: {', '.join(sorted(plain))}"]
        if plain
        else []
    )
    ways = collections.Counter(b["extra_info"]["how"] for b in result["benchmarks"])
    lines += [f"{count} by {way}" for way, count in ways.items()] if len(ways) > 1 else []
    if result["dropped"]:
        lines.append(f"dropped, with {result['budget']:.0f} s to spend:")
        lines += [f"  {line}" for line in result["dropped"]]
    return [*lines, f"{len(result['benchmarks'])} numbers in {result['seconds']:.0f} s"]


def _is_plain(extra: dict) -> bool:
    return (extra["served_by"] or "").startswith("reference")


def markdown(result: dict, sources: str) -> str:
    """Return one device's table: a row a case, how many times as fast `fused` is as each provider.

    Times are given for GPUs alone: a CPU's say more about the machine than about the kernels.
    """
    found = groups(result)
    rivals = [p for p in ORDER[1:-1] if any(p in providers for providers in found.values())]
    timed = kind(result) == "cuda"
    head = ["fused is this many times as fast as", "", *(["fused, ms"] if timed else [])]
    head += [LABELS.get(p, p) for p in rivals]
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for group, providers in found.items():
        op, size = group.split(", ", 1)
        size, passes = size.rsplit(", ", 1)  # a size's name may have commas
        if passes == "forward" and f"{op}, {size}, forward+backward" in found:
            continue
        fused = providers.get("fused", "")
        ms = fused if isinstance(fused, str) else digits(fused["stats"]["median"] * 1e3)
        name = "**training step**" if op == "step" else op
        rows.append([name, size, *([ms] if timed else []), *(_cell(providers.get(p)) for p in rivals)])
    stale = "" if result["machine_info"]["sources"] == sources else " (kernels changed since)"
    lines = [f"**{headline(result)}**{stale}", "", *(f"| {' | '.join(cells)} |" for cells in rows)]
    basis = BASIS["cuda"] if timed else "By CPU time, of all threads together."
    lines += ["", f"{basis} Ops with their backward, where they have one."]
    steps = {group: providers for group, providers in found.items() if group.startswith("step, ")}
    for group, providers in steps.items():
        lines += ["", *(f"| {' | '.join(cells)} |" for cells in step_table(group, providers, result))]
    return "\n".join(lines)


def step_table(group: str, providers: dict[str, dict | str], result: dict) -> list[list[str]]:
    """Return what one wants to know of a step of each provider; absolute times are a GPU's alone."""
    size = group.removeprefix("step, ").removesuffix(", step")
    timed = kind(result) == "cuda"
    head = [f"training step, {size}", *(["ms", "tokens/s", "MFU", "hours, paper"] if timed else [])]
    head += ["fused is", "operators", *(["launches"] if timed else []), "peak MB"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for provider, benchmark in providers.items():
        if isinstance(benchmark, str):
            rows.append([LABELS.get(provider, provider), benchmark] + [""] * (len(head) - 2))
            continue
        extra, median = benchmark["extra_info"], benchmark["stats"]["median"]
        times = [digits(median * 1e3), digits(extra["work"] / median), utilisation(extra, median, result)]
        times += [digits(extra["paper_steps"] * median / 3600)]
        counts = [f"{extra['operators']:,}" if "operators" in extra else ""]
        counts += [f"{extra['launches']:,}" if "launches" in extra else ""] if timed else []
        ratio = f"{times_fused(benchmark):.2f}x as fast" if times_fused(benchmark) else ""
        cells = [*(times if timed else []), ratio, *counts, digits(extra["peak_bytes"] / 1e6)]
        rows.append([LABELS.get(provider, provider), *cells])
    return rows


def utilisation(extra: dict, seconds: float, result: dict) -> str:
    """Return model FLOPs utilisation: the products of the mathematics over the datasheet's peak."""
    peak = DATASHEET.get(result["machine_info"]["device"])
    return f"{extra['flops'] / seconds / peak:.0%}" if peak else ""


def components(result: dict) -> list[str]:
    """Return where the time of a step of ours goes, beside what the roofline asks for each part."""
    lines = []
    for benchmark in result["benchmarks"]:
        parts = benchmark["extra_info"].get("components", {})
        whole = sum(part["seconds"] for part in parts.values())
        lines += [
            f"{benchmark['group']}, {benchmark['extra_info']['provider']}, where its time goes:"
        ] * bool(parts)
        for name, part in sorted(parts.items(), key=lambda item: -item[1]["seconds"]):
            least = f", at least {digits(part['bound'] * 1e3)}" if part.get("bound") else ""
            share = f"{part['seconds'] / whole:.1%}"
            lines.append(f"  {name:14} {digits(part['seconds'] * 1e3):>7} ms {share:>6}{least}")
    return lines


def _cell(benchmark: dict | str | None) -> str:
    if benchmark is None or isinstance(benchmark, str):
        return benchmark or ""
    return f"{times_fused(benchmark):.2f}" if times_fused(benchmark) else ""


def results(root: Path = ROOT) -> list[Path]:
    """Return the runs' files, one a device; learning.json has a page of its own."""
    return sorted(f for f in (root / "benchmarks" / "results").glob("*.json") if f.stem != "learning")


def update_readme(readme: Path = ROOT / "README.md", root: Path = ROOT) -> int:
    """Write the tables of benchmarks/results/*.json between the two comments in README.md."""
    files = results(root)
    text = readme.read_text() if readme.exists() else ""
    if not files or BEGIN not in text or END not in text.split(BEGIN)[1]:
        need = "python -m benchmarks first" if not files else f"the lines {BEGIN} and {END} in {readme}"
        print(f"report: needs {need}", file=sys.stderr)
        return 1
    sources = source_hash(root)
    tables = [markdown(json.loads(file.read_text()), sources) for file in files]
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text("\n\n".join([f"{before}{BEGIN}", *tables, f"{END}{after}"]))
    return 0
