"""Fixtures: a small folder of tokens in several shards, and the text that it was made of."""

import pytest
from small_tokens import SHARD, in_this_process, made

from electra_fast import data
from electra_fast.data import tokenizing


@pytest.fixture
def serial(monkeypatch):
    """Small shards, made in this process."""
    monkeypatch.setattr(tokenizing, "SHARD", SHARD)
    monkeypatch.setattr(tokenizing, "results", in_this_process)


@pytest.fixture(scope="session")
def wordpiece(topics):  # not "tokenizer", a name that two plugins of these tests have
    return data.train_tokenizer(topics, vocab_size=1500)


@pytest.fixture(scope="module")
def text(tmp_path_factory, topics):
    """Two files: documents with several lines and of one word, and a file with one document of one word."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("\n\n".join([*topics, *("words " * n for n in range(1, 60))]))
    (folder / "b.txt").write_text("end")
    return folder


@pytest.fixture(scope="module")
def folder(text, wordpiece, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "SHARD", SHARD)
        patch.setattr(tokenizing, "results", in_this_process)
        return made(text, wordpiece, tmp_path_factory.mktemp("tokens") / "tokens")
