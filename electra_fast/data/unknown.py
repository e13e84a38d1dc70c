"""The share of a corpus that the vocabulary does not know, [UNK], and its most frequent words."""

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from electra_fast.errors import must

LIMIT = 0.05  # share of [UNK] above which a run is refused
# Characters of lines with [UNK] that are examined in any case; after them, a 16th of all characters is.
SAMPLE = 4 << 20
SHOWN = 40  # characters per word in a message


class Unknown(NamedTuple):
    """The part of a corpus that became [UNK]; in a large one, a sample estimates its characters and words."""

    tokens: int  # all tokens
    unknown: int  # those that are [UNK]
    characters: int  # all characters without spaces
    unknown_characters: int  # those of the words that became [UNK]
    words: tuple[tuple[str, int], ...] = ()  # the five most frequent unknown words and their counts

    @property
    def share(self) -> float:
        """The larger of the shares of tokens and of characters: a word of 240 letters is only one [UNK]."""
        pairs = ((self.unknown, self.tokens), (self.unknown_characters, self.characters))
        return max(part / max(whole, 1) for part, whole in pairs)

    def __str__(self) -> str:
        tokens = self.unknown / max(self.tokens, 1)
        characters = self.unknown_characters / max(self.characters, 1)
        text = f"[UNK] for {tokens:.2%} of the tokens, {characters:.2%} of the characters"
        words = ", ".join(f"{word} ({count})" for word, count in self.words)
        return f"{text}; most frequent: {words}" if words else text


def total(parts: Iterable[Unknown]) -> Unknown:
    """Return the unknown part of several texts together."""
    words, numbers = Counter(), [0, 0, 0, 0]
    for *found, frequent in parts:
        numbers = [a + b for a, b in zip(numbers, found, strict=True)]
        words.update(dict(frequent))
    return Unknown(*numbers, _most_frequent(words))


def _most_frequent(words: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(words.items(), key=lambda item: (-item[1], item[0]))[:5])


class UnknownCounter:
    """Collects an `Unknown` while a corpus is tokenized."""

    def __init__(self, tokenizer):
        self.tokenizer, self.id = tokenizer, tokenizer.token_to_id("[UNK]")
        self.tokens = self.unknown = self.characters = 0
        # The sample: the characters of its texts, its [UNK] tokens, their characters, and the counts of its
        # words.
        self._read = self._sampled = self._sampled_characters = 0
        self._words: Counter[str] = Counter()

    def add(self, texts: list[str], unknown: list[int], tokens: int) -> None:
        """Add texts with ``tokens`` tokens in total; ``unknown`` has the number of [UNK] per text."""
        characters = sum(len(text) - text.count(" ") for text in texts)
        self.tokens += tokens
        self.characters += characters
        self.unknown += sum(unknown)
        limit = max(SAMPLE - self._read, characters // 16)
        sample = []
        for text, count in zip(texts, unknown, strict=True):
            if count and limit > 0:
                sample.append(text)
                limit -= len(text)
        self._read += sum(map(len, sample))
        # Only the sample is tokenized with offsets, which is slower.
        for text, encoding in zip(sample, self.tokenizer.encode_batch(sample, False, False), strict=True):
            spans = [span for span, i in zip(encoding.offsets, encoding.ids, strict=True) if i == self.id]
            self._sampled += len(spans)
            self._sampled_characters += sum(end - begin for begin, end in spans)
            self._words.update(_shown(text[begin:end]) for begin, end in spans)
        if len(self._words) > 200_000:
            self._words = Counter(dict(self._words.most_common(100_000)))

    def result(self) -> Unknown:
        mean = self._sampled_characters / max(self._sampled, 1)
        unknown_characters = round(self.unknown * mean)
        words = _most_frequent(self._words)
        return Unknown(self.tokens, self.unknown, self.characters, unknown_characters, words)


def _shown(word: str) -> str:
    return word if len(word) <= SHOWN else f"{word[: SHOWN - 1]}…"


def require_known(unknown: Unknown, tokenizer, option: str, command: str = "pretrain") -> None:
    """Raise an error for a corpus of which more than LIMIT is [UNK].

    Raises:
        ValueError: names the share, the words, and the options with which the vocabulary knows them.
    """
    if unknown.share > LIMIT:
        remedy = f"use {' or '.join(_remedies(unknown, tokenizer))}, or --allow-unknown"
        rule = f"know {1 - LIMIT:.0%} or more of the text of {option}"
        raise ValueError(must(f"{command}: --vocab", rule, unknown, remedy))


def _remedies(unknown: Unknown, tokenizer) -> list[str]:
    """Return the options that make the most frequent unknown words known or, without any, what may help."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import BertNormalizer

    normalizer = tokenizer.normalizer
    if not isinstance(normalizer, BertNormalizer):
        return ["another vocabulary"]
    known, other = [], Tokenizer.from_str(tokenizer.to_str())
    for lowercase, strip in itertools.product((True, False), (None, True, False)):
        options = [("--cased", "--lowercase")[lowercase]] * (lowercase != normalizer.lowercase)
        options += [("--keep-accents", "--strip-accents")[bool(strip)]] * (strip is not None)
        other.normalizer = BertNormalizer(
            lowercase=lowercase,
            strip_accents=normalizer.strip_accents if strip is None else strip,
            clean_text=normalizer.clean_text,
            handle_chinese_chars=normalizer.handle_chinese_chars,
        )
        if unknown.words and all("[UNK]" not in other.encode(word).tokens for word, _ in unknown.words):
            known.append(options)
    if known:  # Of two sets of options, the smaller one is sufficient.
        return [" ".join(options) for options in known if not any(set(o) < set(options) for o in known)]
    remedies = ["another vocabulary"]
    longest = tokenizer.model.max_input_chars_per_word
    if any(len(word) >= min(longest, SHOWN) for word, _ in unknown.words):
        remedies.append(f"--max-word-chars (words of more than {longest} characters are [UNK])")
    return remedies
