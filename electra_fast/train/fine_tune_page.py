"""The results of a fine-tuning: a table for the terminal, and a page of HTML."""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from electra_fast import pages
from electra_fast.pages import Cell, text_of
from electra_fast.tables import text_table
from electra_fast.tasks.details import MOST, Section
from electra_fast.tasks.task import Task
from electra_fast.train import line_chart

LONGEST_TEXT = 500  # characters of a text in a table
MOST_POINTS = 150  # of a line in the picture
STYLE = """
.matrix td { background: color-mix(in srgb, var(--vermilion) var(--share), transparent) }
.matrix td.same { background: color-mix(in srgb, var(--blue) var(--share), transparent) }
.matrix td, .matrix th { padding: 3px 8px; min-width: 2.2em }
.matrix tr:first-child th { writing-mode: vertical-rl; transform: rotate(180deg); padding: 8px 3px }
.zero { color: var(--soft) }
"""


def summary_table(results: dict[str, Any]) -> str:
    """Return the metrics of all seeds as text; `results` is the content of metrics.json."""
    head, rows = _metrics(results)
    texts = [[text_of(cell) for cell in row] for row in rows]
    return text_table([head, *texts], right=range(1, len(head) - 1))


def page(
    folder: Path, task: Task, items: Sequence[Any], predictions: Sequence[Any], results: dict[str, Any]
) -> str:
    """Return the page of a run, or of an evaluation, which has no seeds.

    Args:
        folder: of the run, with seed-0/log.jsonl and so on; a file may be missing.
        task: with the labels of the run.
        items, predictions: those of --test, or of --dev without --test; of an evaluation, those of its split.
        results: the content of metrics.json; that of an evaluation has ``task``, ``items``, and the metrics.
    """
    role = next(role for role in ("test", "dev", *results["items"]) if role in results["items"])
    if "seeds" in results:
        parts, whose = _run(folder, results), f" of seed {results['best']}"
    else:
        parts, whose = [pages.table(list(results[role]), [list(results[role].values())])], ""
    parts.append(f"<h2>Predictions</h2><p>These are the predictions{whose} on {role}.</p>")
    if task.unlabelled(items):
        parts.append("<p>The items have no labels, so the predictions cannot be judged.</p>")
    else:
        parts += map(_html, task.details(items, predictions))
        parts.append(_html(wrong_predictions(task, items, predictions)))
    return pages.document(f"Fine-tuning: {results['task']}", parts, line_chart.STYLE + STYLE)


def _run(folder: Path, results: dict[str, Any]) -> list[str]:
    """Return the parts about the seeds."""
    failed = [f"Seed {each['seed']}: {each['failed']}" for each in results["seeds"] if each["failed"]]
    return [
        f"<p>{escape(_sentence(results))}</p>",
        *(f'<p class="wrong">{escape(sentence)}</p>' for sentence in failed),
        "<h2>Seeds</h2>",
        pages.table(*_metrics(results)),
        f"<p>{escape(_sizes(results))}</p>",
        "<h2>Learning curves</h2>",
        _curves(folder, results),
    ]


def wrong_predictions(task: Task, items: Sequence[Any], predictions: Sequence[Any]) -> Section:
    """Return the predictions with the largest errors."""
    errors = [task.error(*each) for each in zip(items, predictions, strict=True)]
    wrong = sorted((i for i, error in enumerate(errors) if error != 0), key=lambda i: -errors[i])
    shown = [task.shown(items[i], predictions[i]) for i in wrong[:MOST]]
    head = tuple(dict.fromkeys(name for each in shown for name in each))
    rows = [tuple(_cell(each.get(name)) for name in head) for each in shown]
    note = f"{text_of(len(wrong))} of {text_of(len(items))} predictions are not exactly right."
    if len(wrong) > MOST:
        note += f" These are {MOST} of them, the largest errors first."
    return Section("Wrong predictions", head, rows, note)


def _metrics(results: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Return the names of the columns and the rows of the table of all seeds."""
    names = list(results["dev"])

    def row(name: str, metrics: dict[str, float] | None, note: str = "") -> list[Cell]:
        return [name, *map((metrics or {}).get, names), note]

    rows = []
    for each in results["seeds"]:
        note = "the best" if each["seed"] == results["best"] else ""
        note = "; ".join(filter(None, (note, each["failed"])))
        rows.append(row(f"seed {each['seed']}", each["dev"], note))
    if len(rows) > 1:
        ended = [each["dev"] for each in results["seeds"] if each["dev"]]
        values = {name: [metrics[name] for metrics in ended] for name in names}
        for name, function in (("median", statistics.median), ("lowest", min), ("highest", max)):
            rows.append(row(name, {metric: _of_finite(function, found) for metric, found in values.items()}))
    if results["majority"]:
        rows.append(row("majority", results["majority"], _baseline(results)))
    for role in results["items"]:
        if role not in ("train", "dev"):
            rows.append(row(role, results[role], f"seed {results['best']} on {role}"))
    return ["on --dev", *names, ""], rows


def _sentence(results: dict[str, Any]) -> str:
    """Return the result in one sentence."""
    metric, ended = results["metric"], sum(bool(each["dev"]) for each in results["seeds"])
    text = f"The {metric} on --dev is {text_of(results['median'])}"
    if ended > 1:
        low, high = text_of(results["lowest"]), text_of(results["highest"])
        text += f", the median of {ended} seeds, which range from {low} to {high}"
    if results["majority"]:
        text += f"; {_baseline(results)} has {text_of(results['majority'][metric])}"
    if results.get("test"):  # not if its items have no labels
        text += f"; on --test, seed {results['best']} has {text_of(results['test'][metric])}"
    return f"{text}."


def _baseline(results: dict[str, Any]) -> str:
    return results.get("baseline", Task.baseline)  # the results of older runs do not have it


def _sizes(results: dict[str, Any]) -> str:
    """Return the numbers of items, and of those that are longer than the model reads."""
    parts = []
    for role, size in results["items"].items():
        cut = results["truncated"][role]
        parts.append(f"{role}: {text_of(size)} items" + (f" ({text_of(cut)} texts cut off)" if cut else ""))
    return f"{'; '.join(parts)}."


def _curves(folder: Path, results: dict[str, Any]) -> str:
    """Return the learning curves of all seeds."""
    names, logs = [], []
    for each in results["seeds"]:
        names.append(f"seed {each['seed']}")
        logs.append(_log(folder / f"seed-{each['seed']}" / "log.jsonl"))
    metric, charts = results["metric"], []
    for title, label, kind, number in (
        ("Loss in training", "loss in training, mean per target", "train", "loss"),
        (f"{metric} on --dev", metric, "dev", metric),
    ):
        lines = [
            line_chart.Line(name, _points(log, kind, number)) for name, log in zip(names, logs, strict=True)
        ]
        charts.append(line_chart.chart(title, label, lines))
    return f'{line_chart.legend(names)}<div class="charts">{"".join(charts)}</div>'


def _log(file: Path) -> list[dict[str, Any]]:
    """Return the records of a log, without a line that a kill has cut off."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def _points(log: list[dict[str, Any]], kind: str, name: str) -> list[line_chart.Point]:
    """Return the steps and the values of a number; each point of a long line is the mean of several."""
    # A resumed run has repeated some steps: the last record of a step is that of the model.
    values = {each["step"]: each[name] for each in log if each["kind"] == kind and _finite(each.get(name))}
    points = sorted(values.items())
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], statistics.fmean(value for _, value in group)) for group in groups]


def _html(section: Section) -> str:
    title = f"<h3>{escape(section.title)}</h3>" + (f"<p>{escape(section.note)}</p>" if section.note else "")
    if not section.rows:
        return title
    return title + (_matrix(section) if section.matrix else pages.table(section.head, section.rows))


def _matrix(section: Section) -> str:
    """Return a table whose cells are coloured by their share of the row, the diagonal in another colour."""
    lines = ["".join(f"<th>{escape(name)}</th>" for name in section.head)]
    for i, (name, *counts) in enumerate(section.rows):
        cells = [f"<th>{escape(name)}</th>"]
        for j, count in enumerate(counts):
            classes = "number" + " same" * (i == j) + " zero" * (count == 0)
            share = 60 * count / max(1, sum(counts))  # per cent of the colour; the text stays readable
            cells.append(f'<td class="{classes}" style="--share: {share:.0f}%">{text_of(count)}</td>')
        lines.append("".join(cells))
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="matrix">{rows}</table></div>'


def _cell(value: Any) -> Cell:
    """Return what a table shows of a value of JSON."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def _of_finite(function: Callable, values: Sequence[float]) -> float | None:
    """Return a function of the finite values, None if there are none."""
    finite = [value for value in values if _finite(value)]
    return function(finite) if finite else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
