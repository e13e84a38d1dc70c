"""`python -m electra_fast use`: what it prints, as text and as JSON, and the errors of its arguments."""

import json
import re
from unittest.mock import Mock

import pytest
import torch
from small_tasks import CONFIG
from small_use import TEXTS

from electra_fast import data, use
from electra_fast.__main__ import main
from electra_fast.heads import SequenceClassifier, TokenClassifier

pytest.importorskip("tokenizers")
pytest_plugins = ["small_tokenizer", "small_run"]


def printed(capsys, *arguments) -> str:
    main(["use", *map(str, arguments)])
    return capsys.readouterr().out


def objects(capsys, *arguments) -> list[dict]:
    return [json.loads(line) for line in printed(capsys, *arguments, "--json").splitlines()]


def refused(*arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["use", *map(str, arguments)])
    return str(ended.value.code)


def close(value):
    return pytest.approx(value, rel=1e-5)


def test_detect(small_run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    (tmp_path / "b.csv").write_text(f'text,more\n"{TEXTS[3]}",x\n')
    files = ("--data", tmp_path / "a.txt", tmp_path / "b.csv")
    found = objects(capsys, "detect", "--model", small_run, TEXTS[2], *files)
    assert [each["text"] for each in found] == [TEXTS[i] for i in (2, 0, 1, 3)]
    (word,) = use.detect(TEXTS[2], small_run).words
    (got,) = found[0]["words"]
    assert got == {"text": "a", "start": 0, "end": 1, "probability": close(word.probability)}
    page = tmp_path / "page.html"
    said = printed(capsys, "detect", "--model", small_run, TEXTS[0], "--threshold", "0", "--html", page)
    assert re.match(r"\[the 0\.\d\d\] \[cat 0\.\d\d\] \[sat 0\.\d\d\]\[\. 0\.\d\d\]\n", said), said
    assert "(no word is above 1)" in printed(
        capsys, "detect", "--model", small_run, TEXTS[0], "--threshold", "1"
    )
    assert "the cat" in re.sub("<[^>]*>", "", page.read_text())


def test_suggest_score_and_choose(small_run, capsys):
    model = ("--model", small_run)
    (found,) = objects(capsys, "suggest", *model, TEXTS[0], "--span", "4:7", "--top", "2")
    (expected,) = use.suggest(TEXTS[0], small_run, [(4, 7)], top=2).suggestions
    (got,) = found["suggestions"]
    assert [each["text"] for each in got["candidates"]] == [each.text for each in expected.candidates]
    assert "lower --threshold" in printed(capsys, "suggest", *model, TEXTS[0], "--threshold", "1")
    assert expected.candidates[0].text in printed(capsys, "suggest", *model, TEXTS[0], "--span", "4:7")
    (found,) = objects(capsys, "score", *model, TEXTS[0])
    assert found["generator"] == close(use.score(TEXTS[0], small_run).generator)
    head, row = printed(capsys, "score", *model, TEXTS[0]).splitlines()
    assert re.split("  +", head) == ["tokens", "generator", "per token", "discriminator", "per token", "text"]
    each = found["generator"] / found["tokens"]
    assert row.split()[:3] == [str(found["tokens"]), f"{found['generator']:.2f}", f"{each:.4f}"]
    lines = printed(capsys, "score", *model, *TEXTS, "--by", "discriminator").splitlines()
    assert re.split("  +", lines[0]) == ["tokens", "discriminator", "per token", "text"]
    assert [line.rpartition("  ")[2] for line in lines[1:]] == TEXTS
    (found,) = objects(
        capsys, "choose", *model, TEXTS[0], "--template", "{text} {option}", "--options", "red", "cat"
    )
    assert found["option"] == use.choose(TEXTS[0], ["red", "cat"], small_run, "{text} {option}").option
    assert re.match(
        r"(great|terrible)  \((great|terrible) 0\.\d", printed(capsys, "choose", *model, TEXTS[0])
    )


def test_fine_tuned_models(tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    heads = {
        "classify": SequenceClassifier(CONFIG, ("bad", "good")),
        "rank": SequenceClassifier(CONFIG, ("x",)),
    }
    heads["tag"] = TokenClassifier(CONFIG, ("O", "B-x", "I-x"))
    for name, head in heads.items():
        head.save_pretrained(tmp_path / name)
        data.save_tokenizer(tokenizer, tmp_path / name)
    found = objects(capsys, "classify", "--model", tmp_path / "classify", *TEXTS)
    assert [each["label"] for each in found] == [
        r.label for r in use.Classifier(tmp_path / "classify")(TEXTS)
    ]
    assert len(objects(capsys, "tag", "--model", tmp_path / "tag", *TEXTS)) == len(TEXTS)
    with pytest.warns(UserWarning, match="1 of 4 texts were cut off at 8 tokens"):
        objects(capsys, "classify", "--model", tmp_path / "classify", *TEXTS, "--max-len", "8")
    lines = printed(capsys, "rank", "--model", tmp_path / "rank", "--query", "who?", *TEXTS).splitlines()
    ranked = use.rank("who?", TEXTS, tmp_path / "rank")
    assert [line.partition("  ")[2] for line in lines] == [each.text for each in ranked]
    said = printed(capsys, "reply", "--model", tmp_path / "rank", "--context", "who?", "--", *TEXTS)
    assert said.strip().endswith(ranked[0].text)


def test_pairs(small_run, tmp_path, capsys):
    file, page = tmp_path / "own.csv", tmp_path / "page.html"
    pairs = [("the cat sat", "the dog sat", "x"), ("red cat", "blue cat", "y"), ("who ran", "what ran", "y")]
    file.write_text("\n".join(map(",".join, [("a", "b", "kind"), *pairs])) + "\n")
    columns = ("--data", file, "--text", "a", "--pair", "b", "--category", "kind")
    command = ("pairs", "--model", small_run, *columns)
    (found,) = objects(capsys, *command, "--html", page)
    expected = use.pairs(pairs, small_run)
    assert found["overall"]["rate"] == expected.overall.rate and found["by"] == "generator"
    assert [each["name"] for each in found["categories"]] == ["x", "y"]
    assert "<svg" in page.read_text() and "generator" in printed(capsys, *command)
    assert refused("pairs", *columns) == "error: pairs: --model must be given, got none"
    said = refused(*command, "--by", tmp_path / "x", "--label", "y")
    assert "pairs: --by must be on this machine" in said


def test_errors_of_arguments(small_run, tmp_path, capsys):
    model = ("--model", small_run)
    wanted = "error: choose: TEXT must be given, got none; texts are before the options or after --, or "
    assert refused("choose", *model, "--options", "red", "blue", "the cat").startswith(wanted)
    assert "detect: --data must be on this machine" in refused("detect", *model, "--data", tmp_path / "x")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    assert re.search(
        "x.csv must have a column 'text'", refused("detect", *model, "--data", tmp_path / "x.csv")
    )
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty.txt must contain a text" in refused("detect", *model, "--data", tmp_path / "empty.txt")
    assert "must be a file that can be written" in refused("detect", *model, "a", "--html", tmp_path)
    assert refused("suggest", *model, "a", "--span", "7:4") == "2"
    assert "must be two numbers such as 4:7, got '7:4'" in capsys.readouterr().err
    for threshold in ("nan", "2"):
        said = refused("detect", *model, "a", "--threshold", threshold)
        assert said.startswith("error: detect: --threshold must be in [0, 1], got")
    for name in ("detect", "score", "choose"):  # bytes that are not UTF-8
        assert "text 1 must be Unicode, got \\udce9" in refused(name, *model, "caf\udce9")
    assert "precision must be one of float32, bf16" in refused("score", *model, "a", "--precision", "half")


def test_the_end_of_a_pipe_is_no_error(small_run, monkeypatch, capfd):
    monkeypatch.setattr("electra_fast.use.command.run", Mock(side_effect=BrokenPipeError(32, "Broken pipe")))
    monkeypatch.setattr("os.dup2", Mock())
    assert refused("detect", "--model", small_run, "a") == "141"
    assert capfd.readouterr().err == ""
