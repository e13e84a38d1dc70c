"""The section of LEARNING.md about `benchmarks/learning/ablations.py`."""

from typing import Any

from benchmarks.learning.numbers import mean_and_error, with_error
from benchmarks.learning.transfer import NEW_WEIGHTS, TASKS


def section(found: dict[str, Any]) -> list[str]:
    runs = found["runs"]
    seeds = len({run["seed"] for run in found["tasks"]})
    tokens = runs[0]["curve"][-1]["tokens"]
    columns = "MLM loss | AUC | CPU seconds | GoEmotions, frozen | BLiMP"
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
    lines += [_row(run["name"], _cells(run), found["tasks"]) for run in runs]
    untrained = f"{runs[0]['probes']['sentiment_untrained'][0]:.3f}"
    lines.append(_row(NEW_WEIGHTS, ["", "", "", untrained, ""], found["tasks"]))
    return [
        *lines,
        "",
        f"The last four columns are results of fine-tuning with {seeds} seeds; ± is one standard error, "
        "which is only a rough estimate from so few.",
    ]


def _cells(run: dict[str, Any]) -> list[str]:
    """Return the cells of pre-training and of the probes."""
    end, probes = run["curve"][-1], run["probes"]
    auc = "" if end["auc"] is None else f"{end['auc']:.3f}"
    pairs = f"{probes['pairs'][0]:.3f}" if "pairs" in probes else ""
    return [f"{end['mlm_loss']:.3f}", auc, f"{run['seconds']:.0f}", f"{probes['sentiment'][0]:.3f}", pairs]


def _row(name: str, cells: list[str], tasks: list[dict[str, Any]]) -> str:
    """Return a row of the table, with the results of the tasks that began with `name`."""
    values = {task: [t["value"] for t in tasks if (t["task"], t["start"]) == (task, name)] for task in TASKS}
    return f"| {' | '.join([name, *cells, *(with_error(*mean_and_error(values[task])) for task in TASKS)])} |"
