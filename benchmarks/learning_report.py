"""LEARNING.md and its curves, made of results/learning.json."""

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from benchmarks.probes import spread

PAGE = Path(__file__).parent / "LEARNING.md"
CURVES = Path(__file__).parent / "results" / "learning.svg"
PROBES = {"sentiment": "GoEmotions, frozen, linear", "pairs": "BLiMP, zero-shot"}


def write(results: dict) -> None:
    plot(results)
    PAGE.write_text(markdown(results))
    print(f"{PAGE}\n{CURVES}")


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
        "# What it learns",
        "",
        f"Made by `python -m benchmarks.learning` on one thread each of {results['machine']}, torch "
        f"{results['torch']}; preset tiny, no dropout, on held-out text; mean of seeds ± standard error.",
        "",
        "![curves](results/learning.svg)",
        "",
    ]
    for corpus, models in by_name(results).items():
        lines += [*_curves(corpus, models), ""]
    if results["probes"]:
        lines += _claim(results)
    return "\n".join(lines).rstrip() + "\n"


def _curves(corpus: str, models: dict[str, list[dict]]) -> list[str]:
    first = models["fused"][0]
    lines = [
        f"## {corpus}",
        "",
        f"{first['train_tokens']:,} tokens, {first['vocabulary']:,} pieces; {first['steps']:,} steps of "
        f"1,024 places; a unigram model loses {first['unigram_loss']:.3f} nats.",
        "",
        "| ops | seeds | minutes a run | MLM loss | accuracy | RTD loss | replaced | RTD AUC |",
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
    gain = mean(run["unigram_loss"] - final(run, "mlm_loss") for run in fused)
    above = [final(run, "auc_low") > 0.5 for run in fused]
    later = [[p["auc"] for p in run["curve"] if run["steps"] <= 4 * p["step"]] for run in fused]
    early, late = (mean(aucs[i] for aucs in later) for i in (0, -1))
    lines = [
        f"- The MLM loss is {gain:.2f} nats below the unigram's; 0.3 were aimed at: {_yes(gain >= 0.3)}.",
        f"- The AUC's 95 % interval is above 0.5 at the end in {sum(above)} of {len(above)} runs. From a "
        f"quarter of the run to its end it goes from {early:.3f} to {late:.3f}: "
        f"{'it rises' if late > early else 'it does not rise'}.",
    ]
    for name, title in (("mlm_loss", "MLM loss"), ("auc", "AUC")):
        (a, da), (b, db) = spread(column(fused, name)), spread(column(reference, name))
        noise = 2 * math.hypot(da, db)
        verdict = "within" if abs(a - b) <= noise else "outside"
        lines.append(
            f"- {title}, fused less reference: {a - b:+.4f}, {verdict} two standard errors, {noise:.4f}."
        )
    return lines


def _claim(results: dict) -> list[str]:
    flops = results["flops"]
    probes = {name: [p for p in results["probes"] if p["model"] == name] for name in ("fused", "masked")}
    steps = {name: found[0]["steps"] for name, found in probes.items()}
    lines = [
        "## Replaced-token detection against masking alone",
        "",
        f"A masked language model of the discriminator's size gets as many FLOPs: a step of it takes "
        f"{flops['masked'] / 1e9:.2f} GFLOP in its products, forward and backward, one of ELECTRA "
        f"{flops['electra'] / 1e9:.2f}; so {steps['masked']:,} steps against {steps['fused']:,}. Text, "
        "vocabulary, rates and seeds are the same.",
        "",
        "| probe | ELECTRA's discriminator | masked LM | difference | untrained | bag of words | majority |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    verdicts = []
    for key, title in PROBES.items():
        one, other = ([p[key][0] for p in probes[name]] for name in ("fused", "masked"))
        (a, da), (b, db) = spread(one), spread(other)
        error, ahead = 2 * math.hypot(da, db), "ELECTRA" if a > b else "the masked LM"
        everybody = list(itertools.chain(*probes.values()))
        rest = ["", "", "0.500"]
        if key == "sentiment":
            majority = everybody[0]["sentiment_majority"]
            rest = [
                _mean([p[f"sentiment_{name}"][0] for p in everybody], 3) for name in ("untrained", "words")
            ]
            rest.append(f"{max(majority, 1 - majority):.3f}")
        cells = [_mean(one, 3), _mean(other, 3), f"{a - b:+.3f} ± {error:.3f}", *rest]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
        sure = "more than" if abs(a - b) > error else "no more than"
        verdicts.append(
            f"- {title}: {ahead} is ahead by {abs(a - b):.3f}, {sure} twice the standard error of the seeds."
        )
    return [*lines, "", *verdicts]


def _mean(values: list[float], digits: int) -> str:
    a, error = spread(values)
    return f"{a:.{digits}f}" if math.isnan(error) else f"{a:.{digits}f} ± {error:.{digits}f}"


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def plot(results: dict) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "learning", "svg.fonttype": "none", "font.size": 9}
    corpora = by_name(results)
    figure, axes = plt.subplots(
        len(corpora), 2, figsize=(9, 3 * len(corpora)), squeeze=False, layout="constrained"
    )
    for (corpus, models), (left, right) in zip(corpora.items(), axes, strict=True):
        for name, style in (("fused", "-"), ("reference", "--")):
            for run in models[name]:
                points = run["curve"]
                tokens, colour = [p["tokens"] / 1e6 for p in points], f"C{run['seed']}"
                label = f"{name}, seed {run['seed']}"
                left.plot(tokens, [p["mlm_loss"] for p in points], style, color=colour, lw=1.2, label=label)
                right.plot(tokens, [p["auc"] for p in points], style, color=colour, lw=1.2)
                if name == "fused":
                    low, high = ([p[n] for p in points] for n in ("auc_low", "auc_high"))
                    right.fill_between(tokens, low, high, color=colour, alpha=0.12, lw=0)
        left.axhline(models["fused"][0]["unigram_loss"], color="grey", lw=0.8, ls=":", label="unigram")
        right.axhline(0.5, color="grey", lw=0.8, ls=":")
        left.set(title=f"{corpus}: MLM loss, nats", xlabel="million tokens")
        right.set(title=f"{corpus}: RTD AUC, 95 % of the fused", xlabel="million tokens")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(CURVES, metadata={"Date": None}, facecolor="white")
    plt.close(figure)
