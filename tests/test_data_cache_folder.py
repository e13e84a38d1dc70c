"""The token cache when its folder, its locks or its files fail during a run."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from test_data_cache import assert_equal, files
from text_files import tar_of

from electra_fast import data
from electra_fast.data import encode, open_cache, tokenize

pytest.importorskip("safetensors")
pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("once", [False, True], ids=["list", "generator"])
@pytest.mark.parametrize("case", ["XDG_CACHE_HOME", "no home"])
def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(
    tmp_path, trained_tokenizer, topics, monkeypatch, case, once
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if case == "XDG_CACHE_HOME" else "")
    if case == "no home":
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match=r"cache folder cannot be written .* Set XDG_CACHE_HOME to a folder"):
        found = tokenize(iter(topics) if once else topics, trained_tokenizer)
    assert files(tmp_path) == ["file"]
    assert_equal(found, encode(topics, trained_tokenizer))  # still mapped
    with pytest.raises(OSError, match="file"):  # A folder given by the caller is not replaced.
        tokenize(topics, trained_tokenizer, tmp_path / "file")


def test_an_error_of_the_corpus_is_not_handled_as_one_of_the_cache(tmp_path, trained_tokenizer):
    def failing():
        yield "text"
        raise PermissionError("the corpus")

    with pytest.raises(PermissionError, match="the corpus"):
        tokenize(failing(), trained_tokenizer)


def test_a_file_system_without_locks_works(tmp_path, trained_tokenizer, topics, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert_equal(tokenize(topics, trained_tokenizer, tmp_path), encode(topics, trained_tokenizer))
    monkeypatch.setattr(data.cache, "_build", lambda *_: pytest.fail("made twice"))
    assert_equal(tokenize(topics, trained_tokenizer, tmp_path), encode(topics, trained_tokenizer))
    assert files(tmp_path, ".part") == []


def test_ids_stay_valid_after_the_file_is_removed_or_replaced(tmp_path, trained_tokenizer, topics):
    found, expected = tokenize(topics, trained_tokenizer, tmp_path), encode(topics, trained_tokenizer)
    (name,) = files(tmp_path, ".safetensors")
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"another")
    assert_equal(found, expected)


def test_a_fifo_raises_an_error_instead_of_blocking(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"open_cache: .*fifo must be a regular file, got a FIFO"):
        open_cache(tmp_path / "fifo")


def read_count(monkeypatch):
    """Count how often documents are read."""
    read, times = data.Documents.__iter__, []

    def reading(documents):
        times.append(1)
        return read(documents)

    monkeypatch.setattr(data.Documents, "__iter__", reading)
    return times


def test_a_text_whose_files_did_not_change_is_not_read_again(
    tmp_path, trained_tokenizer, topics, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("\n\n".join(topics))
    (tmp_path / "b.tar").write_bytes(tar_of({"a.txt": b"a text", "picture.png": b""}))
    times, paths = read_count(monkeypatch), [tmp_path / "a.txt", tmp_path / "b.tar"]

    def opened(**options):
        documents = data.documents(paths)
        found, before = tokenize(documents, trained_tokenizer, **options), len(times)
        times.clear()
        assert documents.note == "skipped: 1 .png (to read it, name its own path)"
        return found, before

    expected = opened()[0]
    assert opened()[1] == 1  # the files are too new
    monkeypatch.setattr(data.cache_folder, "RECENT", -1)
    assert opened()[1] == 1
    found, count = opened()
    assert count == 0 and found.text == expected.text
    assert_equal(found, expected)
    assert opened(verify=True)[1] == 1
    text = (tmp_path / "a.txt").read_text()
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert opened()[1] == 1 and opened()[1] == 0  # another time
    (tmp_path / "a.txt").write_text(text.replace("the", "The", 1))
    found, count = opened()
    assert count == 2 and found.text != expected.text  # hashed, and tokenized
    (tmp_path / "a.txt").write_text(text)
    assert opened()[0].text == expected.text
    assert tokenize(data.documents(paths[::-1]), trained_tokenizer).text != expected.text


def test_the_options_of_a_text_are_remembered_with_it(tmp_path, trained_tokenizer, monkeypatch):
    monkeypatch.setattr(data.cache_folder, "RECENT", -1)
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    texts = [
        tokenize(data.documents(tmp_path / "a.txt", blanks_separate=b), trained_tokenizer).text
        for b in (0, 1, 0)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_a_cached_file_that_changed_is_hashed_again(tmp_path, trained_tokenizer, topics, monkeypatch):
    monkeypatch.setattr(data.cache_folder, "RECENT", -1)
    tokenize(topics, trained_tokenizer, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    open_cache(file, verify=False)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        open_cache(file, verify=False)
    with pytest.warns(UserWarning, match="it is built again"):
        assert_equal(tokenize(topics, trained_tokenizer, tmp_path), encode(topics, trained_tokenizer))
