"""The section of LEARNING.md about `benchmarks/learning/equal_compute.py`, and its picture."""

import math
from typing import Any

from benchmarks.learning.numbers import auc, below_or_above, interval, mean_and_error, verb, with_error
from benchmarks.learning.panels import Panel, by_tokens, drawn
from benchmarks.learning.transfer import NEW_WEIGHTS, TASKS
from benchmarks.report import svg

TITLES = {"fused": "ELECTRA", "masked": "masked LM"}
COLOURS = {"fused": "blue", "masked": "vermilion"}
PROBES = {"sentiment": "GoEmotions, frozen, linear", "pairs": "BLiMP, zero-shot"}


def section(found: dict[str, Any], picture: str) -> list[str]:
    """Return the section; `picture` is the address of the picture."""
    electra, masked = (found["models"][name] for name in TITLES)
    tokens = electra["curve"][-1]["tokens"]
    lines = [
        f"## ELECTRA and a masked language model at equal FLOPs: preset {found['preset']}",
        "",
        f"{tokens / 1e6:.0f} million tokens for ELECTRA, {electra['steps']:,} steps of "
        f"{found['batch_tokens']:,}, in sequences of {found['seq']}; {masked['steps']:,} steps for a masked "
        f"language model of the discriminator's size, because a sequence needs {electra['flops'] / 1e6:.0f} "
        f"MFLOP in ELECTRA and {masked['flops'] / 1e6:.0f} in that model. The text has "
        f"{electra['train_tokens']:,} tokens, the vocabulary {electra['vocabulary']:,} pieces; "
        f"rate {found['lr']:g}, {found['precision']}, {', '.join(found['set']) or 'no changes'}; one seed. "
        f"Trained on {found['machine']} with torch {found['torch']} in {electra['seconds'] / 60:.0f} and "
        f"{masked['seconds'] / 60:.0f} minutes (`python -m benchmarks.learning.equal_compute`).",
        "",
        f"![curves]({picture})",
        "",
        *_training(electra, masked),
    ]
    if _has_probes(found):
        lines += ["", *_probes(found["models"])]
    if found.get("tasks"):
        lines += ["", *_tasks(found)]
    if missing := found.get("left_out"):
        lines += ["", f"Not measured: {'; '.join(f'{name} ({why})' for name, why in missing.items())}."]
    return lines


def _has_probes(found: dict[str, Any]) -> bool:
    """Return whether both models have probes, for which the time on a GPU may not suffice."""
    return all("probes" in found["models"][name] for name in TITLES)


def _training(run: dict[str, Any], masked: dict[str, Any]) -> list[str]:
    lines = [
        "| million tokens | MLM loss of the generator | accuracy | RTD loss | AUC of the discriminator | "
        "MLM loss of the masked LM at equal FLOPs |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p, other in zip(run["curve"], masked["curve"], strict=True):
        losses = f"{p['mlm_loss']:.3f} | {p['mlm_accuracy']:.3f} | {p['rtd_loss']:.4f}"
        lines.append(f"| {p['tokens'] / 1e6:.1f} | {losses} | {auc(p)} | {other['mlm_loss']:.3f} |")
    half, end = next(p for p in run["curve"] if p["step"] >= run["steps"] / 2), run["curve"][-1]
    change, level = end["auc"] - half["auc"], run["loss_without_context"]
    error = math.hypot(*((p["auc_high"] - p["auc_low"]) / 2 for p in (half, end)))
    return [
        *lines,
        "",
        f"- The MLM loss of the generator is {below_or_above(end['mlm_loss'] - level)} the loss without "
        f"context, {level:.3f} nats.",
        f"- In the second half the AUC {verb(change, error)}: {change:+.3f} (95 % interval ± {error:.3f}).",
    ]


def _probes(models: dict[str, dict[str, Any]]) -> list[str]:
    curves = {name: models[name]["probes"]["curve"] for name in TITLES}
    titles = [f"{PROBES[probe]}: {TITLES[name]}" for probe in PROBES for name in TITLES]
    lines = [f"| share of the run | {' | '.join(titles)} |", f"| ---: |{' ---: |' * len(titles)}"]
    for points in zip(*curves.values(), strict=True):
        share = points[0]["step"] / curves["fused"][-1]["step"]
        cells = [interval(point[probe]) for probe in PROBES for point in points]
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    words, majority = (models["fused"]["probes"][f"sentiment_{name}"] for name in ("words", "majority"))
    return [
        *lines,
        "",
        f"On GoEmotions a bag of words has {interval(words)}, and the most frequent label "
        f"{max(majority, 1 - majority):.3f}. At 0 % the weights are new.",
    ]


def _tasks(found: dict[str, Any]) -> list[str]:
    starts = [*TITLES, NEW_WEIGHTS]
    lines = [
        "| fine-tuned | metric | ELECTRA | masked LM | new weights | bag of words | most frequent | "
        "ELECTRA - masked LM | ELECTRA - new weights |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    for name, task in TASKS.items():
        runs = [run for run in found["tasks"] if run["task"] == name]
        if not runs:
            continue
        values = {start: [run["value"] for run in runs if run["start"] == start] for start in starts}
        means = [mean_and_error(values[start]) for start in starts]
        cells = [with_error(*each) for each in means]
        cells += [f"{found['words'][name]:.3f}", f"{runs[0]['majority']:.3f}"]
        cells += [_difference(means[0], other) for other in means[1:]]
        lines.append(f"| {task.title} | {runs[0]['metric']} | {' | '.join(cells)} |")
    seeds = len({run["seed"] for run in found["tasks"]})
    note = f"{seeds} seeds; ± is one standard error. **Bold**: a difference of more than two of them"
    return [*lines, "", f"{note}, which with few seeds is less than 95 % confidence."]


def _difference(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Return the difference of two means with its error, in bold if it is more than two standard errors."""
    change, error = first[0] - second[0], math.hypot(first[1], second[1])
    if math.isnan(change):
        return ""
    text = f"{change:+.3f}" if math.isnan(error) else f"{change:+.3f} ± {error:.3f}"
    return f"**{text}**" if abs(change) > 2 * error else text


def curves(found: dict[str, Any]) -> str:
    """Return the learning curves as SVG: the MLM loss and the AUC by tokens, the probes by share."""
    electra = found["models"]["fused"]
    million = svg.Axis("million tokens", 0, electra["curve"][-1]["tokens"] / 1e6, log=False)
    percent = svg.Axis("percent of the run", 0, 100, log=False)
    losses, aucs = (
        [svg.Curve(COLOURS["fused"], by_tokens(electra["curve"], *names))]
        for names in (("mlm_loss",), ("auc", "auc_low", "auc_high"))
    )
    panels = [
        Panel("MLM loss of the generator, nats", losses, million, electra["loss_without_context"]),
        Panel("RTD AUC", aucs, million, 0.5),
    ]
    if _has_probes(found):
        for probe, title in PROBES.items():
            probes = [svg.Curve(COLOURS[name], _probed(found["models"][name], probe)) for name in TITLES]
            level = 0.5 if probe == "pairs" else electra["probes"]["sentiment_words"][0]
            panels.append(Panel(title, probes, percent, level))
    return drawn("Blue: ELECTRA, red: masked LM of equal FLOPs. Bars: 95 % intervals.", panels)


def _probed(run: dict[str, Any], probe: str) -> list[svg.Point]:
    curve = run["probes"]["curve"]
    return [svg.Point(100 * p["step"] / curve[-1]["step"], *p[probe]) for p in curve]
