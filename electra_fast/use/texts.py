"""Texts as tokens, with the words that they belong to and their places in the text; windows of long texts."""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from electra_fast.data import special_ids
from electra_fast.data.unknown import LIMIT
from electra_fast.errors import must
from electra_fast.tasks.examples import encodings
from electra_fast.tasks.records import require_unicode
from electra_fast.tasks.windows import with_accents

Text = str | Sequence[int]  # a text, or its token ids without [CLS] and [SEP]
SHOWN = 60  # characters of a text in a message
LARGEST = np.iinfo(np.int32).max  # of an id


class Tokens(NamedTuple):
    """A text of n tokens, without [CLS] and [SEP]."""

    text: str
    ids: np.ndarray  # [n] int32
    spans: np.ndarray  # [n, 2] int: the first character of a token, and the one after its last
    words: np.ndarray  # [n] int: the number of the word of a token, from 0 on

    def word_spans(self) -> np.ndarray:
        """Return the characters of each word, int ``[W, 2]``, as in `spans`."""
        first = np.flatnonzero(np.diff(self.words, prepend=-1))
        last = np.append(first[1:], len(self.words)) - 1
        return np.stack([self.spans[first, 0], self.spans[last, 1]], axis=1)


def one_or_many(function: Callable) -> Callable:
    """Let a function of a list of texts take one text too, for which it returns one result."""

    @functools.wraps(function)
    def wrapped(texts: Any, *args: Any, **options: Any) -> Any:
        texts = listed(f"{function.__name__}: texts", texts)
        if is_one(texts):
            return function([texts], *args, **options)[0]
        return function(texts, *args, **options)

    return wrapped


def listed(argument: str, texts: Any) -> str | list[Any]:
    """Return one text, or a list of texts or of anything else that is not an array.

    Arrays, tensors, columns of a table, tuples and generators become lists, inside of a list too.

    Raises:
        TypeError: it is not iterable, is bytes or is a dict; `argument` begins the message.
    """
    texts = _without_array(texts)
    if isinstance(texts, str):
        return texts
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(must(argument, "be a string or a list", type(texts).__name__))
    return [_without_array(text) for text in texts]


def _without_array(x: Any) -> Any:
    return x.tolist() if hasattr(x, "tolist") else x


def is_one(text: Any) -> bool:
    """Return whether `text` is one text, or ids, and not a list of texts."""
    return isinstance(text, str) or (
        _is_list(text) and len(text) > 0 and isinstance(text[0], int | np.integer)
    )


def _is_list(x: Any) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str | bytes)


def tokens_of(call: str, texts: Sequence[Text], tokenizer: Any) -> list[Tokens]:
    """Return the tokens of texts, all of them strings or all of them ids.

    Warns if more than a twentieth of the tokens are [UNK]: the vocabulary does not know these texts.

    Raises:
        TypeError: something is not a text, or is ids among strings.
        ValueError: a text has no token or is not Unicode, or an id is not in the vocabulary.
    """
    strings = any(isinstance(text, str) for text in texts)
    for number, text in enumerate(texts, start=1):
        subject = f"{call}: text {number}"
        if not (isinstance(text, str) or is_one(text) or (_is_list(text) and len(text) == 0)):
            raise TypeError(must(subject, "be a string or a list of ids", type(text).__name__))
        if strings:
            require_string(subject, text)
    if strings:
        found = [_of_encoding(*each) for each in zip(texts, encodings(texts, tokenizer), strict=True)]
    else:
        found = [_of_ids(f"{call}: text {n}", ids, tokenizer) for n, ids in enumerate(texts, start=1)]
    for number, tokens in enumerate(found, start=1):
        if not len(tokens.ids):
            raise ValueError(must(f"{call}: text {number}", "have a word", repr(tokens.text[:SHOWN])))
    warn_unknown(call, [tokens.ids for tokens in found], tokenizer)
    return found


def require_string(subject: str, text: Any) -> None:
    """Raise a TypeError if `text` is not a string, a ValueError if it is not Unicode."""
    if not isinstance(text, str):
        raise TypeError(must(subject, "be a string", type(text).__name__))
    require_unicode(subject, text)


def warn_unknown(call: str, ids: Sequence[Sequence[int]], tokenizer: Any) -> None:
    """Warn if the vocabulary does not know the texts, of which these are the tokens."""
    special = special_ids(tokenizer)
    tokens = np.concatenate([np.empty(0, int), *ids])
    words = ~np.isin(tokens, (special["[CLS]"], special["[SEP]"]))
    share = np.sum(tokens == special["[UNK]"]) / max(1, np.sum(words))
    if share > LIMIT:
        text = f"{call}: {share:.0%} of the tokens are [UNK]"
        remedy = "the vocabulary of the model does not know these texts, so the results mean little"
        warnings.warn(f"{text}; {remedy}", stacklevel=4)


def _of_encoding(text: str, encoding: Any) -> Tokens:
    spans = with_accents(text, np.array(encoding.offsets).reshape(-1, 2))
    return Tokens(text, np.array(encoding.ids, np.int32), spans, np.array(encoding.word_ids))


def _of_ids(subject: str, ids: Sequence[int], tokenizer: Any) -> Tokens:
    """Return the tokens of ids; the text consists of their pieces, with spaces between words."""
    text, spans, words = "", [], []
    for i in ids:
        known = isinstance(i, int | np.integer) and 0 <= i <= LARGEST
        piece = tokenizer.id_to_token(int(i)) if known else None
        if piece is None:
            raise ValueError(must(f"{subject}: ids", "be in the vocabulary", repr(i)))
        continues = piece.startswith("##") and bool(words)
        text += "" if continues or not text else " "
        words.append(words[-1] + (not continues) if words else 0)
        piece = piece.removeprefix("##") if continues else piece
        spans.append((len(text), len(text) + len(piece)))
        text += piece
    return Tokens(text, np.array(ids, np.int32), np.array(spans).reshape(-1, 2), np.array(words, int))


def warn_windows(call: str, numbers: Sequence[int], most: int) -> None:
    """Warn of texts that are longer than the model; `numbers` has the number of windows of each text."""
    long = [number for number in numbers if number > 1]
    if long:
        text = f"{call}: {len(long)} of {len(numbers)} texts have more than {most} tokens"
        warnings.warn(f"{text}; they are read in {sum(long):,} windows that overlap", stacklevel=4)


class Window(NamedTuple):
    """A part of a text that is too long for the model."""

    begin: int  # its units (tokens or words) are begin … end - 1
    end: int
    first: int  # its results are used for the units first … last - 1, which have the most context here
    last: int


def windows(sizes: np.ndarray, most: int) -> list[Window]:
    """Cut a text into windows that overlap by a quarter.

    Args:
        sizes: the number of tokens of each unit, ``[n]``.
        most: tokens in a window; a single unit may have more.
    """
    ends, bounds, begin = np.cumsum(sizes), [], 0
    while not bounds or bounds[-1][1] < len(sizes):
        before = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + most, side="right")))
        bounds.append((begin, end))
        begin = max(begin + 1, int(np.searchsorted(ends, ends[end - 1] - most // 4, side="right")))
    borders = [(left[1] + right[0]) // 2 for left, right in itertools.pairwise(bounds)]
    parts = zip([0, *borders], [*borders, len(sizes)], strict=True)
    return [Window(*bound, *part) for bound, part in zip(bounds, parts, strict=True)]
