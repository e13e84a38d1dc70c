"""The ids of words end to end are those of the whole text, for any characters."""

import random

import numpy as np
import pytest

from electra_fast import data
from electra_fast.data import words
from electra_fast.data.words import WordEncoder

# ruff: noqa: RUF001
pytest.importorskip("tokenizers")
pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")
CHARACTERS = [
    "abc DEF,.!-'\" \t\r##[UNK]",
    "éüßñçİıſΣσς ÅÄ",
    "\u0300\u0301\u0327\u0345\u05b0",  # they combine with what is before them
    "北京大学，。㐀\U00020000\uf900",
    "안녕하세요ᄒ\u1161\u11ab",
    "\u200d\u200b\u00ad\ufeff\u00a0\u3000\u2028\x01\x0b\x1c\x7f\x85\ufffd",  # removed, or spaces
    "😀👨‍👩‍👧🇩🇪️ﬁ²½Ⅳ①\ue000\u0378\U000e0001",
    "עברית عربي हिन्दी ไทย",
]


def texts(rng, count=400):
    for _ in range(count):
        yield "".join(rng.choice(rng.choice(CHARACTERS)) for _ in range(rng.randrange(30)))


def assert_exact(tokenizer, many):
    ids, counts, unknown = WordEncoder(tokenizer).encode(many)
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in many]
    assert ids.dtype == np.int32 and ids.tolist() == [i for found in expected for i in found]
    assert counts.tolist() == [len(found) for found in expected]
    assert unknown.tolist() == [found.count(tokenizer.token_to_id("[UNK]")) for found in expected]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_any_characters(tmp_path, seed, lowercase, strip_accents, chinese):
    from tokenizers.normalizers import BertNormalizer

    many = list(texts(random.Random(seed)))
    pieces = sorted({c for text in many for c in text.lower() + text if c.strip()})
    pieces = [*data.SPECIAL_IDS, *pieces[::2], *(f"##{c}" for c in pieces[::3]), "abc", "##b", "北京"]
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)), "utf-8")
    tokenizer = data.load_tokenizer(tmp_path / "vocab.txt", special_ids=None, max_word_chars=9)
    tokenizer.normalizer = BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    assert_exact(tokenizer, many)


def test_many_words_are_forgotten(trained_tokenizer, topics, monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 50)
    encoder, lines = WordEncoder(trained_tokenizer), [line for topic in topics for line in topic.split("\n")]
    expected = WordEncoder(trained_tokenizer).encode(lines)
    found = [encoder.encode(lines[i : i + 9]) for i in range(0, len(lines), 9)]
    for parts, whole in zip(zip(*found, strict=True), expected, strict=True):
        assert np.concatenate(parts).tolist() == whole.tolist()
    assert len(encoder._numbers) <= 50 + 9 * 100


@pytest.mark.parametrize("change", ["added token", "normalizer", "splitting"])
def test_other_tokenizers_get_whole_texts(trained_tokenizer, topics, change):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    other = Tokenizer.from_str(trained_tokenizer.to_str())
    if change == "added token":
        other.add_tokens(["the list"])
    elif change == "normalizer":
        other.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a list", "alist")])
    else:
        other.pre_tokenizer = pre_tokenizers.Split("is a", "isolated")
    assert_exact(other, [*topics, "the list is a list"])
