"""The first screen of a machine's results: four questions, each answered by a figure and a sentence."""

import math
from html import escape

from benchmarks.harness.providers import OURS, label
from benchmarks.report.losses import Comparison, comparisons, losses
from benchmarks.report.numbers import digits, times
from benchmarks.report.runs import case, groups, kind, with_backward


def answers(result: dict) -> str:
    cards = [
        ("Is it fast here?", *fast(result)),
        ("Is it right?", *right(result)),
        ("What does it cost?", *cost(result)),
        ("Where do others win?", *others(result)),
    ]
    return f'<div class="answers">{"".join(_card(*card) for card in cards)}</div>'


def _card(question: str, figure: str, sentence: str) -> str:
    return f'<div><h3>{question}</h3><p class="figure">{escape(figure)}</p><p>{escape(sentence)}</p></div>'


def first_step(result: dict) -> tuple[str, dict[str, dict]] | None:
    """Return the group and the timed providers of the first step with a time of `fused`."""
    for group, providers in groups(result).items():
        timed = {p: b for p, b in providers.items() if isinstance(b, dict)}
        if group.startswith("step, ") and "fused" in timed:
            return group, timed
    return None


def fast(result: dict) -> tuple[str, str]:
    theirs = [c for c in comparisons(result) if c.provider not in OURS]
    ops = _over_all_ops(result, theirs)
    step = first_step(result)
    compared = [c for c in theirs if step and c.group == step[0]]
    if not compared:
        return ops[0], f"No other provider of a training step was timed. {ops[1]}"
    least, most = (choose(c.ratio for c in compared) for choose in (min, max))
    ratios = ", ".join(f"{c.ratio:.2f} times as fast as {label(c.provider)}" for c in compared)
    sentence = f"A training step ({case(step[0]).size}) is {ratios}. {ops[1]}"
    return f"{least:.2f} to {times(most)}", sentence


def _over_all_ops(result: dict, theirs: list[Comparison]) -> tuple[str, str]:
    whole = with_backward(result)
    plain = [c for c in theirs if c.provider == "torch" and c.group in whole and case(c.group).op != "step"]
    if not plain:
        return "not measured", "No op was timed together with plain PyTorch."
    mean = math.exp(sum(math.log(c.ratio) for c in plain) / len(plain))
    ahead = f"{sum(c.ratio > 1 for c in plain)} of {len(plain)} cases of single ops"
    sentence = f"{ahead} are faster than plain PyTorch; the geometric mean of the ratios is {mean:.2f}."
    return f"{times(mean)} torch", sentence


def worst(errors: dict[str, list[float]]) -> tuple[float, str]:
    """Return the largest ratio of an error to the allowed error, and the name of that result."""
    shares = [(error / allowed if allowed else 0.0, name) for name, (error, allowed) in errors.items()]
    return max(shares, default=(0.0, ""))


def right(result: dict) -> tuple[str, str]:
    wrong = len(result["wrong"])
    count = len(result["benchmarks"]) + wrong
    checked = "Before timing, each provider was compared with the definition in float64, patched models with "
    checked += f"unpatched ones; {wrong or 'none'} {'was' if wrong < 2 else 'were'} wrong."
    largest: dict[str, tuple[float, str, str]] = {}
    for extra in (benchmark["extra_info"] for benchmark in result["benchmarks"]):
        if extra.get("errors"):
            found = (*worst(extra["errors"]), extra["op"])
            largest[extra["provider"]] = max(largest.get(extra["provider"], found), found)
    figure = f"{wrong} of {count} wrong"
    if "fused" not in largest:
        return figure, f"{checked} These results do not contain the errors."
    share, name, op = largest["fused"]
    plain = f"; plain PyTorch's is {largest['torch'][0]:.0%}" if "torch" in largest else ""
    error = f"The largest error of fused is {share:.0%} of the allowed error ({op}, {name}){plain}."
    return figure, f"{checked} {error}"


def cost(result: dict) -> tuple[str, str]:
    step = first_step(result)
    if not step:
        return "not measured", "No training step was timed; memory and host time of the ops are shown below."
    group, providers = step
    peak = {p: digits(b["extra_info"]["peak_bytes"] / 1e6) for p, b in providers.items()}
    theirs = ", ".join(f"{label(p)} {peak[p]}" for p in peak if p not in OURS)
    rivals = f" ({theirs})" if theirs else ""
    fused = providers["fused"]
    hours = digits(fused["extra_info"]["paper_steps"] * fused["stats"]["median"] / 3600)
    unit = "hours of CPU time" if kind(result) == "cpu" else "hours"
    most = f"Peak memory of a step ({case(group).size}) without weights and averages{rivals}."
    schedule = f"At this rate the paper's whole schedule needs {hours} {unit}."
    return f"{peak['fused']} MB per step", f"{most} {schedule}"


def others(result: dict) -> tuple[str, str]:
    """Count the comparisons in which a provider of others is faster; `packed` and `eager` are ours."""
    theirs = [c for c in losses(result) if c.provider not in OURS]
    figure = f"{len(theirs)} of {sum(c.provider not in OURS for c in comparisons(result))}"
    if not theirs:
        return figure, "No other provider is faster than fused in any case."
    least: dict[str, float] = {}
    for c in theirs:
        least.setdefault(case(c.group).op, c.ratio)
    ops = ", ".join(f"{op} (down to {ratio:.2f})" for op, ratio in least.items())
    return figure, f"Comparisons in which another provider is faster: {ops}. A table below lists all."
