"""The token cache: written once, found again, and refused if it is damaged."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from electra_fast import data
from electra_fast.data import Batches, encode, load_tokenizer, open_cache, tokenize

pytest.importorskip("safetensors")
pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")


class Counting:
    """Documents that can be read again; counts how often they are."""

    def __init__(self, documents):
        self.documents, self.times = documents, 0

    def __iter__(self):
        self.times += 1
        yield from self.documents


def assert_equal(found, expected):
    assert found.ids.tolist() == expected.ids.tolist()
    assert torch.equal(found.offsets, expected.offsets) and torch.equal(found.lines, expected.lines)


def files(folder, ending=""):
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(ending))


def test_encoding_keeps_every_document_whole(trained_tokenizer, topics, monkeypatch):
    many = [*topics, "", *("a b c " * n for n in range(300)), "word " * 16_000]
    whole = encode(iter(many), trained_tokenizer)
    ids, offsets, lines = whole[:3]
    assert ids.dtype == torch.int32 and offsets.dtype == lines.dtype == torch.int64
    assert len(offsets) == len(many) + 1 and offsets[0] == 0 and offsets[-1] == len(ids)
    for d, document in enumerate(many):
        expected = trained_tokenizer.encode(document, add_special_tokens=False).ids
        assert ids[offsets[d] : offsets[d + 1]].tolist() == expected
    assert (
        encode([], trained_tokenizer).offsets.tolist() == encode([], trained_tokenizer).lines.tolist() == [0]
    )
    monkeypatch.setattr(data.encoded, "CHUNK", 50)  # The ends of chunks do not matter.
    assert_equal(encode(many, trained_tokenizer), whole)


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_lines_are_tokenized_as_in_their_document(tmp_path, trained_tokenizer, topics, lowercase):
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")
    trained_tokenizer = load_tokenizer(tmp_path / "vocab.txt", lowercase=lowercase)
    # Without the ends of lines, some of these characters would combine.
    hard = "e\n\u0301 a\n\n##s\n 北\n京 \r\n[MASK\n]\u2028end\n"
    many = [*topics, hard, ""]
    ids, offsets, lines = encode(many, trained_tokenizer)[:3]
    assert ids.tolist() == [i for document in many for i in trained_tokenizer.encode(document).ids]
    assert torch.isin(offsets, lines).all() and (lines.diff() >= 0).all()
    texts = [line for document in many for line in document.split("\n")]
    assert len(lines) == len(texts) + 1
    assert lines.diff().tolist() == [len(trained_tokenizer.encode(line).ids) for line in texts]


@pytest.mark.parametrize("once", [False, True], ids=["list", "generator"])
def test_the_cache_has_the_results_of_encode_memory_mapped(tmp_path, trained_tokenizer, topics, once):
    found = tokenize((d for d in topics) if once else topics, trained_tokenizer, tmp_path)
    assert_equal(found, encode(topics, trained_tokenizer))
    assert found.ids.dtype == torch.uint16 and found.text == data.cache_folder.text_hash(topics)[0]
    (name,) = files(tmp_path, ".safetensors")
    maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if name in line]
    ranges = [range(*(int(end, 16) for end in addresses.split("-"))) for addresses in maps]
    assert all(any(tensor.data_ptr() in addresses for addresses in ranges) for tensor in found[:3])
    assert files(tmp_path, ".part") == []
    batches = [Batches(e, seq_len=32, pairs=True) for e in (found, encode(topics, trained_tokenizer))]
    assert torch.equal(*(b.packed(3).ids for b in batches))


def test_a_large_vocabulary_has_wider_ids(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(65_531)), "last"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = load_tokenizer(tmp_path / "vocab.txt", special_ids=None)
    found = tokenize(["last w0 last"], tokenizer, tmp_path)
    assert found.ids.dtype == torch.int32 and found.ids.tolist() == [65_536, 5, 65_536]


def test_a_cached_corpus_is_not_tokenized_again(tmp_path, trained_tokenizer, topics):
    documents = Counting(topics)
    tokenize(documents, trained_tokenizer, tmp_path)
    assert documents.times == 2  # once for the hash
    assert_equal(tokenize(documents, trained_tokenizer, tmp_path), encode(topics, trained_tokenizer))
    assert documents.times == 3
    tokenize(iter(topics), trained_tokenizer, tmp_path)  # the same name
    assert len(files(tmp_path, ".safetensors")) == 1
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")
    cased = load_tokenizer(tmp_path / "vocab.txt", lowercase=False)
    tokenize(topics, cased, tmp_path)  # another vocabulary, another text
    tokenize(topics[1:], trained_tokenizer, tmp_path)
    tokenize(["".join(topics)], trained_tokenizer, tmp_path)
    assert len(files(tmp_path, ".safetensors")) == 4


@pytest.mark.parametrize("empty", [[], [""], ["", " \n "]], ids=["nothing", "one empty", "blank"])
def test_an_empty_corpus_is_refused(tmp_path, trained_tokenizer, empty):
    for documents in (empty, iter(empty)):
        with pytest.raises(ValueError, match="documents must contain a token, got none"):
            tokenize(documents, trained_tokenizer, tmp_path)
    assert files(tmp_path) in ([], files(tmp_path, ".lock"))


def rewritten(change):
    """A damage that keeps the format valid: the header is read, changed and written again."""

    def damage(content):
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        return content[:8] + json.dumps(header).encode().ljust(size) + content[8 + size :]

    return damage


def flip(offset):
    def damage(content):
        changed = bytearray(content)
        changed[offset] ^= 4
        return bytes(changed)

    return damage


def other_counts(header):
    """One document fewer and one line more: all sizes are consistent with each other."""
    lines, offsets = header["lines"], header["offsets"]
    lines["shape"][0], offsets["shape"][0] = lines["shape"][0] + 1, offsets["shape"][0] - 1
    lines["data_offsets"][1] += 8
    offsets["data_offsets"][0] += 8
    facts = header["__metadata__"]
    facts["lines"], facts["documents"] = str(lines["shape"][0] - 1), str(offsets["shape"][0] - 1)


DAMAGES = {
    "nothing": (lambda content: b"", "damaged, "),
    "four bytes": (lambda content: content[:4], "damaged, "),
    "half a header": (lambda content: content[:1000], "damaged, "),
    "header only": (lambda content: content[:2048], "damaged, "),
    "half": (lambda content: content[: len(content) // 2], "damaged, "),
    "last byte missing": (lambda content: content[:-1], "damaged, "),
    "a byte more": (lambda content: content + b"\0", "damaged, "),
    "header size": (lambda content: b"\xff" * 8 + content[8:], "damaged, "),
    "magic": (lambda content: b"PK\3\4" * 1000, "damaged, "),
    "zeros": (lambda content: bytes(len(content)), "damaged, "),
    "first id": (flip(data.cache.HEADER), "SHA-256"),
    "some id": (flip(20_000), "SHA-256"),
    "last offset": (flip(-1), "SHA-256"),
    "dtype": (rewritten(lambda header: header["ids"].update(dtype="I16")), "SHA-256"),
    "counts": (rewritten(other_counts), "SHA-256"),
    "tokens": (rewritten(lambda header: header["__metadata__"].update(tokens="3")), "SHA-256"),
    "vocabulary": (rewritten(lambda header: header["__metadata__"].update(vocab="0" * 64)), "SHA-256"),
    "no checksum": (rewritten(lambda header: header["__metadata__"].pop("sha256")), "SHA-256"),
    "a name": (rewritten(lambda header: header.update(other=header.pop("lines"))), "SHA-256"),
    "older": (
        rewritten(lambda header: header["__metadata__"].update(format="electra_fast tokens 1")),
        "must have the format 'electra_fast tokens 2', got 'electra_fast tokens 1'",
    ),
    "of another program": (
        rewritten(lambda header: header.pop("__metadata__")),
        "must have the format .* got None",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory, trained_tokenizer, topics):
    folder = tmp_path_factory.mktemp("tokens")
    tokenize(topics, trained_tokenizer, folder)
    (name,) = files(folder, ".safetensors")
    return name, (folder / name).read_bytes()


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_refused_and_built_again(
    tmp_path, trained_tokenizer, topics, written, damage, message
):
    name, content = written
    file = tmp_path / name
    file.write_bytes(damage(content))
    with pytest.raises(ValueError, match=rf"{name}: .*{message}.*; delete it and tokenize again"):
        open_cache(file)
    with pytest.warns(UserWarning, match=f"{name}: .* it is built again") as said:
        found = tokenize(topics, trained_tokenizer, tmp_path)
    assert len(said) == 1 and file.read_bytes() == content
    assert_equal(found, encode(topics, trained_tokenizer))


def test_every_bit_of_the_header_counts(tmp_path, written, trained_tokenizer, topics):
    name, content = written
    expected = encode(topics, trained_tokenizer)
    end = content.index(b"  ", 8)
    for offset in range(0, end, 7):
        (tmp_path / name).write_bytes(flip(offset)(content))
        with pytest.raises(ValueError, match=name):
            open_cache(tmp_path / name)
    (tmp_path / name).write_bytes(content)
    assert_equal(open_cache(tmp_path / name), expected)


def test_another_vocabulary_is_refused(tmp_path, trained_tokenizer, written):
    name, content = written
    (tmp_path / name).write_bytes(content)
    open_cache(tmp_path / name, trained_tokenizer)
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")
    with pytest.raises(ValueError, match=f"{name}: tokenized with another vocabulary"):
        open_cache(tmp_path / name, load_tokenizer(tmp_path / "vocab.txt", lowercase=False))
    with pytest.raises(FileNotFoundError):
        open_cache(tmp_path / "missing.safetensors")


PROGRAM = """
import sys, time
from electra_fast import data

class Documents:
    times = 0
    def __iter__(self):
        self.times += 1
        print("read", self.times, flush=True)
        yield from documents[:1]
        time.sleep(float(sys.argv[2]) if self.times == 2 else 0)
        yield from documents[1:]

documents = sys.stdin.read().split(chr(0))
tokenizer = data.load_tokenizer(sys.argv[1] + "/vocab.txt")
data.encoded.CHUNK = 1
data.tokenize(Documents(), tokenizer, sys.argv[1])
print("done", flush=True)
"""


def start(folder, topics, seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(seconds)],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write(chr(0).join(topics))
    process.stdin.close()
    return process


def test_a_second_process_waits_and_finds_the_file(tmp_path, trained_tokenizer, topics):
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")

    class Documents(Counting):
        def __iter__(self):
            self.times += 1
            yield from self.documents
            if self.times == 2:  # shortly before the end, another process starts and reads the text once
                self.other = start(tmp_path, self.documents, 0)
                assert self.other.stdout.readline() == "read 1\n"
                time.sleep(0.5)
                assert self.other.poll() is None

    documents = Documents(topics)
    tokenize(documents, trained_tokenizer, tmp_path)
    with documents.other as other:
        assert other.stdout.read() == "done\n" and other.wait() == 0
    assert len(files(tmp_path, ".safetensors")) == 1


def test_a_killed_build_leaves_no_complete_file(tmp_path, trained_tokenizer, topics):
    data.save_vocab(trained_tokenizer, tmp_path / "vocab.txt")
    with start(tmp_path, topics, 60) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["read 1\n", "read 2\n"]
        process.kill()
        assert process.wait() == -signal.SIGKILL and "done" not in process.stdout.read()
    assert files(tmp_path, ".safetensors") == [] and len(files(tmp_path, ".part")) == 1
    assert_equal(tokenize(topics, trained_tokenizer, tmp_path), encode(topics, trained_tokenizer))
    assert files(tmp_path, ".part") == []


@pytest.mark.parametrize("once", [False, True], ids=["list", "generator"])
def test_a_full_disk_leaves_no_part(tmp_path, trained_tokenizer, topics, once):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError):
            tokenize(iter(topics) if once else topics, trained_tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == files(tmp_path, ".lock")
    tokenize(topics, trained_tokenizer, tmp_path)


def test_a_failing_corpus_and_an_interrupt_leave_no_part(tmp_path, trained_tokenizer):
    for error in (ValueError("byte 3"), KeyboardInterrupt()):

        def failing(error=error):
            yield "text"
            raise error

        with pytest.raises(type(error)):
            tokenize(failing(), trained_tokenizer, tmp_path)
        assert files(tmp_path) == []


def test_only_a_terminal_shows_a_progress_bar(tmp_path, trained_tokenizer, topics, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    tokenize(topics, trained_tokenizer, tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tokenize(topics[1:], trained_tokenizer, tmp_path, progress=False)
    assert capsys.readouterr().err == ""
    tokenize(topics[2:], trained_tokenizer, tmp_path)
    said = capsys.readouterr().err
    assert "tokenize: 100%" in said and "characters/s" in said


def test_the_default_folder_is_the_users_cache(tmp_path, trained_tokenizer, topics, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenize(topics, trained_tokenizer)
    assert len(files(tmp_path / "electra_fast", ".safetensors")) == 1


def test_long_lines_are_tokenized_in_pieces(trained_tokenizer, topics, monkeypatch):
    many = ["", *topics, "the function " * 2000, " " * 900, "北京" * 300, "x\n\ny", "end"]
    whole = encode(many, trained_tokenizer)
    largest, batch = 0, type(trained_tokenizer).encode_batch_fast

    class Watched:
        def __getattr__(self, name):
            return getattr(trained_tokenizer, name)

        def encode_batch_fast(self, texts, **options):
            nonlocal largest
            largest = max(largest, sum(map(len, texts)))
            return batch(trained_tokenizer, texts, **options)

    for longest in (150, 400):
        monkeypatch.setattr(data.encoded, "LONGEST", longest)
        monkeypatch.setattr(data.encoded, "CHUNK", longest)
        largest = 0
        assert_equal(encode(many, Watched()), whole)
        assert 100 < largest < 2 * longest


def test_the_error_without_the_safetensors_package_names_it(tmp_path, trained_tokenizer, topics, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        tokenize(topics, trained_tokenizer, tmp_path)
    assert files(tmp_path, ".part") == []
