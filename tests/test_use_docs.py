"""The Python blocks of docs/use.md and docs/writing.md run, and the server of README.md answers."""

import pytest
import torch
from small_tasks import CONFIG
from test_readme import blocks

from electra_fast import data
from electra_fast.decoder import EncoderDecoder
from electra_fast.heads import IntentClassifier, SequenceClassifier
from electra_fast.use import Classifier

pytest_plugins = ["small_tokenizer", "small_run"]
TAGS = ("O", "B-artist", "I-artist")


@pytest.fixture
def runs(small_run, tokenizer, tmp_path, monkeypatch):
    """A current folder with the folders of models that the pages name."""
    torch.manual_seed(0)
    heads = {"c": SequenceClassifier(CONFIG, ("a", "b")), "rank": SequenceClassifier(CONFIG, ("relevance",))}
    heads["intent"] = IntentClassifier(CONFIG, ("play", "rate"), TAGS)
    for name, head in heads.items():
        head.save_pretrained(tmp_path / "runs" / name)
        data.save_tokenizer(tokenizer, tmp_path / "runs" / name)
    (tmp_path / "runs" / "demo").symlink_to(small_run)
    monkeypatch.chdir(tmp_path)


def test_the_blocks_of_the_page_run(runs, capsys):
    found = blocks("docs/use.md")
    assert len(found) == 2
    for block in found:
        exec(compile(block, "docs/use.md", "exec"), {})
    said = capsys.readouterr().out
    assert "Candidate(text=" in said and "Understood(intent=" in said and "[(" in said


def test_the_blocks_of_the_page_about_writing_run(tokenizer, tmp_path, monkeypatch, capsys):
    EncoderDecoder(CONFIG).save_pretrained(tmp_path / "runs/w")
    data.save_tokenizer(tokenizer, tmp_path / "runs/w")
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/writing.md"):
        exec(compile(block, "docs/writing.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_server_answers(runs):
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    (block,) = (block for block in blocks("README.md") if "fastapi" in block)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    texts = ["I lost my card", "play"]
    answer = TestClient(names["app"]).post("/classify", json=texts)
    assert answer.status_code == 200
    expected = Classifier("runs/c")(texts)
    assert [each["label"] for each in answer.json()] == [each.label for each in expected]
    assert [each["score"] for each in answer.json()] == pytest.approx([each.score for each in expected])
