"""The token cache when its folder, its locks or its files fail during a run."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest
from test_data_cache import assert_equal, files

from electra_fast import data
from electra_fast.data import encode, open_cache, tokenize

pytest.importorskip("safetensors")
pytest_plugins = ["corpus"]
pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("once", [False, True], ids=["list", "generator"])
@pytest.mark.parametrize("case", ["XDG_CACHE_HOME", "no home"])
def test_a_cache_that_cannot_be_written_is_replaced_for_this_process(
    tmp_path, tokenizer, topics, monkeypatch, case, once
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if case == "XDG_CACHE_HOME" else "")
    if case == "no home":
        monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match=r"cache folder cannot be written .* Set XDG_CACHE_HOME to a folder"):
        found = tokenize(iter(topics) if once else topics, tokenizer)
    assert files(tmp_path) == ["file"]
    assert_equal(found, encode(topics, tokenizer))  # still mapped
    with pytest.raises(OSError, match="file"):  # A folder given by the caller is not replaced.
        tokenize(topics, tokenizer, tmp_path / "file")


def test_an_error_of_the_corpus_is_not_handled_as_one_of_the_cache(tmp_path, tokenizer):
    def failing():
        yield "text"
        raise PermissionError("the corpus")

    with pytest.raises(PermissionError, match="the corpus"):
        tokenize(failing(), tokenizer)


def test_a_file_system_without_locks_works(tmp_path, tokenizer, topics, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert_equal(tokenize(topics, tokenizer, tmp_path), encode(topics, tokenizer))
    monkeypatch.setattr(data.cache, "_build", lambda *_: pytest.fail("made twice"))
    assert_equal(tokenize(topics, tokenizer, tmp_path), encode(topics, tokenizer))
    assert files(tmp_path, ".part") == []


def test_ids_stay_valid_after_the_file_is_removed_or_replaced(tmp_path, tokenizer, topics):
    found, expected = tokenize(topics, tokenizer, tmp_path), encode(topics, tokenizer)
    (name,) = files(tmp_path, ".safetensors")
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(b"another")
    assert_equal(found, expected)


def test_a_fifo_raises_an_error_instead_of_blocking(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match=r"open_cache: .*fifo must be a regular file, got a FIFO"):
        open_cache(tmp_path / "fifo")
