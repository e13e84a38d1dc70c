"""The sections of LEARNING.md about `benchmarks/learning/variants.py`."""

from typing import Any

from benchmarks.learning.numbers import auc, interval
from electra_fast.train.divergence import LEAST_STD

TITLES = {
    "plateau": "When the generator begins to read its context",
    "collapse": "When the discriminator collapses",
    "sizes": "Sizes and rates of a small ELECTRA",
}
INTRODUCTIONS = {
    "plateau": "A masked language model of the size of tiny's generator, alone. The loss without context is "
    "that of a model that knows the frequencies of the tokens, and copies the tokens that masked positions "
    "keep. The name of each run is its difference from the base.",
    "collapse": "Both halves, at the sizes of tiny. The base has a rate of 2e-3, sequences of 128, "
    "dropout 0.1, a weight of RTD of 50 and initial weights as in the paper. The name of each other run is "
    "its difference from the base. A run reports a collapse if the standard deviation of the logits is below "
    f"{LEAST_STD}.",
    "sizes": "Both halves, at the sizes of tiny. The name of each run is its difference from the base. The "
    "AUC of a run is measured against its own generator, and a better generator is harder to detect. For the "
    "other AUC all discriminators read the tokens that the generator of the base has replaced.",
}


def section(name: str, found: dict[str, Any]) -> list[str]:
    """Return the section of an experiment."""
    runs = found["runs"]
    tokens = runs[0]["curve"][-1]["tokens"]
    lines = [
        f"## {TITLES[name]}",
        "",
        f"{INTRODUCTIONS[name]} {tokens / 1e6:.1f} million tokens of a text of {runs[0]['train_tokens']:,}, "
        f"{runs[0]['vocabulary']:,} pieces, one seed, one thread of {found['machine']} in bfloat16 with "
        f"torch {found['torch']} (`python -m benchmarks.learning.variants {name}`).",
        "",
    ]
    return [*lines, *{"plateau": _plateau, "collapse": _collapse, "sizes": _sizes}[name](runs)]


def _plateau(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| run | loss without context | MLM loss at half | at the end | difference | "
        "accuracy | CPU seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        curve, level = run["curve"], run["loss_without_context"]
        half, end = curve[(len(curve) - 1) // 2], curve[-1]
        lines.append(
            f"| {run['name']} | {level:.3f} | {half['mlm_loss']:.3f} | {end['mlm_loss']:.3f} | "
            f"{end['mlm_loss'] - level:+.3f} | {end['mlm_accuracy']:.3f} | {run['seconds']:.0f} |"
        )
    return lines


def _collapse(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| run | standard deviation of the logits: lowest | at step | at the end | AUC | MLM loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        end, low = run["curve"][-1], lowest(run["curve"])
        lines.append(
            f"| {run['name']} | {low['logit_std']:.3f} | {low['step']:,} | {end['logit_std']:.3f} | "
            f"{auc(end)} | {end['mlm_loss']:.3f} |"
        )
    return lines


def lowest(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the point where the discriminator's answers differ least."""
    return min(curve, key=lambda point: point["logit_std"])


def _sizes(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| run | MLM loss | accuracy | AUC, own generator | AUC, generator of the base | CPU seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        end = run["curve"][-1]
        lines.append(
            f"| {run['name']} | {end['mlm_loss']:.3f} | {end['mlm_accuracy']:.3f} | {auc(end)} | "
            f"{interval(run['common_auc'])} | {run['seconds']:.0f} |"
        )
    return lines
