"""Texts to token ids, one word at a time: the ids of a word are computed once.

BERT's tokenizer separates words at spaces, before and after each ASCII punctuation mark and, with
`handle_chinese_chars`, each Chinese character, whatever the text around them. So the ids of a text are those
of its words, end to end. A text has few different words: looking one up needs a tenth of the time of
tokenizing it.
"""

import itertools
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from electra_fast.data.parts import runs

PUNCTUATION = r"!-/:-@\[-`{-~"  # of ASCII
CHINESE = "\u4e00-\u9fff"  # the largest block
MOST_WORDS = 1 << 19  # in the memory, 200 bytes each


class WordEncoder:
    """Encodes texts without a line end; the results are those of `tokenizer.encode_batch`."""

    def __init__(self, tokenizer):
        self._tokenizer, self._unknown = tokenizer, tokenizer.token_to_id("[UNK]")
        self._words = _pattern(tokenizer)
        self._forget()

    def _forget(self) -> None:
        # A new word gets the next number. Its ids are _ids[_begins[n]:_begins[n + 1]].
        self._numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)
        self._ids, self._begins, self._unknowns = array("i"), array("q", [0]), array("q")
        self._numbers["\n"]  # Number 0 ends a text, and has no ids.
        self._learn(["\n"])

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the ids ``[T]`` int32, and for each text the number of tokens and of [UNK], int64."""
        if self._words is None:
            return self._encode_whole(texts)
        words = self._words.findall("\n".join([*texts, ""]))
        known = len(self._numbers)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        self._learn(list(itertools.islice(self._numbers, known, None)))
        begins, ends = np.array(self._begins), np.flatnonzero(numbers == 0)
        counts = np.diff(begins)[numbers]
        before = counts.cumsum()  # the number of ids up to the end of each word
        ids = np.array(self._ids, np.int32)[runs(begins[numbers], counts)]
        unknown = np.array(self._unknowns)[numbers].cumsum()
        if len(self._numbers) > MOST_WORDS:
            self._forget()
        return ids, np.diff(before[ends], prepend=0), np.diff(unknown[ends], prepend=0)

    def _learn(self, words: list[str]) -> None:
        for ids, unknown in self._encodings(words):
            self._ids.extend(ids)
            self._begins.append(len(self._ids))
            self._unknowns.append(unknown)

    def _encodings(self, texts: list[str]) -> Iterator[tuple[list[int], int]]:
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoding.ids
            yield ids, ids.count(self._unknown)

    def _encode_whole(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, counts = array("i"), array("q")
        for found, unknown in self._encodings(texts):
            ids.extend(found)
            counts.extend((len(found), unknown))
        return np.array(ids, np.int32), *np.array(counts, np.int64).reshape(-1, 2).T


def _pattern(tokenizer) -> re.Pattern[str] | None:
    """Return the expression of a word, or None for a tokenizer that is not of BERT's kind."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    kinds = (
        isinstance(tokenizer.normalizer, BertNormalizer),
        isinstance(tokenizer.pre_tokenizer, BertPreTokenizer),
    )
    if not all(kinds) or tokenizer.get_added_tokens_decoder():
        return None
    alone = PUNCTUATION + CHINESE * tokenizer.normalizer.handle_chinese_chars
    return re.compile(rf"[\n{alone}]|[^ \n{alone}]+")
