"""Text to batches: nothing lost, nothing made up, and the same on every run."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from electra_fast import data
from electra_fast.data import SPECIAL_IDS, Batches, Encoded, check_batch, documents, encode

PAD, CLS, SEP = 0, 101, 102


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keep the user's own cache out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def manual(cache):
    return documents()


@pytest.fixture(scope="module")
def topics(manual):
    return manual[:20]  # 50 kB


@pytest.fixture(scope="module")
def tokenizer(topics):
    pytest.importorskip("tokenizers")
    return data.train_tokenizer(topics, vocab_size=1500)


def lengths_to_encoded(*lengths):
    """Documents of these lengths; all ids differ and none is special."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Encoded(torch.arange(1000, 1000 + int(offsets[-1]), dtype=torch.int32), offsets)


def test_the_manual_is_english_in_berts_format(manual):
    text = "\n\n".join(manual)
    assert len(manual) > 500 and len(text) > 1_500_000
    assert sum(text.count(word) for word in (" the ", " of ", " is ")) > 20_000
    assert all(line.strip() for document in manual for line in document.split("\n"))
    assert "\0" not in text
    assert documents() == manual  # from the cache now


def test_docstrings_are_read_in_order_from_anywhere_in_a_module():
    source = """
'module'
if True:
    class A:
        'class'
        async def f(self):
            'method'
            def inner(): 'inner'
    x = lambda: 'not a docstring'
def g(): 'function'
"""
    found = [text for text in data._docstrings(source.encode()) if text]
    assert found == ["module", "class", "method", "inner", "function"]
    for unreadable in (b"print 'Python 2'", b"\0", b"\xff"):
        assert list(data._docstrings(unreadable)) == []


def test_documents_of_a_file_are_what_was_written(tmp_path, manual):
    file = tmp_path / "corpus.txt"
    file.write_text("\n\n".join(manual), "utf-8")
    assert documents(file) == documents(str(file)) == manual


@pytest.mark.parametrize(
    "text",
    [
        b"one\ntwo\n\nthree",
        b"\n\n one\ntwo\n\n\n \t\nthree\n\n",
        b"one\r\ntwo\r\n\r\nthree\r\n",
        b"\xef\xbb\xbfone\ntwo\n\nthree\n",
    ],
    ids=["plain", "blank lines", "CRLF", "BOM"],
)
def test_documents_are_separated_by_blank_lines(tmp_path, text):
    file = tmp_path / "corpus.txt"
    file.write_bytes(text)
    assert documents(file) == ["one\ntwo", "three"]


def test_a_folder_is_read_in_order_of_name(tmp_path):
    for name in ("b.txt", "a.txt", "c/d.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"first of {name}\n\nsecond of {name}")
    names = ("a.txt", "b.txt", "c/d.txt")
    expected = [f"{nth} of {name}" for name in names for nth in ("first", "second")]
    assert documents(tmp_path) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (b"good\n\nbad \xe9 Latin-1", r"not UTF-8 at byte 10 \(0xe9\)"),
        ("UTF-16".encode("utf-16"), r"not UTF-8 at byte 0 \(0xff\)"),
        (b"lone surrogate \xed\xa0\x80", r"not UTF-8 at byte 15 \(0xed\)"),
        (b"caf\xc3\xa9 \0", "NUL at byte 6"),
        (b"", "no document"),
        (b" \r\n\t\n\n", "no document"),
        (b"\xef\xbb\xbf", "no document"),
    ],
    ids=["Latin-1", "UTF-16", "surrogate", "NUL", "empty", "blank", "BOM"],
)
def test_a_file_that_is_not_text_is_named(tmp_path, content, message):
    (tmp_path / "a.txt").write_text("a good one")
    file = tmp_path / "b.txt"
    file.write_bytes(content)
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=rf"b\.txt: .*{message}"):
            documents(path)


def test_a_path_without_text_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no .txt file"):
        documents(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        documents(tmp_path / "missing")


def test_the_special_pieces_have_berts_ids(tokenizer):
    assert {piece: tokenizer.token_to_id(piece) for piece in SPECIAL_IDS} == SPECIAL_IDS
    assert tokenizer.token_to_id("[unused0]") == 1 and tokenizer.token_to_id("[unused98]") == 99


def test_the_vocabulary_is_as_large_as_asked_and_uncased(tokenizer):
    pieces = data._pieces(tokenizer)
    assert len(pieces) == len(set(pieces)) == tokenizer.get_vocab_size() == 1500
    assert not any(c.isupper() for piece in pieces[104:] for c in piece)
    assert tokenizer.encode("Naïve FUNCTION").ids == tokenizer.encode("naive function").ids


def test_special_pieces_in_a_text_are_text(tokenizer):
    encoding = tokenizer.encode("[CLS] the [MASK] [SEP] [PAD]")
    assert not set(encoding.ids) & set(SPECIAL_IDS.values()) - {SPECIAL_IDS["[UNK]"]}


def test_a_vocabulary_makes_the_round_trip(tmp_path, tokenizer, topics):
    data.save_vocab(tokenizer, tmp_path / "vocab.txt")
    loaded = data.load_tokenizer(tmp_path / "vocab.txt")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert torch.equal(encode(topics, loaded).ids, encode(topics, tokenizer).ids)
    cased = data.load_tokenizer(tmp_path / "vocab.txt", lowercase=False)
    assert cased.encode("THE the").tokens == ["[UNK]", "the"]


def vocab_lines():
    return ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""], ids=["LF", "CRLF", "no end"])
def test_line_ends_of_a_vocabulary_do_not_matter(tmp_path, tokenizer, end):
    file = tmp_path / "vocab.txt"
    file.write_bytes((end or "\n").join(vocab_lines()).encode() + end.encode())
    assert data.load_tokenizer(file).get_vocab() == {p: i for i, p in enumerate(vocab_lines())}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [*lines, ""], "line 106: blank"),
        (lambda lines: [*lines[:50], "", *lines[50:]], "line 51: blank"),
        (lambda lines: [""], "line 1: blank"),
        (lambda lines: [*lines, "a"], "line 106: 'a' is already on line 105"),
        (lambda lines: [*lines[:103], "b"], r"line 104: must be \[MASK\], it is missing"),
        (lambda lines: lines[1:], r"line 1: must be \[PAD\], it is missing"),
        (lambda lines: lines[:1] + lines[2:], r"line 101: must be \[UNK\], it is on line 100"),
        (lambda lines: [*lines, "\0"], "NUL at byte"),
    ],
    ids=["last", "blank", "empty", "repeated", "no mask", "no pad", "shifted", "NUL"],
)
def test_a_faulty_vocabulary_is_refused_with_its_line(tmp_path, change, message):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(change(vocab_lines())) + "\n")
    with pytest.raises(ValueError, match=f"vocab.txt.*{message}"):
        data.load_tokenizer(file)


def test_other_special_ids_are_accepted_when_asked_for(tmp_path, tokenizer):
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert data.load_tokenizer(file, special_ids=ids).get_vocab() == ids


def test_training_refuses_what_it_cannot_use(tokenizer):
    for nothing in ([], [" \n "]):
        with pytest.raises(ValueError, match="hold no text"):
            data.train_tokenizer(nothing)
    with pytest.raises(ValueError, match=r"vocab_size must be 108 or more, .* 2 char.* got 107"):
        data.train_tokenizer(["a b"], vocab_size=107)
    assert data.train_tokenizer(["a b"], vocab_size=108).get_vocab_size() == 108


def test_the_thousand_commonest_characters_are_kept(tokenizer):
    common, rare = "".join(map(chr, range(0x4E00, 0x4E00 + 1000))), chr(0x6000)
    trained = data.train_tokenizer([common * 2, rare], vocab_size=30522)
    assert trained.encode(common[-1]).ids != [100] and trained.encode(rare).ids == [100]


def test_without_the_tokenizers_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        data.train_tokenizer(["text"])


def test_the_cache_serves_what_was_made_and_makes_anew_what_was_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data._cached("key", lambda: "made\nü") == "made\nü"
    assert data._cached("key", lambda: pytest.fail("made twice")) == "made\nü"
    for damage in (b"", b"\xff", b"no checksum", b"0" * 64 + b"\nmade"):
        for file in (tmp_path / "electra_fast").iterdir():
            file.write_bytes(damage)
        assert data._cached("key", lambda: "anew") == "anew"
    assert len(list((tmp_path / "electra_fast").iterdir())) == 1  # no temporary file is left


def test_a_folder_that_cannot_be_used_is_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert data._cached("key", lambda: "made") == "made"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError))
    assert data._cached("key", lambda: "made") == "made"


def test_encoding_keeps_every_document_whole(tokenizer, topics):
    many = [*topics, "", *("a b c " * n for n in range(300)), "word " * 16_000]
    ids, offsets = encode(iter(many), tokenizer)
    assert ids.dtype == torch.int32 and offsets.dtype == torch.int64
    assert len(offsets) == len(many) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
    for d in (0, 7, len(topics), len(topics) + 5, len(many) - 1):
        expected = tokenizer.encode(many[d], add_special_tokens=False).ids
        assert ids[offsets[d] : offsets[d + 1]].tolist() == expected
    assert encode([], tokenizer).offsets.tolist() == [0]


def sequences(batches, count):
    """The first `count` sequences of the stream, each as a list of its tokens."""
    found = []
    for index in range(-(-count // batches.batch_size)):
        ids, key_mask = batches.padded(index)
        found += [row[mask].tolist() for row, mask in zip(ids, key_mask, strict=True)]
    return found[:count]


# Lengths around the cut of 6: none, one, all but one, whole, one more, many.
LENGTHS = (0, 1, 5, 6, 7, 0, 12, 13, 100)


@pytest.mark.parametrize("batch_size", [1, 4, 64])  # 64 is more than the 27 sequences there are
def test_every_token_appears_exactly_once_an_epoch(batch_size):
    encoded = lengths_to_encoded(*LENGTHS)
    batches = Batches(encoded, seq_len=8, batch_size=batch_size)
    n = batches.num_sequences
    assert n == sum(-(-length // 6) for length in LENGTHS) == 27
    found = sequences(batches, 3 * n)
    for epoch in (found[:n], found[n : 2 * n], found[2 * n :]):
        assert sorted(t for s in epoch for t in s[1:-1]) == encoded.ids.tolist()
    assert found[:n] != found[n : 2 * n] and sorted(found[:n]) == sorted(found[n : 2 * n])


def test_sequences_are_cls_tokens_sep_of_one_document():
    encoded = lengths_to_encoded(*LENGTHS)
    batches = Batches(encoded, seq_len=8, batch_size=5)
    for sequence in sequences(batches, batches.num_sequences):
        cls, *tokens, sep = sequence
        assert cls == CLS and sep == SEP and 1 <= len(tokens) <= 6
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        ends = torch.tensor([tokens[0] - 1000, tokens[-1] - 1000])
        assert len(set(torch.searchsorted(encoded.offsets, ends, right=True).tolist())) == 1


def test_padded_and_packed_hold_the_same_sequences(tokenizer, topics):
    batches = Batches(encode(topics, tokenizer), seq_len=64, batch_size=16, seed=3)
    for index in (0, 1, 1000):
        ids, key_mask = batches.padded(index)
        assert ids.dtype == torch.int64 and key_mask.dtype == torch.bool
        assert ids.shape == key_mask.shape == (16, 64)
        assert (ids[~key_mask] == PAD).all() and (key_mask[:, :-1] >= key_mask[:, 1:]).all()

        packed, cu_seqlens, max_seqlen = batches.packed(index)
        assert packed.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
        assert torch.equal(packed, ids[key_mask]) and isinstance(max_seqlen, int)
        assert cu_seqlens[0] == 0 and torch.equal(cu_seqlens.diff(), key_mask.sum(1).int())
        assert max_seqlen == key_mask.sum(1).max()


def test_batches_are_a_function_of_seed_and_index():
    encoded = lengths_to_encoded(*LENGTHS)

    def ids(index, **options):
        return Batches(encoded, **{"seq_len": 8, "batch_size": 4, **options}).padded(index).ids

    batches = Batches(encoded, seq_len=8, batch_size=4)
    for index in (50, 0, 6, 50):  # in any order, and 6 lies across two epochs
        assert torch.equal(batches.padded(index).ids, ids(index))
    assert not torch.equal(ids(0), ids(1)) and not torch.equal(ids(0), ids(0, seed=1))
    # The next epoch of one seed is not the first of the next seed; any int is a seed.
    assert not torch.equal(ids(1, batch_size=27), ids(0, batch_size=27, seed=1))
    assert not torch.equal(ids(0, seed=-1), ids(0, seed=2**63))
    # The batch size says where the stream is cut, not what is in it.
    assert torch.equal(ids(0, batch_size=8), torch.cat([ids(0), ids(1)]))


def test_special_ids_are_arguments():
    batches = Batches(lengths_to_encoded(2), seq_len=5, batch_size=1, pad_id=7, cls_id=8, sep_id=9)
    assert batches.padded(0).ids.tolist() == [[8, 1000, 1001, 9, 7]]


def test_batches_refuse_what_they_cannot_use():
    encoded = lengths_to_encoded(3)
    with pytest.raises(ValueError, match=r"seq_len must be 3 or more.*got 2 and 4"):
        Batches(encoded, seq_len=2, batch_size=4)
    with pytest.raises(ValueError, match=r"batch_size 1 or more.*got 8 and 0"):
        Batches(encoded, seq_len=8, batch_size=0)
    with pytest.raises(ValueError, match="hold no token"):
        Batches(lengths_to_encoded(0, 0))
    with pytest.raises(IndexError, match="index must be 0 or more, got -1"):
        Batches(encoded).padded(-1)


def fingerprint(texts):
    tokenizer = data.train_tokenizer(texts, vocab_size=1500)
    batches = Batches(encode(texts, tokenizer), seq_len=32, seed=5)
    ids = [batches.padded(index).ids.tolist() for index in (0, 1, 77)]
    return hashlib.sha256(f"{data._pieces(tokenizer)} {ids}".encode()).hexdigest()


def test_vocabulary_and_batches_are_the_same_in_another_process(tmp_path, topics, tokenizer):
    code = "import sys, test_data; print(test_data.fingerprint(sys.stdin.read().split(chr(0))))"
    root = Path(data.__file__).parents[1]
    other = {"PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
    other |= {"XDG_CACHE_HOME": str(tmp_path), "TOKENIZERS_PARALLELISM": "false"}  # so it trains
    command, text, env = [sys.executable, "-c", code], chr(0).join(topics), {**os.environ, **other}
    there = subprocess.run(command, input=text, env=env, text=True, stdout=subprocess.PIPE, check=True)
    assert there.stdout.strip() == fingerprint(topics)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [100, -1, 2**31 - 1])
def test_check_batch_names_the_first_bad_id(dtype, bad):
    ids = torch.arange(12, dtype=dtype).view(3, 4)
    check_batch(ids, 100)
    ids[1, 2] = ids[2, 0] = bad
    with pytest.raises(IndexError, match=rf"ids: {bad} at row 1, column 2 is outside \[0, 100\)"):
        check_batch(ids, 100)
    with pytest.raises(IndexError, match=str(2**32 + 5)):  # not narrowed to 5
        check_batch(torch.tensor([[2**32 + 5]]), 100)
    with pytest.raises(IndexError, match=rf"ids: {bad} at place 6 is outside \[0, 100\)"):
        check_batch(ids.flatten(), 100)


def test_check_batch_looks_at_types_and_positions():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    check_batch(ids, 100, type_ids=ids + 1, position_ids=torch.arange(4) + 508)
    with pytest.raises(IndexError, match=r"type_ids: 2 at row 0, column 0 is outside \[0, 2\)"):
        check_batch(ids, 100, type_ids=ids + 2)
    with pytest.raises(IndexError, match=r"position_ids: 512 at place 3 is outside \[0, 512\)"):
        check_batch(ids, 100, position_ids=torch.arange(4) + 509)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_check_batch_refuses_what_are_no_ids(dtype):
    with pytest.raises(TypeError, match=f"ids must be int32 or int64, got {dtype}"):
        check_batch(torch.zeros(2, 3, dtype=dtype), 100)


def test_check_batch_accepts_an_empty_batch_and_a_real_one(tokenizer, topics):
    check_batch(torch.empty(0, 8, dtype=torch.int64), 100)
    check_batch(Batches(encode(topics, tokenizer)).padded(0).ids, tokenizer.get_vocab_size())
