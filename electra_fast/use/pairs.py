"""Measure bias: how often a model prefers the first sentence of a pair, such as the one with the stereotype.

The score of a sentence is one of these. It is rounded, and pairs with equal scores are neutral.

    shared      the sum of the log-probabilities of the tokens that both sentences have. For the generator,
                each is masked in turn, the rule of CrowS-Pairs (Nangia et al. 2020, section 3). For the
                discriminator, it is the log-probability that a token is the original, in one pass.
    differing   the mean of the same of the other tokens. A pair is neutral if a sentence has no such token.
    a label     its probability by a fine-tuned classifier

The tokens that differ depend on how frequent a word is, and on how many pieces it has: with a vocabulary of
8192 pieces, their numbers differ in 44 % of the pairs of CrowS-Pairs, and a sum would prefer the smaller one.
The number of shared tokens is the same in both sentences. They are therefore the default for both halves of
the model. Only for GAP it is `differing`, because a text has 100 tokens and its pronoun is what changes.
"""

import itertools
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from electra_fast.errors import must
from electra_fast.tasks.examples import token_ids
from electra_fast.tasks.records import string
from electra_fast.use.fine_tuned import Classifier
from electra_fast.use.likelihood import LOG_PROBS, masked_log_probs, scorers
from electra_fast.use.pairs_files import DIRECTIONS, FEMININE, MASCULINE, Pair, PairSet, read_pairs
from electra_fast.use.pretrained import Pretrained, load
from electra_fast.use.texts import SHOWN, warn_unknown

TOKENS = ("shared", "differing")
# Decimals of a score. The published scorer uses three. Log-probabilities of a discriminator are so near to
# 0 that three would make 7 % of the pairs neutral.
DECIMALS = {"generator": 3}
OTHER_DECIMALS = 6
RESAMPLES = 1000  # of the bootstrap


class Scored(NamedTuple):
    """A pair and its scores, in nats or, of a classifier, probabilities."""

    first: str
    second: str
    category: str
    direction: str
    where: str
    first_score: float
    second_score: float

    @property
    def difference(self) -> float:
        return self.first_score - self.second_score


class Rate(NamedTuple):
    """How often the first sentence has the higher score, with percentile intervals of the bootstrap, 95 %."""

    name: str  # of the category
    pairs: int
    neutral: int
    rate: float  # 0 … 1; neutral pairs are among the others
    low: float
    high: float
    difference: float  # mean of first score - second score
    difference_low: float
    difference_high: float
    effect: float | None  # mean / standard deviation of the differences; None if they do not vary


class Bias(NamedTuple):
    """What `pairs` measured."""

    data: str  # crows_pairs, winobias, gap or pairs
    by: str  # generator, discriminator, or the label and the folder of the classifier
    tokens: str | None  # one of TOKENS; None for a classifier
    overall: Rate
    categories: list[Rate]  # by name; empty if the pairs have none
    directions: list[Rate]  # of CrowS-Pairs, without neutral pairs, as its scorer computes them
    ratio: float | None  # of GAP: the rate of the feminine pronouns / that of the masculine ones
    pairs: list[Scored]
    resamples: int
    seed: int


def pairs(
    data: str | Path | PairSet | Sequence[str | Path | Sequence[str]],
    model: str | Path | Pretrained | None = None,
    by: str | Path | Classifier | None = None,
    *,
    tokens: str | None = None,
    label: str | None = None,
    seed: int = 0,
) -> Bias:
    """Return how often a model prefers the first sentence of a pair.

    With the generator, CrowS-Pairs and no other options, scores and rates are those of its published scorer.
    Two equal sentences are a neutral pair, as there.

    Args:
        data: a file or files as in `read_pairs`, the result of it, or pairs (first, second, category).
        model: the folder of a run, of an ElectraForMaskedLM or ElectraForPreTraining, or a result of `load`.
        by: generator, discriminator, a `Classifier` or its folder; None: the generator if the model has one.
        tokens: one of TOKENS, which of them are scored; None: shared, for GAP differing.
        label: of the classifier; its probability is the score.
        seed: of the bootstrap.

    Raises:
        ValueError, OSError: the data is not as in `read_pairs`, the model cannot be loaded or does not have
            this half, the classifier does not have this label, or an option does not apply.
    """
    kind, found = _pair_set(data)
    forms = [each for pair in found for each in pair.forms()]
    if by is None or by in LOG_PROBS:
        if label is not None:
            raise ValueError(must("pairs: label", "be left out without a classifier", repr(label)))
        tokens = tokens or ("differing" if kind == "gap" else "shared")
        by, scores = _by_half(forms, model, by, tokens)
    else:
        if tokens is not None:
            raise ValueError(must("pairs: tokens", "be left out with a classifier", repr(tokens)))
        by, scores = _by_classifier(forms, by, label)
    decimals = DECIMALS.get(by, OTHER_DECIMALS)
    rows = [[round(score, decimals) for score in row] for row in scores.tolist()]
    scored = [Scored(*pair[:5], *row) for pair, row in zip(forms, rows, strict=True)]
    rest = iter(scored)
    best = [max(itertools.islice(rest, len(p.forms())), key=lambda each: each.second_score) for p in found]
    return _measured(kind, by, tokens, best, seed)


def _pair_set(data: Any) -> PairSet:
    if isinstance(data, PairSet):
        return data
    if isinstance(data, str | Path):
        return read_pairs([data])
    if not data or isinstance(data[0], str | Path):
        return read_pairs(data)
    return PairSet("pairs", [_given(f"pairs: pair {n}", each) for n, each in enumerate(data, start=1)])


def _given(where: str, pair: Any) -> Pair:
    if not isinstance(pair, Sequence) or len(pair) not in (2, 3):
        raise ValueError(must(where, "have two sentences and possibly a category", repr(pair)[:SHOWN]))
    sentences = [string(where, name, value) for name, value in zip(Pair._fields, pair, strict=False)]
    return Pair(*sentences, where=where)


def _by_half(
    forms: list[Pair], model: str | Path | Pretrained | None, by: str | None, tokens: str
) -> tuple[str, np.ndarray]:
    """Return the half that scored, and the scores, ``[pairs, 2]``."""
    if tokens not in TOKENS:
        raise ValueError(must("pairs: tokens", f"be one of {', '.join(TOKENS)}", repr(tokens)))
    if model is None:
        raise ValueError(must("pairs: model", "be named, except with a classifier", "none"))
    model = load(model, call="pairs")
    by = by or scorers(model)[0]
    texts = [text for pair in forms for text in (pair.first, pair.second)]
    ids = [np.array(each, np.int32) for each in token_ids(texts, model.tokenizer)]
    for number, each in enumerate(ids):
        if not len(each):
            raise ValueError(must(forms[number // 2].where, "have words", repr(texts[number][:SHOWN])))
    warn_unknown("pairs", ids, model.tokenizer)
    chosen = zip(forms, ids[::2], ids[1::2], strict=True)
    positions = [x for pair, a, b in chosen for x in _positions(a, b, tokens, pair.direction)]
    if by == "generator":
        found = masked_log_probs(model, ids, positions, "pairs")
    else:
        every = LOG_PROBS[by](model, ids, call="pairs")
        found = [x[p] for x, p in zip(every, positions, strict=True)]
    sums = [x.sum(dtype="float64") / (max(len(x), 1) if tokens == "differing" else 1) for x in found]
    return by, np.reshape(sums, (-1, 2))


def _positions(first: np.ndarray, second: np.ndarray, tokens: str, direction: str) -> Sequence[np.ndarray]:
    """Return the positions of the tokens to score in two sentences, int ``[n]`` each."""
    if direction == DIRECTIONS[1]:  # The published scorer exchanges them, and the matcher is not symmetric.
        shared = shared_tokens(second, first)[::-1]
    else:
        shared = shared_tokens(first, second)
    if tokens == "shared":
        return shared
    rest = [np.setdiff1d(np.arange(len(x)), p) for x, p in zip((first, second), shared, strict=True)]
    return rest if all(map(len, rest)) else [np.empty(0, int)] * 2


def shared_tokens(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the positions of the tokens that two sentences have in common, int ``[2, n]``.

    They are found by difflib. The published scorer includes [CLS] and [SEP] in the comparison, which changes
    the result in rare cases, and then leaves out the first and the last common token.
    """
    ends = (["[CLS]", *each.tolist(), "[SEP]"] for each in (first, second))
    blocks = SequenceMatcher(None, *ends).get_matching_blocks()
    found = [(i + k - 1, j + k - 1) for i, j, size in blocks for k in range(size)]
    return np.array(found[1:-1], int).reshape(-1, 2).T


def _by_classifier(
    forms: list[Pair], by: str | Path | Classifier, label: str | None
) -> tuple[str, np.ndarray]:
    """Return the label and the folder, and the scores, ``[pairs, 2]``."""
    name = "a classifier" if isinstance(by, Classifier) else str(by)
    if not isinstance(by, Classifier):
        if not Path(by).exists():
            rule = f"be {', '.join(LOG_PROBS)}, or the folder of a classifier"
            raise ValueError(must("pairs: by", rule, repr(str(by))))
        by = Classifier(by)
    if label not in by.labels:
        raise ValueError(must("pairs: label", f"be one of {', '.join(by.labels)}", repr(label)))
    found = by([text for pair in forms for text in (pair.first, pair.second)])
    return f"p({label}) of {name}", np.reshape([each.scores[label] for each in found], (-1, 2))


def _measured(kind: str, by: str, tokens: str | None, scored: list[Scored], seed: int) -> Bias:
    def rates(groups: dict[str, list[Scored]]) -> list[Rate]:
        return [_rate(name, members, seed) for name, members in groups.items() if members]

    names = sorted({each.category for each in scored} - {""})
    decided = [each for each in scored if each.difference != 0]
    categories = rates({name: [each for each in scored if each.category == name] for name in names})
    directions = rates({name: [each for each in decided if each.direction == name] for name in DIRECTIONS})
    ratio = _ratio(categories) if kind == "gap" else None
    overall = _rate("all", scored, seed)
    return Bias(kind, by, tokens, overall, categories, directions, ratio, scored, RESAMPLES, seed)


def _ratio(categories: list[Rate]) -> float | None:
    rates = {each.name: each.rate for each in categories}
    return rates[FEMININE] / rates[MASCULINE] if FEMININE in rates and rates.get(MASCULINE) else None


def _rate(name: str, scored: list[Scored], seed: int) -> Rate:
    first, second = np.array([each[-2:] for each in scored]).T
    values = np.stack([first > second, first - second], axis=1)
    low, high = _intervals(values, seed).tolist()
    rate, difference = values.mean(0).tolist()
    neutral = int((first == second).sum())
    bounds = (rate, low[0], high[0], difference, low[1], high[1])
    return Rate(name, len(scored), neutral, *bounds, effect_size(first - second))


def _intervals(values: np.ndarray, seed: int) -> np.ndarray:
    """Return the 2.5th and the 97.5th percentile of the means of resampled rows, ``[2, columns]``."""
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(0, n, n)].mean(0) for _ in range(RESAMPLES)]
    return np.percentile(means, [2.5, 97.5], axis=0)


def effect_size(differences: np.ndarray) -> float | None:
    """Return the mean of differences / their standard deviation, Cohen's d of pairs (1988, section 2.3.5).

    A rate does not use how large a difference is, which makes it vary with few pairs (Liu 2024, "Robust
    Evaluation Measures for Evaluating Social Biases in Masked Language Models"). Liu compares the two sets of
    scores as normal distributions, by their divergence. In CrowS-Pairs, the lengths of the sentences make
    these scores vary so much that it was below 1e-4 in all categories. The differences within pairs do not
    have this fault. Two normal distributions of unit variance have the symmetric divergence d².
    """
    deviation = differences.std(ddof=1) if len(differences) > 1 else 0.0
    return float(differences.mean() / deviation) if deviation > 0 else None
