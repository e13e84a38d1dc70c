"""A measurement of bias as a table for the terminal, and as a page that says what it does not mean."""

from collections.abc import Iterator, Sequence
from html import escape

from electra_fast.pages import document, table
from electra_fast.tables import text_table
from electra_fast.use.pairs import Bias, Rate, Scored

# What the first sentence of a pair is.
FIRST = {
    "crows_pairs": "the sentence that stereotypes more",
    "winobias": "the pro-stereotyped sentence",
    "gap": "the original pronoun",
    "pairs": "the first sentence",
}
HEAD = ("", "pairs", "neutral", "rate", "95 %", "difference", "95 %", "effect")
SHOWN = 10  # pairs with the largest differences
AROUND = 100  # characters that are shown on both sides of a difference
WIDTH, ROW = 640, 24
LEFT, RIGHT, BOTTOM = 190, 20, 26  # the margins around the axis from 0 to 100 %
STYLE = """
.rates { width: 100%; max-width: 46rem; margin: 1rem 0 }
.rates .half { stroke: var(--soft); stroke-dasharray: 4 3 }
.rates .interval { stroke: currentColor; stroke-width: 2 }
.rates text.name { fill: var(--ink) }
li { margin: .4rem 0; max-width: 46rem }
"""

LIMITS = (
    "A rate of 50 % does not mean that the model has no bias. Preferences in both directions can cancel each "
    "other, and a model that has learned little is near 50 % by chance.",
    "A rate is a property of these pairs. It says little about what an application does with the model: such "
    "measures often do not agree with those of applications (Goldfarb-Tarrant et al. 2021, “Intrinsic Bias "
    "Metrics Do Not Correlate with Application Bias”).",
    "An interval describes the choice of the pairs only. Another seed of pre-training gives another rate "
    "too (Sellam et al. 2022, “The MultiBERTs”), and pairs of a category may depend on each other.",
    "The scores of models with different vocabularies, sizes or training cannot be compared: a difference in "
    "nats grows with the confidence of a model, and a rate depends on how well it knows the words.",
)
LIMITS_OF = {
    "crows_pairs": (
        "Many pairs of CrowS-Pairs do not state a stereotype, differ in more than the group, or are not "
        "correct sentences (Blodgett et al. 2021, “Stereotyping Norwegian Salmon”). The authors of the set "
        "write that it may not be a good indicator of bias.",
        "The set is in English, and its stereotypes are those of the United States (Nangia et al. 2020).",
        "If the rate of one direction is above 50 % and that of the other one below it, the model may prefer "
        "the words for one group, whatever the sentence says about it. A small model after 300 steps of "
        "pre-training, which can hardly know a stereotype, had 57 % and 45 %, and 65 % in race-color.",
    ),
    "winobias": (
        "The rate is not the measure of WinoBias (Zhao et al. 2018), which is the difference between the F1 "
        "of coreference in both files. This measurement needs no coreference.",
        "If the rate of one gender is high and that of the other one low, the model prefers one pronoun, "
        "whatever the occupation is.",
        "Pairs of WinoBias have some of the faults of other sets (Blodgett et al. 2021, “Stereotyping "
        "Norwegian Salmon”). Its stereotypes are those of the statistics of labour in the United States.",
    ),
    "gap": (
        "The rate is not the measure of GAP (Webster et al. 2018), which is the F1 of coreference, and the "
        "ratio is not its bias factor, the F1 of feminine pronouns / that of masculine ones. This "
        "measurement needs no coreference: it asks which gender of the pronoun the model expects.",
        "Names and other pronouns usually tell the gender. A model that uses them is near 100 %, and 50 % is "
        "chance. A low rate of one gender shows that the model prefers the other one.",
        "“her” is compared with the more probable one of “his” and “him”, which lowers its rate a little. "
        "The pronouns are binary, and the texts are from the English Wikipedia.",
    ),
    "pairs": ("A rate means something only if the sentences of a pair differ in nothing but the group.",),
}


def text(bias: Bias) -> str:
    """Return the rates as a table for the terminal."""
    rows = [HEAD, *(cells(each) for each in (bias.overall, *bias.categories, *bias.directions))]
    lines = [summary(bias), text_table(rows, right=range(1, len(HEAD)))]
    if bias.ratio is not None:
        lines.append(f"feminine / masculine: {bias.ratio:.3f}")
    return "\n".join([*lines, "50 % does not mean that there is no bias; the page lists other limits."])


def summary(bias: Bias) -> str:
    """Return what the rate is, as a sentence."""
    by = f"the {bias.by}, from the {bias.tokens} tokens" if bias.tokens else bias.by
    return (
        f"Rate: share of the pairs in which {FIRST[bias.data]} has the higher score, by {by}. "
        f"Intervals: 95 %, {bias.resamples} resamples."
    )


def cells(rate: Rate) -> tuple[str, ...]:
    """Return a row of a table with the columns of HEAD."""
    shares = (f"{100 * rate.rate:.1f} %", f"{100 * rate.low:.1f} … {100 * rate.high:.1f}")
    differences = (f"{rate.difference:.4f}", f"{rate.difference_low:.4f} … {rate.difference_high:.4f}")
    last = "\N{EN DASH}" if rate.effect is None else f"{rate.effect:.2f}"
    return (rate.name, str(rate.pairs), str(rate.neutral), *shares, *differences, last)


def page(bias: Bias, model: str) -> str:
    """Return a page about a measurement.

    Args:
        model: its name, for the title.
    """
    about = f"{summary(bias)} Effect: mean of the differences / their standard deviation."
    parts = [f"<p>{escape(about)}</p>", picture([bias.overall, *bias.categories, *bias.directions])]
    parts += [_rates([bias.overall, *bias.categories]), *_directions(bias)]
    if bias.ratio is not None:
        parts.append(f"<p>Rate of the feminine pronouns / rate of the masculine ones: {bias.ratio:.3f}.</p>")
    parts += ["<h2>What this number does not mean</h2>", _limits(bias), "<h2>The largest differences</h2>"]
    parts += ["<p>These sentences may contain offensive stereotypes.</p>", _largest(bias.pairs)]
    return document(f"Preferences between sentences, by {model}", parts, STYLE)


def picture(rates: Sequence[Rate]) -> str:
    """Return the rates with their intervals on an axis from 0 to 100 %, one below the other."""
    height = ROW * len(rates) + BOTTOM
    said = "; ".join(f"{rate.name}: {100 * rate.rate:.1f} %" for rate in rates)
    return (
        f'<svg class="rates" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>Rates and their intervals</title><desc>{escape(said)}</desc>{''.join(_grid(height))}"
        f"{''.join(_mark(rate, ROW * n + ROW // 2) for n, rate in enumerate(rates))}</svg>"
    )


def _across(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _grid(height: int) -> Iterator[str]:
    for percent in (0, 25, 50, 75, 100):
        x, name = _across(percent / 100), "half" if percent == 50 else "grid"
        yield f'<path class="{name}" d="M{x} 0V{height - BOTTOM}"/>'
        yield f'<text x="{x}" y="{height - 8}" text-anchor="middle">{percent} %</text>'


def _mark(rate: Rate, y: int) -> str:
    low, middle, high = map(_across, (rate.low, rate.rate, rate.high))
    return (
        f'<text class="name" x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(rate.name[:28])}</text>'
        f'<g class="blue"><path class="interval" d="M{low} {y}H{high}"/>'
        f'<circle cx="{middle}" cy="{y}" r="4.5" fill="currentColor"/></g>'
    )


def _rates(rates: Sequence[Rate]) -> str:
    return table(HEAD, [cells(rate) for rate in rates])


def _directions(bias: Bias) -> list[str]:
    if not bias.directions:
        return []
    note = (
        "The pairs by direction, without the neutral ones. In “stereo”, the first sentence shows a "
        "stereotype of a disadvantaged group; in “antistereo”, the second one violates it."
    )
    return [f"<p>{note}</p>", _rates(bias.directions)]


def _limits(bias: Bias) -> str:
    return f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in (*LIMITS_OF[bias.data], *LIMITS))}</ul>"


def _largest(pairs: Sequence[Scored]) -> str:
    largest = sorted(pairs, key=lambda pair: -abs(pair.difference))[:SHOWN]
    head = ("first", "second", "category", "first score", "second score", "difference")
    rows = [
        (
            *_shown(pair.first, pair.second),
            pair.category,
            pair.first_score,
            pair.second_score,
            pair.difference,
        )
        for pair in largest
    ]
    return table(head, rows)


def _shown(first: str, second: str) -> list[str]:
    """Return two texts without what is far from the first character in which they differ."""
    both = zip(first, second, strict=False)
    middle = next((i for i, (a, b) in enumerate(both) if a != b), min(len(first), len(second)))
    begin = max(0, middle - AROUND)
    return [
        f"{'…' if begin else ''}{text[begin : middle + AROUND]}{'…' if len(text) > middle + AROUND else ''}"
        for text in (first, second)
    ]
