"""Wrong options, files and folders of `finetune` and `evaluate` end in one sentence, and change nothing."""

import re
import shutil
from pathlib import Path

import fine_tunings
import pytest

from electra_fast.__main__ import main
from electra_fast.tasks.classify import ordered
from electra_fast.train.run_folder import RunFolder

for package in ("tokenizers", "tqdm", "sklearn"):
    pytest.importorskip(package)
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return fine_tunings.files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(paths, tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("runs") / "finished"
    fine_tunings.small(paths, out, steps=1)
    return out


def error(*arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return str(ended.value.code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-len", 0], "--max-len must be 8 or more, got 0"),
        (["--max-len", 1000], "--max-len must be at most 32, for this model, got 1000"),
        (["--precision", "half"], "--precision must be bf16 or float32, got 'half'"),
        (["--glue", "XX"], "--glue must be one of CoLA, .* got 'XX'"),
        (["--text", ""], "--text must not be empty, got ''"),
        (["--columns", "text", "text"], r"--columns must name each column once, got \('text', 'text'\)"),
        (["--separator", ";"], "line 2: the label must be one label, because the model has one label per"),
        (["--out", ""], "--out must be a folder without metrics.json, got ''"),
    ],
)
def test_evaluate_refuses_an_option(finished, paths, arguments, message):
    found = error("evaluate", "classify", "--model", finished, "--data", paths["dev"], *arguments)
    assert re.search(message, found), found


def test_evaluate_does_not_overwrite_the_results_of_a_run(finished, paths):
    kept = (finished / "metrics.json").read_bytes()
    found = error("evaluate", "classify", "--model", finished, "--data", paths["dev"], "--out", finished)
    assert "--out must be a folder without metrics.json" in found
    assert (finished / "metrics.json").read_bytes() == kept


@pytest.mark.parametrize("task", ["regress", "choose"])
def test_evaluate_refuses_a_model_with_the_head_of_another_task(finished, tmp_path, task):
    model = shutil.copytree(finished / "seed-0" / "model", tmp_path / "model")
    (tmp_path / "regress").write_text("text,score\na,1\nb,2\n")
    (tmp_path / "choose").write_text('{"prompt": "a", "options": ["b", "c"], "label": 0}\n')
    found = error("evaluate", task, "--model", model, "--data", tmp_path / task)
    wanted = {"regress": "must have one output for regress, got 3", "choose": "must have the head of choose"}
    assert wanted[task] in found


def test_the_folder_of_a_seed_is_not_that_of_a_run(finished):
    kept = sorted(finished.rglob("*"))
    assert "must be the folder of a whole run" in error("finetune", "--resume", finished / "seed-0")
    assert sorted(finished.rglob("*")) == kept


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"seed": 0, "failed": null, "dev": {"accuracy": "x"}}']
)
def test_damaged_results_of_a_seed_are_named(finished, tmp_path, content):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "seed-0" / "metrics.json").write_text(content)
    assert f"finetune: {out / 'seed-0' / 'metrics.json'} must" in error("finetune", "--resume", out)


def test_a_seed_without_its_model_is_named(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "seed-0" / "model")
    found = error("finetune", "--resume", out)
    assert f"{out / 'seed-0'} must have the model of the seed" in found and "--resume trains" in found


def test_a_recipe_of_another_command_is_refused(finished):
    found = error("pretrain", "--resume", finished)
    assert found.endswith("must be the recipe of a pretrain run, got that of another command")


def test_a_whole_run_is_locked_and_an_out_that_is_impossible_is_named(finished, paths, tmp_path):
    lock = RunFolder(finished, "finetune")
    assert "another training process" in error("finetune", "--resume", finished)
    lock.close()
    (tmp_path / "file").touch()
    files = ["--train", paths["train"], "--dev", paths["dev"]]
    found = error("finetune", "classify", "--model", finished, *files, "--out", tmp_path / "file" / "run")
    assert "--out must be a folder that can be created" in found


@pytest.mark.parametrize(
    ("task", "train", "options", "message"),
    [
        (
            "classify",
            "text,label\na,x\n",
            ["--columns", "text", "label"],
            "line 1 must be a record, got the n",
        ),
        ("regress", "text,score\na,1e300\n", [], "line 2: score must be from -1e.18 to 1e.18, got 1e300"),
        (
            "classify",
            "text,label\na,x\nb,y\n",
            ["--set", "rtd_weight=1"],
            "--set must be FIELD=VALUE with one",
        ),
    ],
)
def test_finetune_refuses_a_file(finished, tmp_path, task, train, options, message):
    file = Path(tmp_path / "train.csv")
    file.write_text(train)
    arguments = ["--model", finished, "--train", file, "--dev", file, "--out", tmp_path / "run", *options]
    assert re.search(message, error("finetune", task, *arguments))


def test_labels_that_are_the_same_number_keep_their_order():
    assert ordered({"1", "01", "-2", "10"}) == ("-2", "01", "1", "10")
    assert ordered({"--3", "4"}) == ("--3", "4")


def test_a_list_of_labels_needs_a_model_with_several(finished, tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": ["x"]}\n')
    found = error("evaluate", "classify", "--model", finished, "--data", tmp_path / "dev.jsonl")
    assert "dev.jsonl, line 1: the label must be one label" in found
