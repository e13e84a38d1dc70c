"""The JSON of a run, made from its lines, and the table that the terminal shows at the end."""

import json
import math
from pathlib import Path

from benchmarks.gpu.predictions import PREDICTED
from benchmarks.harness.providers import OURS, label
from benchmarks.report.numbers import digits
from benchmarks.report.runs import SCHEMA, times_fused
from electra_fast.tables import text_table

HEAD = ("kernel", "verdict", "error / budget", "size", "us", "predicted (H200)", "share of bound")
HEAD += ("compared with the best rival",)


def assemble(found: list[dict], seconds: float) -> dict:
    """Return a run for `benchmarks.report`, with the additional parts that only `make gpu` measures."""
    machine = next((line for line in found if line["kind"] == "machine"), {})
    run = {
        "machine_info": machine.get("machine_info", {}),
        "commit_info": machine.get("commit_info", {}),
        "datetime": machine.get("datetime", ""),
        "schema": SCHEMA,
        "budget": sum(line.get("budget", 0.0) for line in of(found, "machine")),
        "seconds": seconds,
        "benchmarks": [line["benchmark"] for line in of(found, "benchmark")],
        "wrong": [],
        "fails": [],
        "dropped": [],
        "stages": [_without(line, "kind", *["tail"] * (line["rc"] == 0)) for line in of(found, "end")],
        "checks": checks(found),
        "capture": [_without(line, "kind", "stage") for line in of(found, "capture")],
        "pretrain": [_without(line, "kind", "stage") for line in of(found, "pretrain")],
        "tests": [_without(line, "kind", "stage") for line in of(found, "test")],
    }
    for line in of(found, "refused"):
        run[line["word"]].append(line["line"])
    return run


def of(found: list[dict], kind: str) -> list[dict]:
    """Return the lines of a kind, without those of torch.compile's warm-up."""
    return [line for line in found if line["kind"] == kind and not line.get("stage", "").startswith("warm")]


def _without(line: dict, *names: str) -> dict:
    return {k: v for k, v in line.items() if k not in names}


def checks(found: list[dict]) -> list[dict]:
    """Return one row per op, implementation and dtype: examples, wrong examples, the worst ratio.

    `ran` is less than `examples` if the stage ended early.
    """
    rows: dict[tuple, dict] = {}
    for line in of(found, "check"):
        key = {name: line[name] for name in ("op", "implementation", "dtype")}
        row = rows.setdefault(
            tuple(key.values()), key | {"examples": line["examples"], "ran": 0, "wrong": []}
        )
        row["ran"] += 1
        if not line["right"]:
            row["wrong"].append({"example": line["example"], "ratio": line["ratio"], "why": line["why"]})
        if line["ratio"] is not None and line["ratio"] >= row.get("ratio", 0.0):
            row |= {"ratio": line["ratio"], "worst": line.get("worst", "")}
    return list(rows.values())


def kernels(run: dict) -> list[list[str]]:
    """Return one row per op and implementation, with its time if it serves the op; further sizes get more."""
    timed: dict[str, dict[str, dict]] = {}
    for benchmark in run["benchmarks"]:
        extra = benchmark["extra_info"]
        if extra["passes"] == "forward+backward" or extra["op"].endswith("_tokens"):
            timed.setdefault(extra["op"], {}).setdefault(extra["size"], {})[extra["provider"]] = benchmark
    found: dict[tuple[str, str], list[dict]] = {}
    for row in run["checks"]:
        found.setdefault((row["op"], row["implementation"]), []).append(row)
    rows = []
    for op in timed:  # part of a run may time an op without checking it
        if op != "step" and not any(key[0] == op for key in found):
            found[op, served(timed[op])] = []
    for (op, implementation), checked in found.items():
        wrong = sum(len(row["wrong"]) for row in checked)
        ran, rest = sum(r["ran"] for r in checked), sum(r["examples"] - r["ran"] for r in checked)
        verdict = f"WRONG in {wrong} of {ran}" if wrong else f"right in {ran}" if ran else "not checked"
        verdict += f", {rest} not run" if rest else ""
        ratios = [row["ratio"] for row in checked if "ratio" in row]
        unbounded = any(fault["ratio"] is None for row in checked for fault in row["wrong"])
        worst = math.inf if unbounded else max(ratios, default=None)
        cells = [f"{op}, {implementation}", verdict]
        cells.append("" if worst is None else f"{worst:.2f}" if worst < 100 else f"{worst:.0e}")
        sizes = [
            [size, *times(providers["fused"], providers)]
            for size, providers in timed.get(op, {}).items()
            if "fused" in providers and served({size: providers}) == implementation
        ]
        for numbers in sizes or [[]]:
            rows.append([*cells, *numbers, *[""] * (len(HEAD) - len(cells) - len(numbers))])
            cells = ["", "", ""]
    return rows


def served(sizes: dict[str, dict]) -> str:
    """Return the implementation that serves an op, from the first size at which `fused` was timed."""
    timed = [providers["fused"]["extra_info"] for providers in sizes.values() if "fused" in providers]
    kind = timed[0]["implementation"] if timed else "reference"
    return "PyTorch" if kind == "reference" else kind


def times(fused: dict, providers: dict[str, dict]) -> list[str]:
    """Return microseconds, the prediction, the share of the bound, and the ratio to the fastest rival."""
    median, bound = fused["stats"]["median"], fused["extra_info"].get("bound")
    predicted = PREDICTED.get((fused["extra_info"]["op"], fused["extra_info"]["size"]))
    others = {p: b for p, b in providers.items() if p not in (*OURS, "reference") and times_fused(b)}
    best = min(others, key=lambda p: times_fused(others[p]), default=None)
    return [
        digits(median * 1e6),
        digits(predicted) if predicted else "",
        f"{bound / median:.0%}" if bound else "",
        f"{times_fused(others[best]):.2f}x {label(best)}" if best else "",
    ]


def steps(run: dict) -> list[str]:
    """Return one line per training step: milliseconds, tokens per second, and the ratio to each provider."""
    found: dict[str, dict[str, dict]] = {}
    for benchmark in run["benchmarks"]:
        extra = benchmark["extra_info"]
        if extra["op"] == "step":
            found.setdefault(extra["size"], {})[extra["provider"]] = benchmark
    said = []
    for size, providers in found.items():
        if (fused := providers.get("fused")) is None:
            continue
        median, work = fused["stats"]["median"], fused["extra_info"]["work"]
        ratios = [f"{times_fused(b):.2f}x {label(p)}" for p, b in providers.items() if times_fused(b)]
        rate = f"{digits(median * 1e3)} ms, {digits(work / median)} tokens/s"
        predicted = PREDICTED.get(("step", size))
        rate += f" (predicted {digits(predicted / 1e3)} ms)" if predicted else ""
        said.append(f"step {size}: {rate}; {', '.join(ratios) or 'no rival was timed'}")
    return said


def candidates(run: dict) -> list[str]:
    """Return one line per case of a candidate: its time, and the time of what it would replace over that."""
    found = [b for b in run["benchmarks"] if b["extra_info"]["provider"] == "candidate" and times_fused(b)]
    return [
        f"candidate {b['group']}: {digits(b['stats']['median'] * 1e6)} us, {1 / times_fused(b):.2f}x as fast"
        for b in found
    ]


def summary(run: dict) -> str:
    """Return the final output: the kernels, the steps, other measurements, and what failed."""
    said = [text_table([HEAD, *kernels(run)]), "", *steps(run), *candidates(run)]
    chosen = {
        f"{b['extra_info']['op']} {b['extra_info']['size']}: {b['extra_info']['backend']}"
        for b in run["benchmarks"]
        if b["extra_info"]["provider"] == "torch" and "backend" in b["extra_info"]
    }
    if chosen:
        cudnn = run["machine_info"].get("cudnn")
        said.append(f"SDPA's default backend: {'; '.join(sorted(chosen))} (cuDNN {cudnn})")
    for c in run["capture"]:
        if "equal" in c:
            said.append(f"graph equal to eager bit for bit: {c['equal']} (eager to eager: {c['repeatable']})")
    if trained := [line["loss"] for line in run["pretrain"] if "loss" in line]:
        first, last = ("not finite" if x is None else f"{x:.3f}" for x in (trained[0], trained[-1]))
        said.append(f"pretrain: {len(trained)} lines of the log, loss {first} to {last}")
    if counted := [line["counts"] for line in run["tests"] if "counts" in line]:
        said.append("tests: " + ", ".join(f"{n} {name}" for name, n in sorted(counted[-1].items())))
    said += [f"{word}: {line}" for word in ("wrong", "fails") for line in run[word]]
    for stage in run["stages"]:
        if stage["rc"] != 0:
            code_and_output = [f"exit code {stage['rc']}", *stage.get("tail", [])[-1:]]
            said.append(f"stage {stage['stage']}: {stage['why'] or ', '.join(code_and_output)}")
    return "\n".join(said)


def write(found: list[dict], target: Path, seconds: float) -> dict:
    """Write the JSON of a run atomically; return it."""
    run = assemble(found, seconds)
    part = target.with_suffix(".part")
    part.write_text(json.dumps(run, indent=1))
    part.replace(target)
    return run
