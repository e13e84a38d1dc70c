"""Better words: the generator proposes them, and the discriminator ranks them.

For corrections, for paraphrases, and to make more training data of some texts.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from electra_fast.errors import must
from electra_fast.tasks.examples import assemble
from electra_fast.use.detect import THRESHOLD, Detected, Word, of_words, require_threshold
from electra_fast.use.likelihood import at_masks, replaced_logits
from electra_fast.use.pretrained import Pretrained, load, most_tokens
from electra_fast.use.texts import Tokens, is_one, listed, tokens_of, windows

Span = tuple[int, int]
UNUSED = "[unused]"  # a row of the word table without a piece


class Candidate(NamedTuple):
    text: str
    generator: float  # its probability in place of the word
    discriminator: float  # the probability that it does not belong there either


class Suggestion(NamedTuple):
    """A word of the text and what could be in its place, the best first."""

    word: str
    start: int  # offset of its first character in the text
    end: int
    probability: float  # that it does not belong
    candidates: list[Candidate]


class Suggested(NamedTuple):
    text: str
    suggestions: list[Suggestion]

    def corrected(self) -> str:
        """Return the text with the first candidate for each word that belongs less than it."""
        text, end = "", 0
        for each in self.suggestions:
            better = each.candidates and each.candidates[0].discriminator < each.probability
            text += self.text[end : each.start] + (each.candidates[0].text if better else each.word)
            end = each.end
        return text + self.text[end:]


def suggest(
    texts: Sequence[str],
    model: str | Path | Pretrained,
    spans: Sequence[Sequence[Span]] | None = None,
    *,
    top: int = 5,
    threshold: float = THRESHOLD,
) -> list[Suggested] | Suggested:
    """Return other words for the words of a text that do not belong, or for those at `spans`.

    Each word is replaced alone by one [MASK]. The `top` pieces that the generator finds most probable there,
    which are whole words, are put into its place and ranked by the discriminator.

    Args:
        texts: texts; for one text, the result is not a list, and `spans` is a list of its spans.
        model: the folder of a run of pre-training, which has both halves, or the result of `load`.
        spans: for each text, (start, end) of the characters to replace; words that they touch are replaced
            whole. None: the words that `detect` finds with a probability above `threshold`.
        top: candidates per word.

    Raises:
        ValueError, OSError: a text has no word, a span contains none, `top` or `threshold` is out of range,
            or the model cannot be loaded or does not have both halves.
    """
    texts = listed("suggest: texts", texts)
    if is_one(texts):
        (found,) = suggest([texts], model, None if spans is None else [spans], top=top, threshold=threshold)
        return found
    if top < 1:
        raise ValueError(must("suggest: top", "be 1 or more", top))
    require_threshold("suggest: threshold", threshold)
    if spans is not None and len(spans) != len(texts):
        raise ValueError(must("suggest: spans", f"have a list for each of {len(texts)} texts", len(spans)))
    model = load(model, call="suggest")
    halves = [model.require("suggest", half) for half in ("generator", "discriminator")]
    most = min(most_tokens(half) for half in halves)
    found = tokens_of("suggest", texts, model.tokenizer)
    logits = replaced_logits(model, [tokens.ids for tokens in found], "suggest")
    detected = [of_words(*each) for each in zip(found, logits, strict=True)]
    if spans is None:
        chosen = [[i for i, word in enumerate(x.words) if word.probability > threshold] for x in detected]
    else:
        chosen = [_words_at(*each) for each in zip(detected, spans, strict=True)]
    slots = [_slot(found[n], i, most) for n, words in enumerate(chosen) for i in words]
    candidates = iter(_candidates(model, slots, top))

    def suggestions(words: list[Word], numbers: list[int]) -> list[Suggestion]:
        return [Suggestion(*words[i], next(candidates)) for i in numbers]

    return [
        Suggested(each.text, suggestions(each.words, numbers))
        for each, numbers in zip(detected, chosen, strict=True)
    ]


class _Slot(NamedTuple):
    """A word to replace, with as much of its text as fits into the model."""

    ids: list[int]  # the first token of the word stands for the word
    position: int  # of that token

    def filled(self, i: int) -> np.ndarray:
        return np.array([*self.ids[: self.position], i, *self.ids[self.position + 1 :]], np.int32)


def _slot(tokens: Tokens, word: int, most: int) -> _Slot:
    (first, *_, last) = np.flatnonzero(tokens.words == word).tolist() * 2
    cut = windows(np.ones(len(tokens.ids), int), most)
    window = next(each for each in cut if each.first <= first < each.last)
    ids = [*tokens.ids[window.begin : first + 1].tolist(), *tokens.ids[last + 1 : window.end].tolist()]
    return _Slot(ids, first - window.begin)


def _words_at(detected: Detected, spans: Sequence[Span]) -> list[int]:
    """Return the numbers of the words that the spans touch, each once, in order."""
    numbers = set()
    for span in spans:
        if not hasattr(span, "__len__") or len(span) != 2:
            rule = "be (start, end), in a list for each text"
            raise ValueError(must("suggest: each span", rule, repr(span)))
        start, end = span
        touched = {i for i, word in enumerate(detected.words) if word.start < end and start < word.end}
        if not touched:
            rule = "contain a word of its text"
            raise ValueError(must("suggest: each span", rule, f"({start}, {end})"))
        numbers |= touched
    return sorted(numbers)


def _candidates(model: Pretrained, slots: list[_Slot], top: int) -> list[list[Candidate]]:
    """Return the candidates for each slot, the one that the discriminator prefers first."""
    if not slots:
        return []
    rows = len(model.generator.encoder.embedding.words)
    pieces = [model.tokenizer.id_to_token(i) or UNUSED for i in range(rows)]
    ids, shares = _proposed(model, slots, pieces, top)
    filled = [slot.filled(i) for slot, row in zip(slots, ids, strict=True) for i in row]
    logits = iter(replaced_logits(model, filled, "suggest"))
    found = []
    for slot, row, share in zip(slots, ids.tolist(), shares.tolist(), strict=True):
        replaced = [1 / (1 + math.exp(-next(logits)[slot.position])) for _ in row]
        each = map(Candidate, (pieces[i] for i in row), share, replaced)
        found.append(sorted(each, key=lambda candidate: candidate.discriminator))
    return found


def _proposed(
    model: Pretrained, slots: list[_Slot], pieces: list[str], top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pieces that the generator finds most probable, and their probabilities, ``[slots, top]``.

    They are whole words, other than the first token of the slot's word, and have letters or digits if it has.
    """
    generator = model.generator
    whole = torch.tensor([not re.match(r"##|\[.+\]$", piece) for piece in pieces], device=model.device)
    lettered = torch.tensor([any(map(str.isalnum, piece)) for piece in pieces], device=model.device)
    top = min(top, int((whole & lettered).sum()) - 1)

    def best(x: Tensor, original: Tensor) -> Tensor:  # [m, W], [m] -> [m, 2, top]
        logits = generator.head.logits(x, generator.encoder.embedding.words).float()
        allowed = whole & (lettered | ~lettered[original][:, None])
        allowed[torch.arange(len(original)), original] = False
        values, ids = logits.masked_fill(~allowed, -torch.inf).topk(top)
        shares = (values - logits.logsumexp(1, keepdim=True)).exp()
        return torch.stack([ids.float(), shares], dim=1)  # a float32 has 24 bits, enough for an id

    longest = max(len(slot.ids) for slot in slots) + 2
    examples = assemble([slot.ids for slot in slots], None, model.tokenizer, longest)
    numbers, positions = np.arange(len(slots)), np.array([slot.position + 1 for slot in slots])
    found = at_masks(model, generator, examples, numbers, positions, best, "suggest")
    return found[:, 0].astype(np.int64), found[:, 1]
