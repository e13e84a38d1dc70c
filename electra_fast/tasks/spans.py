"""The best spans of a context, from the logits of its windows (Devlin et al. 2019, sections 4.2 and 4.3)."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from electra_fast.errors import must
from electra_fast.tasks.windows import Window


class Prediction(NamedTuple):
    """An answer, as a span of the context."""

    text: str
    start: int  # offset of the first character in the context
    score: float  # logit of its first token as a start + logit of its last token as an end
    null_difference: float  # score of "no answer" - score; above a threshold, SQuAD 2.0 answers nothing


def best_spans(
    context: str,
    windows: Sequence[Window],
    starts: Sequence[np.ndarray],
    ends: Sequence[np.ndarray],
    *,
    n_best: int = 20,
    max_tokens: int = 30,
) -> list[Prediction]:
    """Return the best spans of a question's context, at least one and at most `n_best`, the best first.

    A span begins at a token that has its maximum context in the window, and has `max_tokens` tokens or fewer.
    The score of "no answer" is that of [CLS] as start and end, in the window where it is least. Of equal
    spans, the one in the earlier window, with the earlier start, and then the shorter one comes first.

    Args:
        context: of the question.
        windows: all windows of the question.
        starts, ends: the logits of each window, ``[>= L]``, any float dtype; those of padding are ignored.

    Raises:
        ValueError: n_best or max_tokens is below 1, there are fewer logits than tokens, or one is not finite.
    """
    for name, value in (("n_best", n_best), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(must(f"best_spans: {name}", "be 1 or more", value))
    found, null = [], np.inf
    for window, start, end in zip(windows, starts, ends, strict=True):
        start, end = _logits("starts", start, window), _logits("ends", end, window)
        null = min(null, float(start[0] + end[0]))
        found.extend(_spans(window, start, end, n_best, max_tokens))
    found.sort(key=lambda span: -span[0])
    return [Prediction(context[a:b], a, score, null - score) for score, a, b in found[:n_best]]


def _logits(name: str, logits: np.ndarray, window: Window) -> np.ndarray:
    tokens = len(window.ids)
    if len(logits) < tokens:
        raise ValueError(must(f"best_spans: {name}", f"have {tokens} logits, one per token", len(logits)))
    if not np.isfinite(logits[:tokens]).all():
        raise ValueError(must(f"best_spans: {name}", "be finite", "NaN or infinity"))
    return logits[:tokens]


def _spans(
    window: Window, start: np.ndarray, end: np.ndarray, n_best: int, max_tokens: int
) -> Iterator[tuple[float, int, int]]:
    """Yield the score, the first character and the one after the last, for the best spans of a window."""
    tokens = len(window.spans)
    inside = slice(window.context, window.context + tokens)
    begins = np.where(window.best, start[inside], -np.inf)
    ends = np.concatenate([end[inside], np.full(max_tokens - 1, -np.inf, end.dtype)])
    # Row: the first token. Column: the number of tokens after it.
    scores = begins[:, None] + np.lib.stride_tricks.sliding_window_view(ends, max_tokens)
    for i in _highest(scores.ravel(), n_best):
        first, more = divmod(int(i), max_tokens)
        score = float(scores[first, more])
        if score > -np.inf:
            yield score, int(window.spans[first, 0]), int(window.spans[first + more, 1])


def _highest(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the highest scores in descending order; of equal ones, the lower index first."""
    count = min(count, len(scores))
    least = np.partition(scores, -count)[-count]
    candidates = np.flatnonzero(scores >= least)
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]
