"""WordPiece: the same ids as Hugging Face, for every source of the vocabulary."""

import json
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from electra_fast import data
from electra_fast.data import SPECIAL_IDS, encode, load_tokenizer, save_tokenizer, vocab_hash
from electra_fast.data.wordpiece import pieces

pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")


def test_the_special_pieces_have_berts_ids(trained_tokenizer):
    assert {piece: trained_tokenizer.token_to_id(piece) for piece in SPECIAL_IDS} == SPECIAL_IDS
    assert (
        trained_tokenizer.token_to_id("[unused0]") == 1 and trained_tokenizer.token_to_id("[unused98]") == 99
    )


def test_the_vocabulary_has_the_requested_size_and_is_uncased(trained_tokenizer):
    found = pieces(trained_tokenizer)
    assert len(found) == len(set(found)) == trained_tokenizer.get_vocab_size() == 1500
    assert not any(c.isupper() for piece in found[104:] for c in piece)
    assert trained_tokenizer.encode("Naïve FUNCTION").ids == trained_tokenizer.encode("naive function").ids


def test_special_pieces_in_a_text_are_text(trained_tokenizer):
    encoding = trained_tokenizer.encode("[CLS] the [MASK] [SEP] [PAD]")
    assert not set(encoding.ids) & set(SPECIAL_IDS.values()) - {SPECIAL_IDS["[UNK]"]}


def test_a_vocabulary_survives_saving_and_loading(tmp_path, trained_tokenizer, topics):
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")
    loaded = load_tokenizer(tmp_path / "vocab.txt")
    assert loaded.get_vocab() == trained_tokenizer.get_vocab()
    assert torch.equal(encode(topics, loaded).ids, encode(topics, trained_tokenizer).ids)
    cased = load_tokenizer(tmp_path / "vocab.txt", lowercase=False)
    assert cased.encode("THE the").tokens == ["[UNK]", "the"]


def vocab_lines():
    return ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""], ids=["LF", "CRLF", "no end"])
def test_line_ends_of_a_vocabulary_do_not_matter(tmp_path, trained_tokenizer, end):
    file = tmp_path / "vocab.txt"
    file.write_bytes((end or "\n").join(vocab_lines()).encode() + end.encode())
    assert load_tokenizer(file).get_vocab() == {p: i for i, p in enumerate(vocab_lines())}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [*lines, ""], "line 106: blank"),
        (lambda lines: [*lines[:50], "", *lines[50:]], "line 51: blank"),
        (lambda lines: [""], "line 1: blank"),
        (lambda lines: [*lines, "a"], "line 106: 'a' is already on line 105"),
        (lambda lines: [*lines[:103], "b"], r"must contain .*, \[MASK\] missing"),
        (lambda lines: lines[1:], r"must contain .*, \[PAD\] missing"),
        (lambda lines: lines[:1] + lines[2:], r"\[UNK\] must be on line 101, got line 100"),
        (lambda lines: [*lines, "\0"], "NUL at byte"),
    ],
    ids=["last", "blank", "empty", "repeated", "no mask", "no pad", "shifted", "NUL"],
)
def test_an_error_about_a_vocabulary_names_the_line(tmp_path, change, message):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(change(vocab_lines())) + "\n")
    with pytest.raises(ValueError, match=f"vocab.txt.*{message}"):
        load_tokenizer(file)


def test_other_special_ids_can_be_given(tmp_path, trained_tokenizer):
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    for accepted in (ids, None):
        loaded = load_tokenizer(file, special_ids=accepted)
        assert loaded.get_vocab() == data.special_ids(loaded) == ids
    file.write_text("[PAD]\n[UNK]\n[CLS]\n")
    with pytest.raises(ValueError, match=r"must contain .*, \[SEP\], \[MASK\] missing"):
        load_tokenizer(file, special_ids=None)


def test_training_refuses_unusable_arguments(trained_tokenizer):
    for nothing in ([], [" \n "]):
        with pytest.raises(ValueError, match="documents must contain text, got none"):
            data.train_tokenizer(nothing)
    with pytest.raises(ValueError, match=r"vocab_size must be 108 or more, .* 2 char.* got 107"):
        data.train_tokenizer(["a b"], vocab_size=107)
    assert data.train_tokenizer(["a b"], vocab_size=108).get_vocab_size() == 108


def test_the_alphabet_covers_the_text_and_has_a_thousand_characters_or_more():
    chinese = "".join(map(chr, range(0x4E00, 0x4E00 + 3500)))
    trained = data.train_tokenizer([chinese * 2], vocab_size=30522)
    assert encode([chinese], trained).unknown.unknown == 0  # with 1000 characters, 2500 of 3500 were unknown
    # Characters that are under 0.01 % of a text are left out, but never the thousand most frequent ones.
    rare = chr(0x6000)
    for common, kept in ((chinese[:1000], False), (chinese[:999], True)):
        trained = data.train_tokenizer([common * 20, rare], vocab_size=30522)
        assert trained.encode(common[-1]).ids != [100] and (trained.encode(rare).ids != [100]) == kept
    # Characters fill at most half of the vocabulary, if a thousand of them fit into it.
    trained = data.train_tokenizer([chinese * 2], vocab_size=6000)
    assert sum(len(piece) == 1 for piece in pieces(trained)) == 1500


def test_the_error_without_the_tokenizers_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        data.train_tokenizer(["text"])


SENTENCES = [
    "Naïve FUNCTIONS, (returns)\nfoo",
    "北京 is\u00a0text",
    "[CLS] a [MASK] b [SEP] [unused0]",
    "",
    " \t",
]


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_hugging_face_gives_the_same_ids(tmp_path, trained_tokenizer, lowercase):
    transformers = pytest.importorskip("transformers")
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")
    ours = load_tokenizer(tmp_path / "vocab.txt", lowercase=lowercase)
    save_tokenizer(ours, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "electra"}')
    classes = ["AutoTokenizer", "ElectraTokenizer", "ElectraTokenizerFast", "BertTokenizer"]
    for name in (name for name in classes if hasattr(transformers, name)):
        theirs = getattr(transformers, name).from_pretrained(tmp_path / "model")
        for text in (text for text in SENTENCES if "[" not in text):
            assert theirs(text)["input_ids"] == [101, *ours.encode(text).ids, 102], (name, text)
        assert theirs("[MASK]")["input_ids"] == [101, theirs.mask_token_id, 102]
        assert theirs("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


def test_a_folder_gives_the_same_ids_with_and_without_its_json(tmp_path, trained_tokenizer):
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")
    cased = load_tokenizer(tmp_path / "vocab.txt", lowercase=False)
    save_tokenizer(cased, tmp_path)
    # A user's post-processor, truncation and padding must not change a corpus.
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    assert state["post_processor"] and state["added_tokens"]
    state["added_tokens"].append(state["added_tokens"][0] | {"id": 1, "content": "[unused0]"})
    state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    state["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    loaded = [load_tokenizer(path) for path in (tmp_path, tmp_path / "tokenizer.json")]
    loaded.append(pickle.loads(pickle.dumps(loaded[0])))
    (tmp_path / "tokenizer.json").unlink()
    loaded.append(load_tokenizer(tmp_path))  # from vocab.txt and do_lower_case
    for other in loaded:
        assert [other.encode(text).ids for text in SENTENCES] == [cased.encode(t).ids for t in SENTENCES]
        assert vocab_hash(other) == vocab_hash(cased)
    assert vocab_hash(load_tokenizer(tmp_path, lowercase=True)) == vocab_hash(trained_tokenizer)
    assert vocab_hash(trained_tokenizer) != vocab_hash(cased)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "must contain JSON, got "),
        ("[]", "must contain a JSON object, got list"),
        ("{}", "must contain a WordPiece model, got None"),
        ('{"model": {"type": "BPE", "vocab": {}}}', "must contain a WordPiece model, got BPE"),
        ('{"model": {"type": "WordPiece", "vocab": {"[PAD]": 0}}}', r", \[UNK\], .* missing"),
    ],
)
def test_an_error_about_tokenizer_json_names_the_file(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*{message}"):
        load_tokenizer(tmp_path)


def test_wrong_parts_of_tokenizer_json_and_wrong_arguments_raise_errors(tmp_path, trained_tokenizer):
    save_tokenizer(trained_tokenizer, tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(state | {"normalizer": {"type": "Nonsense"}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    rule = r"lowercase \(--lowercase/--cased on the command line\) must be left out"
    with pytest.raises(ValueError, match=rf"{rule}, got True; .*tokenizer\.json contains this setting"):
        load_tokenizer(tmp_path, lowercase=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must contain tokenizer\.json or vocab\.txt, got neither"):
        load_tokenizer(tmp_path / "empty")


def faulty(change):
    """Return a valid tokenizer.json after a change."""
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": ids}
    state = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "model": model}
    change(state)
    return json.dumps(state)


TOKEN = {"id": 6, "content": "b", "special": False, "single_word": False}
TOKEN |= {"lstrip": False, "rstrip": False, "normalized": True}


def vocab(**pieces):
    return lambda state: state["model"]["vocab"].update(pieces)


def top(**changes):
    return lambda state: state.update(changes)


def model(**changes):
    return lambda state: state["model"].update(changes)


@pytest.mark.parametrize(
    "change, message",
    [
        (vocab(b=10**9), "ids must be below 1038 for 7 pieces, got 10{9}"),
        (top(added_tokens=[TOKEN | {"id": 10**9}]), "ids must be below 1038 for 7 pieces, got 10{9}"),
        (vocab(b=-1), "model.vocab must give each piece an id, 0 or more"),
        (vocab(b="6"), "model.vocab must give each piece an id, 0 or more"),
        (vocab(b=True), "model.vocab must give each piece an id, 0 or more"),
        (vocab(b=2.0), "model.vocab must give each piece an id, 0 or more"),
        (vocab(b=5), "model.vocab must give each piece an id of its own"),
        (model(vocab=["a"]), "model.vocab must give each piece an id, 0 or more"),
        (model(vocab=None), "model.vocab must give each piece an id, 0 or more"),
        (model(unk_token=3), "is not a tokenizer: "),
        (model(max_input_chars_per_word=-1), "is not a tokenizer: "),
        (top(model=[]), "must contain a WordPiece model, got None"),
        (top(model="WordPiece"), "must contain a WordPiece model, got None"),
        (top(added_tokens=7), "added_tokens must be objects with an id, a content and special"),
        (top(added_tokens={"x": 1}), "added_tokens must be objects with an id, a content and special"),
        (top(added_tokens=[7]), "added_tokens must be objects with an id, a content and special"),
        (top(added_tokens=[{"id": 6}]), "added_tokens must be objects with an id, a content and special"),
        (top(added_tokens=[TOKEN | {"content": []}]), "added_tokens must be objects with an id, a content"),
        (top(normalizer=[]), "is not a tokenizer: "),
    ],
)
def test_an_error_about_types_in_tokenizer_json_names_the_file(tmp_path, change, message):
    file = tmp_path / "tokenizer.json"
    file.write_text(faulty(lambda state: None))
    assert load_tokenizer(file).get_vocab_size() == 6
    file.write_text(faulty(lambda state: state.update(added_tokens=[TOKEN])))
    assert load_tokenizer(file).get_vocab_size() == 7
    file.write_text(faulty(change))
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*{message}"):
        load_tokenizer(file)


def test_errors_about_deep_json_and_wrong_settings_name_the_file(tmp_path):
    for depth in (500, 100_000):
        text = faulty(lambda state: state.update(normalizer="HERE"))
        (tmp_path / "tokenizer.json").write_text(text.replace('"HERE"', "[" * depth + "]" * depth))
        with pytest.raises(ValueError, match=r"tokenizer\.json (must contain JSON|is not a tokenizer)"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(vocab_lines()))
    rule = "do_lower_case must be true, false or null, got 3"
    for value, message in (("3", rule), ("[" * 10**5, "recursion")):
        (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": ' + value + "}")
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json.*{message}"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_a_fifo_raises_an_error_instead_of_blocking(tmp_path, name):
    (tmp_path / "vocab.txt").write_text("\n".join(vocab_lines()))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} must be a regular file, got a FIFO"):
        load_tokenizer(tmp_path)


def test_another_limit_of_word_length_is_saved(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*vocab_lines(), "##a"]))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt", max_word_chars=300)
    save_tokenizer(tokenizer, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "electra"}')
    assert load_tokenizer(tmp_path / "model").encode("a" * 300).ids == [104] + [105] * 299
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs("a" * 300)["input_ids"] == [101, 104, *[105] * 299, 102]


def test_the_hash_is_the_same_in_another_process(tmp_path, trained_tokenizer):
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")
    code = "import sys; from electra_fast.data import *; print(vocab_hash(load_tokenizer(sys.argv[1])))"
    command = [sys.executable, "-c", code, tmp_path / "vocab.txt"]
    there = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
    assert there.stdout.strip() == vocab_hash(trained_tokenizer)
    changed = [
        *pieces(trained_tokenizer)[:-2],
        *pieces(trained_tokenizer)[:-3:-1],
    ]  # The last two pieces are swapped.
    (tmp_path / "vocab.txt").write_text("\n".join(changed), "utf-8")
    assert vocab_hash(load_tokenizer(tmp_path / "vocab.txt")) != vocab_hash(trained_tokenizer)


@pytest.mark.parametrize(
    ("options", "syllables"), [({}, False), ({"strip_accents": False}, True), ({"lowercase": False}, True)]
)
def test_a_vocabulary_that_splits_korean_syllables_warns(options, syllables):
    for _ in range(2):  # trained, then from the cache
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            tokenizer = data.train_tokenizer(["\ud55c\uad6d\uc5b4 \ubb38\uc7a5"] * 3, 300, **options)
        assert ("\ud55c" in "".join(tokenizer.get_vocab())) == syllables
        assert ["--keep-accents" in str(w.message) for w in said] == [True] * (not syllables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.train_tokenizer(["caf\u00e9"] * 3, 300)
