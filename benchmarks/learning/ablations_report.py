"""The section of LEARNING.md about `benchmarks/learning/ablations.py`."""

import math
from statistics import mean, variance
from typing import Any

from benchmarks.learning.transfer import NEW_WEIGHTS, TASKS


def section(found: dict[str, Any]) -> list[str]:
    runs = found["runs"]
    tokens = runs[0]["curve"][-1]["tokens"]
    columns = "MLM loss | AUC | CPU seconds | GoEmotions, frozen | BLiMP"
    scores = {task: _scores(task, found["tasks"]) for task in TASKS}
    errors = {task: pooled_error(list(scores[task].values())) for task in TASKS}
    untrained = f"{runs[0]['probes']['sentiment_untrained'][0]:.3f}"
    rows = [(run["name"], _cells(run)) for run in runs] + [(NEW_WEIGHTS, ["", "", "", untrained, ""])]
    lines = [
        "## ELECTRA and the ablations of its paper",
        "",
        f"Preset tiny, {tokens / 1e6:.1f} million tokens each of a text of {runs[0]['train_tokens']:,}, "
        f"{runs[0]['vocabulary']:,} pieces, one seed. Each used one thread of {found['machine']} with torch "
        f"{found['torch']} (`python -m benchmarks.learning.ablations`). The MLM loss and the AUC are those "
        "of each run's own generator. All have the same steps, not FLOPs.",
        "",
        f"| trained | {columns} | {' | '.join(task.title for task in TASKS.values())} |",
        "| --- |" + " ---: |" * (5 + len(TASKS)),
    ]
    for name, cells in rows:
        cells += [compared(scores[task][name], scores[task][NEW_WEIGHTS], errors[task]) for task in TASKS]
        lines.append(f"| {' | '.join([name, *cells])} |")
    lines.append(f"| standard error | | | | | | {' | '.join(f'{error:.3f}' for error in errors.values())} |")
    seeds = len(next(iter(scores["snips"].values())))
    return [
        *lines,
        "",
        f"The last four columns are means over {seeds} seeds of fine-tuning; their standard error comes "
        "from the variance within all rows. **Bold**: it differs from new weights by more than two standard "
        "errors of a difference.",
    ]


def _scores(task: str, runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the metric of each seed, by the name of the encoder."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if run["task"] == task:
            found.setdefault(run["start"], []).append(run["value"])
    return found


def _cells(run: dict[str, Any]) -> list[str]:
    """Return the cells of pre-training and of the probes."""
    end, probes = run["curve"][-1], run["probes"]
    auc = "" if end["auc"] is None else f"{end['auc']:.3f}"
    pairs = f"{probes['pairs'][0]:.3f}" if "pairs" in probes else ""
    return [f"{end['mlm_loss']:.3f}", auc, f"{run['seconds']:.0f}", f"{probes['sentiment'][0]:.3f}", pairs]


def pooled_error(groups: list[list[float]]) -> float:
    """Return the standard error of the mean of a group, from the variance within all groups.

    The groups have one size; with one value each the error is NaN.
    """
    size = len(groups[0])
    return math.sqrt(mean(map(variance, groups)) / size) if size > 1 else math.nan


def compared(values: list[float], base: list[float], error: float) -> str:
    """Return the mean, in bold if it differs from that of `base` by more than two standard errors."""
    found = f"{mean(values):.3f}"
    return f"**{found}**" if abs(mean(values) - mean(base)) > 2 * math.sqrt(2) * error else found
