"""LEARNING.md and its learning curves, made from results/learning.json."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.learning import ablations_report, equal_compute_report, uses_report, variants_report
from benchmarks.learning.probes import mean_and_error
from benchmarks.report import picture, svg

PAGE = Path(__file__).parent / "LEARNING.md"
CURVES = Path(__file__).parents[1] / "results" / "learning.svg"
COLOURS = ("blue", "vermilion", "green")  # by seed


def write(results: dict) -> None:
    """Write the page and its pictures."""
    pictures = {CURVES: curves(results)}
    for name, found in results.get("equal_compute", {}).items():
        pictures[CURVES.parent / picture_of(name)] = equal_compute_report.curves(found)
    for file, text in pictures.items():
        file.write_text(text)
    PAGE.write_text(markdown(results))
    print(*pictures, PAGE, sep="\n")


def picture_of(name: str) -> str:
    """Return the name of the picture of a comparison at equal FLOPs."""
    return f"equal_compute-{name}.svg"


def by_name(results: dict) -> dict[str, dict[str, list[dict]]]:
    """Return the runs by corpus and model."""
    found: dict[str, dict[str, list[dict]]] = {}
    for run in results["runs"]:
        found.setdefault(run["corpus"], {}).setdefault(run["model"], []).append(run)
    return found


def final(run: dict, name: str) -> float:
    value = run["curve"][-1][name]
    return math.nan if value is None else value


def column(runs: Iterable[dict], name: str) -> list[float]:
    return [final(run, name) for run in runs]


def markdown(results: dict) -> str:
    lines = [
        "# What the trainer learns",
        "",
        "Written by `python -m benchmarks.learning`; how a small model begins to learn, and why, is in "
        "[docs/pretraining.md](../../docs/pretraining.md). Losses and AUCs are those of held-out text. The "
        "AUC of a run is measured against its own generator of the same step, unless a section says "
        "otherwise. Values with ± are means over seeds with their standard errors.",
        "",
    ]
    for name, found in results.get("equal_compute", {}).items():
        lines += [*equal_compute_report.section(found, f"../results/{picture_of(name)}"), ""]
    for corpus, models in by_name(results).items():
        lines += [*_training(corpus, models, results), ""]
    if "ablations" in results:
        lines += [*ablations_report.section(results["ablations"]), ""]
    for name, found in results.get("variants", {}).items():
        lines += [*variants_report.section(name, found), ""]
    if "fine_tune" in results:
        lines += _fine_tuning(results["fine_tune"])
    if "uses" in results:
        lines += uses_report.section(results["uses"])
    return "\n".join(lines).rstrip() + "\n"


def _training(corpus: str, models: dict[str, list[dict]], results: dict) -> list[str]:
    first = models["fused"][0]
    lines = [
        f"## Kernels and reference learn the same: {corpus}",
        "",
        f"Preset {first['preset']} ({', '.join(first['set'])}) in sequences of {first['seq']}, "
        f"{first['steps']:,} steps of {first['batch_tokens']:,} positions at a rate of {first['lr']:g} in "
        f"{first['precision']}; {first['train_tokens']:,} tokens of text, {first['vocabulary']:,} pieces. "
        f"Each run used one thread of {results['machine']} with torch {results['torch']} "
        f"(`python -m benchmarks.learning {corpus} --steps {first['steps']}`). The MLM loss without context "
        f"is {first['loss_without_context']:.3f} nats. It is that of a generator that knows the frequencies "
        "of the tokens, and copies a token that a masked position keeps.",
        "",
        "![curves](../results/learning.svg)",
        "",
        "| ops | seeds | minutes per run | MLM loss | accuracy | RTD loss | replaced | RTD AUC |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in ("fused", "reference"):
        runs = models[name]
        cells = [
            _mean(column(runs, n), 3) for n in ("mlm_loss", "mlm_accuracy", "rtd_loss", "replaced", "auc")
        ]
        minutes = mean(run["seconds"] for run in runs) / 60
        lines.append(f"| {name} | {len(runs)} | {minutes:.1f} | " + " | ".join(cells) + " |")
    return [*lines, "", *_verdicts(models)]


def _verdicts(models: dict[str, list[dict]]) -> list[str]:
    fused, reference = models["fused"], models["reference"]
    gain = mean(run["loss_without_context"] - final(run, "mlm_loss") for run in fused)
    above = [final(run, "auc_low") > 0.5 for run in fused]
    known, error = mean_and_error(_entropy(final(run, "replaced")) - final(run, "rtd_loss") for run in fused)
    lines = [
        f"- The MLM loss is {equal_compute_report.below(gain, 0)} the loss without context. The goal, 0.3 "
        f"nats below it, is reached: {_yes(gain >= 0.3)}.",
        f"- The 95 % interval of the final AUC is above 0.5 in {sum(above)} of {len(above)} runs. "
        f"Since the first evaluation {_change(fused, 0)}; since a quarter of the run {_change(fused, 0.25)}.",
        f"- The RTD loss is {known:.4f} ± {error:.4f} nats below that of the best constant prediction. This "
        f"is more than two standard errors: {_yes(known > 2 * error)}.",
    ]
    for name, title in (("mlm_loss", "MLM loss"), ("auc", "AUC")):
        (a, da), (b, db) = mean_and_error(column(fused, name)), mean_and_error(column(reference, name))
        noise = 2 * math.hypot(da, db)
        verdict = "within" if abs(a - b) <= noise else "outside"
        lines.append(
            f"- {title}, fused minus reference: {a - b:+.4f}, {verdict} two standard errors ({noise:.4f})."
        )
    return lines


def _change(runs: list[dict], share: float) -> str:
    """Describe the change of the AUC from the first evaluation after this share of the run to the end."""
    first = [next(p["auc"] for p in run["curve"] if p["step"] >= share * run["steps"]) for run in runs]
    change, error = mean_and_error(b - a for a, b in zip(first, column(runs, "auc"), strict=True))
    word = _sign(change, error, "rises", "falls", "does not change significantly")
    return f"({mean(first):.3f}) it {word}: {change:+.3f} ± {error:.3f}"


def _entropy(p: float) -> float:
    """Return the loss in nats of the best constant prediction if the share p is replaced."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _sign(change: float, error: float, up: str, down: str, neither: str) -> str:
    """Return the word for a change; it is significant if it is more than two standard errors."""
    return up if change > 2 * error else down if change < -2 * error else neither


def _fine_tuning(found: dict) -> list[str]:
    """Return the section about `benchmarks/learning/fine_tune.py`."""
    runs = {name: [r for r in found["runs"] if r["model"] == name] for name in ("finetune", "trainer")}
    first, count = found["runs"][0], len(runs["finetune"])
    lines = [
        "## Fine-tuning compared with transformers' Trainer",
        "",
        f"A tiny classifier without pre-training on {first['data']}: {first['items']:,} texts for training, "
        f"{first['tested']:,} for testing, {first['epochs']:g} epochs, {count} seeds. Each run used one "
        f"thread of {found['machine']} with torch {found['torch']}. Both sides begin with the same weights "
        "and have the same rate, warm-up, clipping and AdamW. The batches of Trainer are padded, those of "
        "`finetune` are packed.",
        "",
        "| | accuracy | of each seed | CPU seconds, training and testing |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, title in (("finetune", "`finetune`"), ("trainer", "Trainer, dynamic padding")):
        accuracy, seconds = ([r[key] for r in runs[name]] for key in ("accuracy", "cpu_seconds"))
        each = ", ".join(f"{a:.4f}" for a in accuracy)
        lines.append(f"| {title} | {_mean(accuracy, 4)} | {each} | {_mean(seconds, 0)} |")
    (a, da), (b, db) = (mean_and_error(r["accuracy"] for r in runs[name]) for name in runs)
    error = math.hypot(da, db)
    verdict = "within" if abs(a - b) <= 2 * error else "outside"
    ratio = mean(r["cpu_seconds"] for r in runs["trainer"]) / mean(r["cpu_seconds"] for r in runs["finetune"])
    return [
        *lines,
        "",
        f"- Accuracy, `finetune` minus Trainer: {a - b:+.4f}, {verdict} two standard errors "
        f"({2 * error:.4f}).",
        f"- `finetune` needs {1 / ratio:.2f} of the CPU time: it is {ratio:.2f} times as fast.",
    ]


def _mean(values: list[float], digits: int) -> str:
    a, error = mean_and_error(values)
    return f"{a:.{digits}f}" if math.isnan(error) else f"{a:.{digits}f} ± {error:.{digits}f}"


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def curves(results: dict) -> str:
    """Return the learning curves as SVG: one row per corpus, with the MLM loss and the AUC of each run."""
    legend = "A colour per seed; solid: fused, dashed: reference. Bars: 95 % intervals of fused."
    parts = [picture.text(16, 24, f"{legend} Dotted: the loss without context, and chance.")]
    for row, (corpus, models) in enumerate(by_name(results).items()):
        runs = [run for name in ("fused", "reference") for run in models[name]]
        tokens = svg.Axis("million tokens", 0, max(p["tokens"] for p in runs[0]["curve"]) / 1e6, log=False)
        panels = (
            ("mlm_loss", f"{corpus}: MLM loss, nats", runs[0]["loss_without_context"]),
            ("auc", f"{corpus}: RTD AUC", 0.5),
        )
        for i, (name, title, level) in enumerate(panels):
            found = [_curve(run, name) for run in runs]
            ends = [(p.y, p.low or p.y, p.high or p.y) for curve in found for p in curve.points]
            axis = svg.close_to(title, [level, *itertools.chain(*ends)])
            found.append(svg.Curve("grey dotted", [svg.Point(x, level) for x in tokens[1:3]]))
            left, top = 16 + 410 * i, 60 + 290 * row
            parts.append(picture.text(left, top, title, "ink"))
            parts.append(picture.box(left, top + 10, 388, svg.HEIGHT, svg.curves(found, tokens, axis)))
            parts.append(picture.box(left, top + 10 + svg.HEIGHT, 388, 20, svg.labels(tokens)))
            parts.append(picture.text(left + 388, top + svg.HEIGHT + 44, tokens.title, anchor="end"))
    return picture.document(60 + 290 * len(by_name(results)), parts, "light")


def _curve(run: dict, name: str) -> svg.Curve:
    fused = run["model"] == "fused"
    ends = ("auc_low", "auc_high") if fused and name == "auc" else ()
    points = [p for p in run["curve"] if p[name] is not None]
    found = [svg.Point(p["tokens"] / 1e6, p[name], *(p[end] for end in ends)) for p in points]
    return svg.Curve(f"{COLOURS[run['seed'] % len(COLOURS)]}{'' if fused else ' dashed'}", found)
