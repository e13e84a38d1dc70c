"""The section of LEARNING.md about `benchmarks/learning/fine_tune.py`."""

from statistics import mean
from typing import Any

from benchmarks.learning.numbers import difference, mean_and_error, with_error

TITLES = {"finetune": "`finetune`", "trainer": "Trainer, dynamic padding"}


def section(found: dict[str, Any]) -> list[str]:
    first = found["runs"][0]
    accuracy, seconds = (
        {name: [run[key] for run in found["runs"] if run["model"] == name] for name in TITLES}
        for key in ("accuracy", "cpu_seconds")
    )
    lines = [
        "## Fine-tuning compared with transformers' Trainer",
        "",
        f"A tiny classifier without pre-training on {first['data']}: {first['items']:,} texts for training, "
        f"{first['tested']:,} for testing, {first['epochs']:g} epochs, {len(accuracy['finetune'])} seeds. "
        f"Each run used one thread of {found['machine']} with torch {found['torch']}. Both sides begin with "
        "the same weights and have the same rate, warm-up, clipping and AdamW. The batches of Trainer are "
        "padded, those of `finetune` are packed.",
        "",
        "| | accuracy | of each seed | CPU seconds, training and testing |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, title in TITLES.items():
        each = ", ".join(f"{a:.4f}" for a in accuracy[name])
        cells = (
            with_error(*mean_and_error(accuracy[name]), 4),
            each,
            with_error(*mean_and_error(seconds[name]), 0),
        )
        lines.append(f"| {title} | {' | '.join(cells)} |")
    ratio = mean(seconds["trainer"]) / mean(seconds["finetune"])
    return [
        *lines,
        "",
        f"- Accuracy, `finetune` minus Trainer: {difference(accuracy['finetune'], accuracy['trainer'])}.",
        f"- `finetune` needs {1 / ratio:.2f} of the CPU time: it is {ratio:.2f} times as fast.",
    ]
