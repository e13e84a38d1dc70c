"""How much of a corpus the vocabulary does not know: the share of [UNK], and the words behind it."""

import itertools
from collections import Counter
from typing import NamedTuple

LIMIT = 0.05  # share of [UNK] above which a run is refused
SAMPLE = 4 << 20  # characters of lines with [UNK] that are looked at in any case; then a 16th of all
SHOWN = 40  # characters of a word


class Unknown(NamedTuple):
    """What became [UNK]. Its characters and words are estimated from a sample in a large corpus."""

    tokens: int  # all
    unknown: int  # of them [UNK]
    characters: int  # all, without spaces
    unknown_characters: int  # in the words that became [UNK]
    words: tuple[tuple[str, int], ...] = ()  # the five most frequent, and how often

    @property
    def share(self) -> float:
        """The larger share, of tokens or of characters: a word of 240 letters is a single [UNK]."""
        pairs = ((self.unknown, self.tokens), (self.unknown_characters, self.characters))
        return max(part / max(whole, 1) for part, whole in pairs)

    def __str__(self) -> str:
        tokens = self.unknown / max(self.tokens, 1)
        characters = self.unknown_characters / max(self.characters, 1)
        text = f"[UNK] for {tokens:.2%} of the tokens, {characters:.2%} of the characters"
        words = ", ".join(f"{word} ({count})" for word, count in self.words)
        return f"{text}; most frequent: {words}" if words else text


class Counting:
    """Collects an `Unknown` while a corpus is tokenized."""

    def __init__(self, tokenizer):
        self.tokenizer, self.id = tokenizer, tokenizer.token_to_id("[UNK]")
        self.tokens = self.unknown = self.characters = 0
        self._read = self._seen = self._seen_characters = 0  # of the sample
        self._words: Counter[str] = Counter()

    def add(self, texts: list[str], unknown: list[int], tokens: int) -> None:
        """Add texts; ``unknown`` has the number of [UNK] in each, ``tokens`` is that of all their tokens."""
        characters = sum(len(text) - text.count(" ") for text in texts)
        self.tokens, self.characters = self.tokens + tokens, self.characters + characters
        self.unknown += sum(unknown)
        room = max(SAMPLE - self._read, characters // 16)
        sample = []
        for text, count in zip(texts, unknown, strict=True):
            if count and room > 0:
                sample.append(text)
                room -= len(text)
        self._read += sum(map(len, sample))
        # Offsets take time, so they are asked for here alone.
        for text, encoding in zip(sample, self.tokenizer.encode_batch(sample, False, False), strict=True):
            places = [place for place, i in zip(encoding.offsets, encoding.ids, strict=True) if i == self.id]
            self._seen += len(places)
            self._seen_characters += sum(end - begin for begin, end in places)
            self._words.update(_shown(text[begin:end]) for begin, end in places)
        if len(self._words) > 200_000:
            self._words = Counter(dict(self._words.most_common(100_000)))

    def result(self) -> Unknown:
        mean = self._seen_characters / max(self._seen, 1)
        words = sorted(self._words.items(), key=lambda item: (-item[1], item[0]))[:5]
        return Unknown(self.tokens, self.unknown, self.characters, round(self.unknown * mean), tuple(words))


def _shown(word: str) -> str:
    return word if len(word) <= SHOWN else f"{word[: SHOWN - 1]}…"


def require_known(unknown: Unknown, tokenizer, option: str) -> None:
    """Refuse a corpus of which more than LIMIT is [UNK].

    Raises:
        ValueError: names the share, the words, and which normalisation would know them.
    """
    if unknown.share > LIMIT:
        remedy = f"use {' or '.join(_remedies(unknown, tokenizer))}, or --allow-unknown"
        rule = f"must know {1 - LIMIT:.0%} or more of the text of {option}"
        raise ValueError(f"pretrain: --vocab {rule}, got {unknown}; {remedy}")


def _remedies(unknown: Unknown, tokenizer) -> list[str]:
    """Return the options that make the most frequent unknown words known, or else what may help."""
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
    if known:  # the options that are necessary
        return [" ".join(options) for options in known if not any(set(o) < set(options) for o in known)]
    remedies = ["another vocabulary"]
    longest = tokenizer.model.max_input_chars_per_word
    if any(len(word) >= min(longest, SHOWN) for word, _ in unknown.words):
        remedies.append(f"--max-word-chars (words of more than {longest} characters are [UNK])")
    return remedies
