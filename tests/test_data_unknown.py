"""The share of [UNK] is counted and printed, and above 5 % an error: Chinese, Korean, German, Russian."""

# ruff: noqa: RUF001

import contextlib
import json
import random

import pytest

from electra_fast import data
from electra_fast.__main__ import main
from electra_fast.data import encode, load_tokenizer, require_known, tokenize, train_tokenizer, unknown

pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GERMAN = "Die Bäume im Gärtchen blühen, und Füchse schlüpfen über die Straße. Schöne Grüße aus Köln!"
RUSSIAN = "Ёлка стоит у дома, а зимой она вся в снегу. Мой друг читает книгу у окна и пьёт чай."
KOREAN = "안녕하세요 저는 학생입니다 오늘은 날씨가 좋아서 공원에서 책을 읽었습니다"
CHINESE = "今天天气很好，我们去公园散步。他喜欢读书，也喜欢在河边喝茶。"
LANGUAGES = {"German": GERMAN, "Russian": RUSSIAN, "Korean": KOREAN, "Chinese": CHINESE}
FORMS = [(True, None), (True, False), (False, None), (False, True)]


def vocabulary(folder, *pieces, **options):
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *pieces]), "utf-8")
    return load_tokenizer(folder / "vocab.txt", special_ids=None, **options)


@pytest.mark.parametrize("lowercase, strip_accents", FORMS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_vocabulary_knows_the_language_it_is_trained_on(language, lowercase, strip_accents):
    texts = [LANGUAGES[language]] * 3
    stripped = lowercase if strip_accents is None else strip_accents
    splits = stripped and language == "Korean"
    with pytest.warns(UserWarning, match="use --keep-accents") if splits else contextlib.nullcontext():
        trained = train_tokenizer(texts, 2000, lowercase=lowercase, strip_accents=strip_accents)
    found = encode(texts, trained).unknown
    assert found.unknown == 0 and found.share == 0 and found.words == () and found.tokens > 20
    text = " ".join(piece.removeprefix("##") for piece in trained.get_vocab() if "[" not in piece)
    assert any(c.isupper() for c in text) == (not lowercase and language in ("German", "Russian"))
    if language in ("German", "Russian"):
        assert any(c in "äöüёй" for c in text) == (not stripped)
    if language == "Korean":
        assert any("가" <= c <= "힣" for c in text) == (not stripped)


@pytest.mark.parametrize("lowercase, strip_accents", FORMS)
def test_normalisation_is_that_of_transformers(tmp_path, lowercase, strip_accents):
    transformers = pytest.importorskip("transformers")
    trained = train_tokenizer(LANGUAGES.values(), 3000, lowercase=False, strip_accents=False)
    data.save_vocab(trained, tmp_path / "vocab.txt")
    options = {"do_lower_case": lowercase, "strip_accents": strip_accents}
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path, **options)
    ours = load_tokenizer(tmp_path, lowercase=lowercase, strip_accents=strip_accents)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    for found in (ours, load_tokenizer(tmp_path)):
        for text in LANGUAGES.values():
            assert found.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"]
    # Arguments have precedence over the folder's settings.
    other = load_tokenizer(tmp_path, lowercase=not lowercase, strip_accents=True).normalizer
    assert other.lowercase != lowercase and other.strip_accents


def test_a_korean_vocabulary_needs_whole_syllables(tmp_path):
    pieces, text = ["안녕", "하세요", "##하세요"], "안녕하세요\n안녕 하세요"
    lowered = vocabulary(tmp_path, *pieces)
    found = encode([text], lowered).unknown
    assert found[:4] == (3, 3, 10, 10) and found.share == 1 and found.words[0][0] == "안녕"
    with pytest.raises(ValueError) as error:
        require_known(found, lowered, "--data")
    message = "--vocab must know 95% or more of the text of --data, got [UNK] for 100.00% of the tokens, "
    message += "100.00% of the characters; most frequent: 안녕 (1), 안녕하세요 (1), 하세요 (1); "
    assert message + "use --keep-accents or --cased, or --allow-unknown" in str(error.value)
    for options in ({"lowercase": False}, {"strip_accents": False}):
        known = vocabulary(tmp_path, *pieces, **options)
        assert known.encode(text).tokens == ["안녕", "##하세요", "안녕", "하세요"]
        require_known(encode([text], known).unknown, known, "--data")


def test_a_word_of_hundreds_of_letters_counts_by_its_letters(tmp_path):
    long = vocabulary(tmp_path, "a", "##b", "word")
    found = encode(["word " * 80 + "a" + "b" * 239], long).unknown
    assert found[:4] == (81, 1, 560, 240) and found.share == 240 / 560
    assert found.words == (("a" + "b" * 38 + "…", 1),)
    with pytest.raises(
        ValueError,
        match=r"use another vocabulary or --max-word-chars \(words of more than 100 characters are \[UNK\]\)",
    ):
        require_known(found, long, "--data")
    longer = vocabulary(tmp_path, "a", "##b", "word", max_word_chars=240)
    assert encode(["a" + "b" * 239], longer).unknown.share == 0
    with pytest.raises(ValueError, match="max_word_chars must be 1 or more, got 0"):
        vocabulary(tmp_path, max_word_chars=0)


@pytest.mark.parametrize(
    "piece, lowercase, text, remedies",
    [
        ("Bäume", False, "Baume", "another vocabulary"),
        ("baume", False, "bäume", "--strip-accents or --lowercase"),
        ("bäume", False, "BÄUME", "--lowercase --keep-accents"),
        ("Bäume", True, "Bäume", "--cased"),
        ("ё", True, "ё", "--keep-accents or --cased"),
    ],
)
def test_the_error_names_the_options_that_help(tmp_path, piece, lowercase, text, remedies):
    tokenizer = vocabulary(tmp_path, piece, lowercase=lowercase)
    with pytest.raises(ValueError) as error:
        require_known(encode([text], tokenizer).unknown, tokenizer, "--data")
    used, _, rest = str(error.value).partition("; use ")[2].partition(", or ")
    assert set(used.split(" or ")) == set(remedies.split(" or ")) and rest == "--allow-unknown"


def test_the_limit_is_five_percent(tmp_path):
    tokenizer = vocabulary(tmp_path, "a")
    for known, refused in ((95, False), (94, True)):
        found = encode(["a " * known + "b " * (100 - known)], tokenizer).unknown
        assert (found.share > unknown.LIMIT) == refused
    assert encode(["", "a"], tokenizer).unknown.share == 0


def test_a_sample_estimates_a_large_corpus(tmp_path, monkeypatch):
    tokenizer = vocabulary(tmp_path, "known")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["known", "Bär", "Straßenbahn"], [8, 2, 1], k=50)) for _ in range(2000)]
    whole = encode(texts, tokenizer).unknown
    monkeypatch.setattr(unknown, "SAMPLE", 1000)
    monkeypatch.setattr(data.encoded, "CHUNK", 20_000)
    sampled = encode(texts, tokenizer).unknown
    assert sampled[:3] == whole[:3] and sampled.words != whole.words
    assert sampled.unknown_characters == pytest.approx(whole.unknown_characters, rel=0.05)
    assert [word for word, _ in sampled.words] == [word for word, _ in whole.words] == ["Bär", "Straßenbahn"]


def test_the_cache_keeps_the_counts_of_any_words(tmp_path):
    tokenizer = vocabulary(tmp_path, "a")
    words = ["\U0001f600" * 60, "x" * 60, "한" * 60, "\U0001f601" * 60, "é" * 60]
    texts = [f"a {word}" for word in words * 2]
    made = tokenize(texts, tokenizer, tmp_path)
    found = tokenize(texts, tokenizer, tmp_path)
    assert made.unknown == found.unknown == encode(texts, tokenizer).unknown and len(found.unknown.words) == 5


OPTIONS = ["--preset", "tiny", "--steps", "2", "--seq", "16", "--batch-tokens", "64", "--eval-batches", "1"]
OPTIONS += ["--set", "layers=1", "hidden=32", "heads=1", "ffn=64", "generator_hidden=16", "generator_heads=1"]
OPTIONS += [
    "generator_ffn=32",
    "embedding=16",
    "max_positions=32",
    "--device",
    "cpu",
    "--text-column",
    "body",
]


@pytest.fixture
def korean(tmp_path):
    vocabulary(tmp_path, "안녕", "하세요", "##하세요")
    rows = [{"title": "x", "body": "안녕하세요 안녕 하세요\n하세요"}] * 40
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "corpus/notes.md").touch()
    return ["--data", str(tmp_path / "corpus"), "--vocab", str(tmp_path / "vocab.txt"), *OPTIONS]


def test_pretraining_prints_the_share_and_refuses_a_large_one(korean, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(
        SystemExit, match=r"error: pretrain: --vocab must know .*; use --keep-accents or --cased"
    ):
        main(["pretrain", *korean, "--out", str(run)])
    said = capsys.readouterr().out
    assert "--data: [UNK] for 100.00% of the tokens" in said and "skipped: 1 .md" in said
    main(["pretrain", *korean, "--out", str(run), "--keep-accents"])
    assert "--data: [UNK] for 0.00% of the tokens" in capsys.readouterr().out
    recipe = json.loads((run / "recipe.json").read_text())
    assert (
        recipe["strip_accents"] is False and recipe["lowercase"] is None and recipe["text_column"] == "body"
    )
    main(["pretrain", "--resume", str(run), "--steps", "3", "--device", "cpu"])  # finds the same text
    with pytest.raises(SystemExit, match="--strip-accents must stay False"):
        main(["pretrain", "--resume", str(run), "--strip-accents"])


def test_pretraining_continues_if_unknown_words_are_allowed(korean, tmp_path, capsys):
    main(["pretrain", *korean, "--out", str(tmp_path / "run"), "--allow-unknown"])
    assert "[UNK] for 100.00%" in capsys.readouterr().out
