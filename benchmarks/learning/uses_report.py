"""The section of LEARNING.md about `benchmarks/learning/uses.py`."""

from typing import Any

from benchmarks.learning.numbers import with_error


def section(found: dict[str, Any]) -> list[str]:
    run, default = found["pretraining"], found["default"]
    tokens = run["steps"] * run["batch_tokens"]
    lines = [
        "## What a small discriminator is good for",
        "",
        f"Preset {run['preset']} ({', '.join(run['set']) or 'no changes'}) after {run['steps']:,} steps of "
        f"{run['batch_tokens']:,} tokens: {tokens / 1e6:.1f} million tokens in sequences of {run['seq']}, "
        f"{run['seconds'] / 60:.0f} minutes on one thread, {run['vocabulary']:,} pieces. The default model "
        f"is that of README's first command, after {default['steps']:,} steps of "
        f"{default['batch_tokens']:,} tokens. Each passage fills a sequence. All checkpoints "
        "read the samples of the last one's generator, the default model those of its own. Measured by "
        f"`python -m benchmarks.learning.uses` on one thread of {found['machine']} with torch "
        f"{found['torch']}.",
        "",
        "| `use detect`: AUC of a passage with replaced tokens | by any piece | by the generator |",
        "| --- | ---: | ---: |",
    ]
    rows: dict[str, list[str]] = {}
    for each in [*found["detect"], *found["detect by default"]]:
        rows.setdefault(each["model"], []).append(with_error(*each["auc"]))
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += ["", *_verdicts(found["detect"]), "", *_functions(found)]
    return lines


def _verdicts(detected: list[dict[str, Any]]) -> list[str]:
    lines = []
    for by in dict.fromkeys(each["by"] for each in detected):
        values = [each["auc"] for each in detected if each["by"] == by]
        (first, a), (last, b) = values[0], values[-1]
        error = (a**2 + b**2) ** 0.5
        change = "rises" if last - first > 2 * error else "does not rise"
        chance = "above" if last - 0.5 > 2 * b else "not above"
        lines.append(
            f"- Replaced by {by}: with training the AUC {change} ({first:.3f} to {last:.3f}); at the end it "
            f"is {chance} chance by more than two standard errors."
        )
    return lines


def _functions(found: dict[str, Any]) -> list[str]:
    suggested, chosen, scored, ranked = (found[name] for name in ("suggest", "choose", "score", "rank"))
    understood, biased = found["intent"], found["pairs"]
    cells = [
        (
            "suggest",
            "a word of a passage replaced by another one",
            f"the original is first in {suggested['first']:.1%}, among five in {suggested['among five']:.1%} "
            f"(the generator's first: {suggested['first of the generator']:.1%})",
        ),
        (
            "choose",
            "GoEmotions, positive or negative",
            f"accuracy {chosen['accuracy']:.3f} (majority {chosen['majority']:.3f})",
        ),
        (
            "score",
            f"BLiMP, {scored['pairs']:,} minimal pairs",
            f"accuracy {scored['generator']:.3f} by the generator, {scored['discriminator']:.3f} by the "
            "discriminator (chance 0.500)",
        ),
        (
            "pairs",
            "CrowS-Pairs",
            " ".join(
                f"{100 * each['rate']:.1f} % [{100 * each['low']:.1f}, {100 * each['high']:.1f}] by the {by};"
                for by, each in biased.items()
                if by != "seconds"
            ).rstrip(";"),
        ),
        (
            "intent",
            "SNIPS, fine-tuned",
            f"intents {understood['intent']:.3f}, all slots of an utterance {understood['slots']:.3f}",
        ),
        (
            "rank",
            "Banking77, ten labels per query, fine-tuned",
            f"MRR {ranked['mrr']:.3f} (by chance {ranked['mrr by chance']:.3f}), first {ranked['first']:.3f}",
        ),
    ]
    lines = ["| `use` | data | result | CPU seconds |", "| --- | --- | --- | ---: |"]
    return lines + [
        f"| `{name}` | {data} | {said} | {found[name]['seconds']:.0f} |" for name, data, said in cells
    ]
