"""Find the words of a text that do not belong, with the discriminator in one pass."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from electra_fast.errors import must
from electra_fast.pages import document
from electra_fast.use.likelihood import replaced_logits
from electra_fast.use.pretrained import Pretrained, load
from electra_fast.use.texts import Text, Tokens, one_or_many, tokens_of

THRESHOLD = 0.5  # a word that is more probably replaced than original


class Word(NamedTuple):
    text: str
    start: int  # offset of its first character in the text
    end: int  # and of the one after its last
    probability: float  # that it does not belong


class Detected(NamedTuple):
    """A text and its words; a punctuation mark is a word."""

    text: str
    words: list[Word]

    def flagged(self, threshold: float = THRESHOLD) -> list[Word]:
        """Return the words whose probability is above the threshold."""
        return [word for word in self.words if word.probability > threshold]


@one_or_many
def detect(texts: Sequence[Text], model: str | Path | Pretrained) -> list[Detected]:
    """Return, for each word of a text, the probability that it does not belong there.

    It is sigmoid(logit) of the discriminator (Clark et al. 2020, section 2), and for a word of several tokens
    the highest of theirs. A text longer than the model is read in windows that overlap.

    Args:
        texts: texts, or lists of token ids without [CLS] and [SEP]; for one text, the result is not a list.
        model: the folder of a run or of an ElectraForPreTraining, or the result of `load`.

    Raises:
        ValueError, OSError: a text has no word, or the model cannot be loaded or has no discriminator.
    """
    model = load(model, call="detect")
    found = tokens_of("detect", texts, model.tokenizer)
    logits = replaced_logits(model, [tokens.ids for tokens in found])
    return [of_words(tokens, each) for tokens, each in zip(found, logits, strict=True)]


def of_words(tokens: Tokens, logits: np.ndarray) -> Detected:
    """Return the words of a text from the logits of its tokens, ``[n]``."""
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    first = np.flatnonzero(np.diff(tokens.words, prepend=-1))
    highest = np.maximum.reduceat(probability, first)
    spans = tokens.word_spans().tolist()
    words = [Word(tokens.text[a:b], a, b, p) for (a, b), p in zip(spans, highest.tolist(), strict=True)]
    return Detected(tokens.text, words)


def require_threshold(argument: str, threshold: float) -> None:
    """Raise a ValueError if a threshold is not a probability; `argument` begins the message."""
    if not 0 <= threshold <= 1:
        raise ValueError(must(argument, "be in [0, 1]", threshold))


def marked(detected: Detected, threshold: float = THRESHOLD) -> str:
    """Return the text with its flagged words in brackets: "the [banana 0.93] of the house"."""
    text, end = "", 0
    for word in detected.flagged(threshold):
        text += f"{detected.text[end : word.start]}[{word.text} {word.probability:.2f}]"
        end = word.end
    return text + detected.text[end:]


STYLE = """
.text { max-width: 46rem; white-space: pre-wrap; line-height: 1.8 }
.text span { border-radius: 3px; padding: 1px 0 }
"""


def page(detected: Sequence[Detected], model: str) -> str:
    """Return a page with the texts, each word shaded by its probability."""
    note = "The darker a word, the more probably it does not belong. Point at a word to see its probability."
    texts = "".join(f'<p class="text">{_shaded(each)}</p>' for each in detected)
    return document(f"Words that do not belong, by {model}", [f"<p>{note}</p>", texts], STYLE)


def _shaded(detected: Detected) -> str:
    html, end = "", 0
    for word in detected.words:
        share = round(100 * word.probability)
        colour = f"color-mix(in srgb, var(--vermilion) {share}%, transparent)"
        shaded = (
            f'<span style="background: {colour}" title="{word.probability:.3f}">{escape(word.text)}</span>'
        )
        html += escape(detected.text[end : word.start]) + shaded
        end = word.end
    return html + escape(detected.text[end:])
