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
ENCODERS = {"fused": "ELECTRA's discriminator", "masked": "masked LM"}


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
    known, error = spread(_entropy(final(run, "replaced")) - final(run, "rtd_loss") for run in fused)
    lines = [
        f"- The MLM loss is {gain:.2f} nats below the unigram's; 0.3 were aimed at: {_yes(gain >= 0.3)}.",
        f"- The AUC's 95 % interval is above 0.5 at the end in {sum(above)} of {len(above)} runs. "
        f"From the first evaluation {_rise(fused, 0)}; from a quarter of the run {_rise(fused, 0.25)}. "
        "Each AUC is against the generator of its step.",
        f"- The RTD loss is {known:.4f} ± {error:.4f} nats below the best answer that is the same for "
        f"all tokens; by more than two standard errors: {_yes(known > 2 * error)}.",
    ]
    for name, title in (("mlm_loss", "MLM loss"), ("auc", "AUC")):
        (a, da), (b, db) = spread(column(fused, name)), spread(column(reference, name))
        noise = 2 * math.hypot(da, db)
        verdict = "within" if abs(a - b) <= noise else "outside"
        lines.append(
            f"- {title}, fused less reference: {a - b:+.4f}, {verdict} two standard errors, {noise:.4f}."
        )
    return lines


def _rise(runs: list[dict], share: float) -> str:
    """Say how the AUC changes from the first evaluation after this share of the run to its end."""
    first = [next(p["auc"] for p in run["curve"] if p["step"] >= share * run["steps"]) for run in runs]
    change, error = spread(b - a for a, b in zip(first, column(runs, "auc"), strict=True))
    word = _sign(change, error, "rises", "falls", "does neither for sure")
    return f"({mean(first):.3f}) it {word}: {change:+.3f} ± {error:.3f}"


def _entropy(p: float) -> float:
    """Return the nats that the best constant answer loses where a share p is replaced."""
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


def _claim(results: dict) -> list[str]:
    flops = results["flops"]
    probes = {name: [p for p in results["probes"] if p["model"] == name] for name in ENCODERS}
    steps = {name: found[0]["steps"] for name, found in probes.items()}
    lines = [
        "## Replaced-token detection against masking alone",
        "",
        f"A masked language model of the discriminator's size gets as many FLOPs: a step of it takes "
        f"{flops['masked'] / 1e9:.2f} GFLOP in its products, forward and backward, one of ELECTRA "
        f"{flops['electra'] / 1e9:.2f}; so {steps['masked']:,} steps against {steps['fused']:,}. Text "
        f"({results['probes'][0]['corpus']}), vocabulary, rates and seeds are the same.",
        "",
        f"| probe | {' | '.join(ENCODERS.values())} | difference | untrained | bag of words | majority |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    verdicts = []
    for key, title in PROBES.items():
        one, other = ([p[key][0] for p in probes[name]] for name in ("fused", "masked"))
        (a, da), (b, db) = spread(one), spread(other)
        error, ahead = math.hypot(da, db), "ELECTRA" if a > b else "the masked LM"
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
        sure = "more than" if abs(a - b) > 2 * error else "no more than"
        verdicts.append(
            f"- {title}: {ahead} is ahead by {abs(a - b):.3f}, {sure} twice the standard error of the seeds."
        )
    standing = (_standing(ENCODERS[name], found) for name, found in probes.items())
    return [*lines, "", *verdicts, *standing, "", *_by_seed(probes)]


def _standing(title: str, probes: list[dict]) -> str:
    """Say where an encoder stands beside what needs no pre-training."""
    found = []
    for key, rival in (("untrained", "its first weights"), ("words", "a bag of words")):
        change, error = spread(p["sentiment"][0] - p[f"sentiment_{key}"][0] for p in probes)
        word = _sign(change, error, "ahead of", "behind", "not surely apart from")
        found.append(f"{word} {rival} ({change:+.3f} ± {error:.3f})")
    above = sum(p["pairs"][1] > 0.5 for p in probes)
    chance = f"the interval is above chance in {above} of {len(probes)} runs"
    return f"- {title}: on GoEmotions {', '.join(found)}; on BLiMP {chance}."


def _sign(change: float, error: float, up: str, down: str, neither: str) -> str:
    """Return a word for a change, which must be more than two standard errors to be one."""
    return up if change > 2 * error else down if change < -2 * error else neither


def _by_seed(probes: dict[str, list[dict]]) -> list[str]:
    """Return a row a run; the intervals are binomial in sentiment, by the paradigms' spread in grammar."""
    lines = [f"| encoder | seed | {' | '.join(PROBES.values())} |", "| --- | ---: | ---: | ---: |"]
    for name, title in ENCODERS.items():
        for p in probes[name]:
            cells = ("{:.3f} [{:.3f}, {:.3f}]".format(*p[key]) for key in PROBES)
            lines.append(f"| {title} | {p['seed']} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Intervals of 95 %: binomial in sentiment, by the spread of the paradigms in grammar.",
    ]


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
    rows = len(corpora)
    figure, axes = plt.subplots(rows, 2, figsize=(9, 3 * rows), squeeze=False, layout="constrained")
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
