"""LEARNING.md and its learning curves, made from results/learning.json."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.learning import (
    ablations_report,
    equal_compute_report,
    fine_tune_report,
    uses_report,
    variants_report,
)
from benchmarks.learning.numbers import below_or_above, difference, mean_and_error, verb, with_error
from benchmarks.learning.panels import Panel, by_tokens, drawn
from benchmarks.report import svg

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


def by_corpus(results: dict) -> dict[str, dict[str, list[dict]]]:
    """Return the runs by corpus and model."""
    found: dict[str, dict[str, list[dict]]] = {}
    for run in results["runs"]:
        found.setdefault(run["corpus"], {}).setdefault(run["model"], []).append(run)
    return found


def final(run: dict, name: str) -> float:
    """Return a metric of the last evaluation; NaN if the model does not have it."""
    value = run["curve"][-1][name]
    return math.nan if value is None else value


def column(runs: Iterable[dict], name: str) -> list[float]:
    return [final(run, name) for run in runs]


def markdown(results: dict) -> str:
    """Return LEARNING.md."""
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
    for corpus, models in by_corpus(results).items():
        lines += [*_training(corpus, models, results), ""]
    if "ablations" in results:
        lines += [*ablations_report.section(results["ablations"]), ""]
    for name, found in results.get("variants", {}).items():
        lines += [*variants_report.section(name, found), ""]
    if "fine_tune" in results:
        lines += [*fine_tune_report.section(results["fine_tune"]), ""]
    if "uses" in results:
        lines += [*uses_report.section(results["uses"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _training(corpus: str, models: dict[str, list[dict]], results: dict) -> list[str]:
    # The runs of a result that was measured before 2026-12 have no machine of their own.
    first = {name: results.get(name) for name in ("machine", "torch")} | models["fused"][0]
    lines = [
        f"## Kernels and reference learn the same: {corpus}",
        "",
        f"Preset {first['preset']} ({', '.join(first['set'])}) in sequences of {first['seq']}, "
        f"{first['steps']:,} steps of {first['batch_tokens']:,} positions at a rate of {first['lr']:g} in "
        f"{first['precision']}; {first['train_tokens']:,} tokens of text, {first['vocabulary']:,} pieces. "
        f"Each run used one thread of {first['machine']} with torch {first['torch']} "
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
        metrics = ("mlm_loss", "mlm_accuracy", "rtd_loss", "replaced", "auc")
        cells = [with_error(*mean_and_error(column(runs, metric))) for metric in metrics]
        minutes = mean(run["seconds"] for run in runs) / 60
        lines.append(f"| {name} | {len(runs)} | {minutes:.1f} | " + " | ".join(cells) + " |")
    return [*lines, "", *_verdicts(models)]


def _verdicts(models: dict[str, list[dict]]) -> list[str]:
    fused, reference = models["fused"], models["reference"]
    gap = mean(final(run, "mlm_loss") - run["loss_without_context"] for run in fused)
    above = [final(run, "auc_low") > 0.5 for run in fused]
    known, error = mean_and_error(_entropy(final(run, "replaced")) - final(run, "rtd_loss") for run in fused)
    lines = [
        f"- The MLM loss is {below_or_above(gap)} the loss without context. The goal, 0.3 nats below it, is "
        f"reached: {_yes(gap <= -0.3)}.",
        f"- The 95 % interval of the final AUC is above 0.5 in {sum(above)} of {len(above)} runs. "
        f"Since the first evaluation {_change(fused, 0)}; since a quarter of the run {_change(fused, 0.25)}.",
        f"- The RTD loss is {with_error(known, error, 4)} nats below that of the best constant "
        f"prediction. This is more than two standard errors: {_yes(known > 2 * error)}.",
    ]
    for name, title in (("mlm_loss", "MLM loss"), ("auc", "AUC")):
        found = difference(column(fused, name), column(reference, name))
        lines.append(f"- {title}, fused minus reference: {found}.")
    return lines


def _change(runs: list[dict], share: float) -> str:
    """Describe the change of the AUC from the first evaluation after this share of the run to the end."""
    first = [next(p["auc"] for p in run["curve"] if p["step"] >= share * run["steps"]) for run in runs]
    change, error = mean_and_error(b - a for a, b in zip(first, column(runs, "auc"), strict=True))
    if math.isnan(error):
        return f"({mean(first):.3f}) it changes by {change:+.3f} (one seed)"
    return f"({mean(first):.3f}) it {verb(change, 2 * error)}: {change:+.3f} ± {error:.3f}"


def _entropy(p: float) -> float:
    """Return the loss in nats of the best constant prediction if the share p is replaced."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def curves(results: dict) -> str:
    """Return the learning curves as SVG: one row per corpus, with the MLM loss and the AUC of each run."""
    found = []
    for corpus, models in by_corpus(results).items():
        runs = [run for name in ("fused", "reference") for run in models[name]]
        tokens = svg.Axis("million tokens", 0, max(p["tokens"] for p in runs[0]["curve"]) / 1e6, log=False)
        losses, aucs = ([_curve(run, name) for run in runs] for name in ("mlm_loss", "auc"))
        level = runs[0]["loss_without_context"]
        found += [Panel(f"{corpus}: MLM loss, nats", losses, tokens, level)]
        found += [Panel(f"{corpus}: RTD AUC", aucs, tokens, 0.5)]
    legend = "A colour per seed; solid: fused, dashed: reference. Bars: 95 % intervals of fused."
    return drawn(f"{legend} Dotted: the loss without context, and chance.", found)


def _curve(run: dict, name: str) -> svg.Curve:
    fused = run["model"] == "fused"
    ends = ("auc_low", "auc_high") if fused and name == "auc" else ()
    style = f"{COLOURS[run['seed'] % len(COLOURS)]}{'' if fused else ' dashed'}"
    return svg.Curve(style, by_tokens(run["curve"], name, *ends))
