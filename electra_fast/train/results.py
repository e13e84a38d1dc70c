"""The results of fine-tuning: the seeds, the best model, its predictions; and a folder evaluated again."""

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from electra_fast import local
from electra_fast.errors import must
from electra_fast.pretrained import PretrainedHalf
from electra_fast.tasks.task import Evaluation, Task, evaluate
from electra_fast.train.divergence import NotFinite
from electra_fast.train.fine_tune_page import page
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.train.fine_tuned import load_head, open_fine_tuned
from electra_fast.train.task_data import Split, TaskData

METRICS = "metrics.json"


def of_seed(folder: Path) -> Path:
    """Return the file with the metrics of a seed, which is written when its run has ended."""
    return folder / METRICS


def of_run(recipe: FineTuneRecipe, out: Path, task_data: TaskData, device: torch.device) -> dict[str, Any]:
    """Compare the seeds of a run, save the best one in its folder with its results, and return these.

    A metric that is not defined is None, such as the correlation of constant predictions.

    Returns:
        the content of metrics.json: ``task``, ``metric`` (the one that is compared), ``items`` and
        ``truncated`` per split, ``baseline`` and ``majority`` (its name and its metrics on --dev),
        ``seeds`` (each with ``seed``, ``failed`` and ``dev``), ``median``, ``lowest`` and ``highest`` over
        the seeds, ``best`` (the seed), and the metrics of that seed on each split other than ``train``.

    Raises:
        NotFinite: no seed has ended with finite weights.
    """
    task, metric = task_data.task, task_data.task.metric
    majority = task.majority(task_data.splits["dev"].items, task_data.splits["train"].items)
    seeds = [_result(out / f"seed-{seed}", seed, metric) for seed in recipe.all_seeds()]
    ended = [result for result in seeds if result["dev"]]
    if not ended:
        raise NotFinite(must("finetune: --seeds", "have a run with finite weights", "none", "lower --lr"))
    for result in ended:
        result["failed"] = _failure(result["dev"][metric], task, majority)
    values = [value for result in ended if (value := result["dev"][metric]) is not None]
    best = max(ended, key=lambda result: _comparable(result["dev"][metric]))
    shutil.copytree(out / f"seed-{best['seed']}" / "model", out, dirs_exist_ok=True)

    last = "test" if "test" in task_data.splits else "dev"
    known = {"train", "dev"} - {last}  # the seed's result has the metrics on --dev
    head = load_head(task, out, device)
    evaluations = {
        role: _evaluate(task, head, split, recipe.precision)
        for role, split in task_data.splits.items()
        if role not in known
    }
    results = {
        "task": task.name,
        "metric": metric,
        "items": {role: len(split.items) for role, split in task_data.splits.items()},
        "truncated": {role: split.examples.truncated for role, split in task_data.splits.items()},
        "baseline": task.baseline,
        "majority": with_null(majority) if majority else None,
        "seeds": seeds,
        "median": statistics.median(values) if values else None,
        "lowest": min(values, default=None),
        "highest": max(values, default=None),
        "best": best["seed"],
    }
    results |= {"dev": best["dev"]}
    results |= {role: with_null(evaluation.metrics) for role, evaluation in evaluations.items()}
    write(out, task, task_data.splits[last].items, evaluations[last].predictions, results)
    return results


def _result(folder: Path, seed: int, metric: str) -> dict[str, Any]:
    """Return the content of a seed's metrics.json.

    Raises:
        ValueError: it was damaged, or the model of the seed was removed.
    """
    file = of_seed(folder)
    found = local.json_object("finetune", file)
    failed = found.get("dev") is None and isinstance(found.get("failed"), str)
    value = found["dev"].get(metric, "none") if isinstance(found.get("dev"), dict) else "none"
    remedy = f"remove {folder}, then --resume trains this seed again"
    if found.get("seed") != seed or not (failed or value is None or isinstance(value, float)):
        raise ValueError(
            must(f"finetune: {file}", f"have the results of seed {seed}", repr(found)[:80], remedy)
        )
    if not failed and not (folder / "model").exists():
        raise FileNotFoundError(must(f"finetune: {folder}", "have the model of the seed", "none", remedy))
    return found


def _failure(value: float | None, task: Task, majority: dict[str, float] | None) -> str | None:
    """Return why a seed has failed although its weights are finite, None if it has not."""
    metric = task.metric
    if value is None:
        return f"{metric} is not defined, because the predictions or the scores are constant"
    if majority and not value > majority[metric]:
        return f"not better than {task.baseline}, {metric} {majority[metric]:.4f}"
    return None


def _comparable(value: float | None) -> float:
    return -math.inf if value is None else value


def with_null(metrics: dict[str, float]) -> dict[str, float | None]:
    """Return metrics with None for NaN, which JSON does not have."""
    return {name: None if math.isnan(value) else value for name, value in metrics.items()}


def _evaluate(task: Task, head: PretrainedHalf, split: Split, precision: str) -> Evaluation:
    device = next(head.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        return evaluate(task, head, *split, progress=True)


def write(
    out: Path, task: Task, items: Sequence[Any], predictions: Sequence[Any], results: dict[str, Any]
) -> None:
    """Write predictions.jsonl, with one object per item, report.html and metrics.json."""
    with (out / "predictions.jsonl").open("w", encoding="utf-8") as stream:
        for item, prediction in zip(items, predictions, strict=True):
            stream.write(json.dumps(task.record(item, prediction), ensure_ascii=False) + "\n")
    (out / "report.html").write_text(page(out, task, items, predictions, results), encoding="utf-8")
    local.write_json(out / METRICS, results)


def evaluate_folder(
    task: str,
    model: str | Path,
    paths: Sequence[str | Path],
    *,
    split: str = "test",
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> dict[str, float]:
    """Return the metrics of a fine-tuned model on files.

    Args:
        task: one of `TASKS`.
        model: the folder that `fine_tune` or transformers wrote.
        paths: files with labels.
        split: of files with several splits, such as CLINC150's: train, dev or test.
        out: a folder for predictions.jsonl, metrics.json and report.html.
        device: None: a GPU if there is one.
        options: fields of `FineTuneRecipe` about files and lengths; the others are those of the folder's run.

    Raises:
        ValueError, OSError: the folder has no model for this task, or a file is wrong.
    """
    device = local.device("evaluate: --device", device)
    if out is not None and (out == "" or (Path(out) / METRICS).exists()):
        rule = "be a folder without metrics.json"
        raise ValueError(must("evaluate: --out", rule, repr(str(out)), "name another folder"))
    folder = local.existing("evaluate: --model", model)
    of_task, head, tokenizer, recipe = open_fine_tuned("evaluate", task, folder, device, **options)
    for path in paths:
        local.existing("evaluate: --data", path, hub=False)
    items = of_task.read(paths, split)
    if not items:
        raise ValueError(must("evaluate: --data", "have at least one item", "none"))
    if error := of_task.unlabelled(items):
        raise ValueError(error)
    of_task.check(items)
    examples = of_task.examples(items, tokenizer)
    evaluation = _evaluate(of_task, head, Split(items, examples), recipe.precision)
    if out is not None:
        local.new_folder("evaluate: --out", Path(out))
        results = {
            "task": task,
            "metric": of_task.metric,
            "items": {split: len(items)},
            split: with_null(evaluation.metrics),
        }
        write(Path(out), of_task, items, evaluation.predictions, results)
    return evaluation.metrics


def one_line(metrics: dict[str, float]) -> str:
    """Return metrics as text: "accuracy 0.9000, f1 0.8500"."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
