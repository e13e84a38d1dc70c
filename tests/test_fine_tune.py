"""A fine-tuning run learns, resumes to the same bits, and leaves a folder that other programs can use."""

import json
import math
import random
import shutil
import signal
import time
from pathlib import Path

import fine_tunings
import pytest
import torch

from electra_fast.__main__ import main
from electra_fast.tasks.examples import TaskBatches
from electra_fast.train import step as steps
from electra_fast.train.fine_tune import FineTuning
from electra_fast.train.results import evaluate_folder
from electra_fast.train.task_data import TaskData

for package in ("tokenizers", "tqdm", "sklearn"):
    pytest.importorskip(package)
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return fine_tunings.files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(paths, tmp_path_factory, cache):
    """(folder, results) of a run of two seeds that is not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert fine_tunings.finish(fine_tunings.recipe(paths, seeds=2), out) == 0
    return out, json.loads((out / "metrics.json").read_text())


def test_it_learns_and_says_what_it_learned(finished):
    out, results = finished
    assert results["median"] > 0.9 > results["majority"]["accuracy"] + 0.3
    assert [r["seed"] for r in results["seeds"]] == [0, 1] and not any(r["failed"] for r in results["seeds"])
    values = [r["dev"]["accuracy"] for r in results["seeds"]]
    assert (results["lowest"], results["highest"]) == (min(values), max(values))
    assert results["seeds"][results["best"]]["dev"]["accuracy"] == max(values) == results["dev"]["accuracy"]
    assert results["items"] == {"train": 96, "dev": 40, "test": 40} and results["truncated"]["train"] == 0
    lines = [json.loads(line) for line in (out / "seed-0/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "dev"] == [8, 16, 24]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 6 and losses[-1] < losses[0] / 2
    assert not (out / "seed-0/checkpoints").exists()  # the model of an ended seed is in its folder model/
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    right = [record["label"] == record["predicted"] for record in records]
    assert sum(right) / len(right) == pytest.approx(results["test"]["accuracy"], abs=1e-12)


def test_evaluate_gives_the_same_numbers_again(finished, paths, tmp_path, capsys):
    out, results = finished
    for role in ("dev", "test"):
        assert evaluate_folder("classify", out, [paths[role]], device="cpu") == results[role]
    again = ["evaluate", "classify", "--model", str(out), "--data", paths["test"], "--device", "cpu"]
    main([*again, "--out", str(tmp_path / "again")])
    assert capsys.readouterr().out.startswith(f"accuracy {results['test']['accuracy']:.4f}, f1 ")
    names = ("predictions.jsonl",)
    assert all((tmp_path / "again" / n).read_bytes() == (out / n).read_bytes() for n in names)


def test_evaluate_checks_its_options(finished, paths):
    def evaluate(**options):
        return evaluate_folder("classify", finished[0], [paths["dev"]], device="cpu", **options)

    with pytest.raises(ValueError, match="--max-len must be at most 32, for this model, got 33"):
        evaluate(max_len=33)
    with pytest.raises(ValueError, match="--max-len must be 8 or more, got 4"):
        evaluate(max_len=4)
    assert evaluate(max_len=32) == finished[1]["dev"]


def test_evaluate_gives_the_same_numbers_for_answers_and_in_bf16(tmp_path):
    """Some questions of --train have no answer, so the model may leave those of --dev without one."""
    context = "red card lost"
    unanswered = {"id": "no", "question": "when", "answers": []}
    answered = {"id": "yes", "question": "what", "answers": [{"text": "card", "answer_start": 4}]}
    for name, found in {"train": [answered, unanswered], "dev": [answered]}.items():
        paragraphs = [{"context": context, "qas": found}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    files = {name: str(tmp_path / f"{name}.json") for name in ("train", "dev")}
    options = {"task": "answer", "steps": 3, "max_query": 4, "precision": "bf16", "batch": 2}
    results = fine_tunings.small(files, tmp_path / "run", **options)
    assert "best_f1_threshold" in results["dev"]
    assert evaluate_folder("answer", tmp_path / "run", [files["dev"]], device="cpu") == results["dev"]
    assert results["seeds"][0]["dev"] == results["dev"]


def test_transformers_predicts_the_same(finished):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    out, _ = finished
    classify = transformers.pipeline("text-classification", model=str(out), device="cpu")
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    for record, found in zip(records, classify([r["text"] for r in records]), strict=True):
        assert found["label"] == record["predicted"]
        assert found["score"] == pytest.approx(record["score"], abs=1e-5)


def test_killed_at_any_moment_it_resumes_to_the_same_bits(finished, paths, tmp_path):
    recipe, out = fine_tunings.recipe(paths, seeds=2), tmp_path / "run"
    for _ in range(3):
        process = fine_tunings.start(recipe, out)
        time.sleep(random.uniform(0.2, 1.5))
        process.kill()
        process.join()
    assert fine_tunings.finish(recipe, out) == 0
    assert fine_tunings.result(out) == fine_tunings.result(finished[0])


@pytest.mark.parametrize("die_at", [2, 9, 40])
def test_killed_in_a_save_it_resumes_to_the_same_bits(finished, paths, tmp_path, die_at):
    recipe, out = fine_tunings.recipe(paths, seeds=2), tmp_path / "run"
    assert fine_tunings.finish(recipe, out, die_at=die_at) == -signal.SIGKILL
    assert fine_tunings.finish(recipe, out) == 0
    assert fine_tunings.result(out) == fine_tunings.result(finished[0])


def test_the_folder_to_resume_is_that_of_all_seeds(paths, tmp_path, monkeypatch, capsys):
    one_step = FineTuning._one_step

    def stop(training, batches):
        one_step(training, batches)
        training._stop(signal.SIGTERM)

    monkeypatch.setattr(FineTuning, "_one_step", stop)
    with pytest.raises(SystemExit):
        fine_tunings.small(paths, tmp_path / "run")
    saved = f"seed-0 is saved at step 1; continue with --resume {tmp_path / 'run'}\n"
    assert saved in capsys.readouterr().out
    assert not (tmp_path / "run/seed-0/model").exists()  # it is written after the last step


def test_a_signal_saves_and_ends_and_resume_continues(finished, paths, tmp_path):
    recipe, out = fine_tunings.recipe(paths, seeds=2, save_every=1000), tmp_path / "run"
    assert fine_tunings.finish(recipe, out, signal_at=(signal.SIGTERM, 1, 5)) == 128 + signal.SIGTERM
    assert max(out.glob("seed-1/checkpoints/step-*")).name == "step-000000005"
    main(["finetune", "--resume", str(out), "--device", "cpu"])
    assert fine_tunings.result(out) == fine_tunings.result(finished[0])


def test_more_seeds_are_added_to_a_run(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    kept = (out / "seed-0/model/model.safetensors").stat().st_mtime_ns
    main(["finetune", "--resume", str(out), "--seeds", "3", "--device", "cpu"])
    results = json.loads((out / "metrics.json").read_text())
    assert [r["seed"] for r in results["seeds"]] == [0, 1, 2]
    assert (out / "seed-0/model/model.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize("worse", [0, 1])
def test_the_best_seed_is_the_one_with_the_highest_metric(worse, finished, paths, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    file = out / f"seed-{worse}" / "metrics.json"
    seed = json.loads(file.read_text())
    seed["dev"]["accuracy"] = 0.75
    file.write_text(json.dumps(seed))
    results = fine_tunings.small(paths, out, seeds=2, precision="float32")
    assert (results["best"], results["lowest"]) == (1 - worse, 0.75) and results["highest"] > 0.9
    best = (out / f"seed-{1 - worse}" / "model" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == best


def test_a_label_of_dev_that_train_does_not_have_is_refused(paths, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\nmy card was lost,card\nwho knows,other\n")
    with pytest.raises(
        ValueError, match=r"dev.csv, line 3: the label must be one of the labels in training: card, cash, ra"
    ):
        fine_tunings.small(paths | {"dev": str(tmp_path / "dev.csv")}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["4", "9999999999"])
def test_a_vocabulary_that_cannot_be_trained_is_refused(size, paths):
    with pytest.raises(ValueError, match=r"finetune: --vocab must be in \[5, 1048576\] if it is a size"):
        fine_tunings.recipe(paths, vocab=size).resolved()


def test_the_folder_of_a_model_is_not_that_of_a_run(finished, capsys):
    with pytest.raises(SystemExit, match="the folder of a model; --model starts a new run from it"):
        main(["finetune", "--resume", str(finished[0] / "seed-0" / "model")])


def test_the_folder_of_a_seed_is_not_resumed(finished):
    out = finished[0]
    before = (out / "seed-0/metrics.json").read_bytes()
    with pytest.raises(SystemExit, match=f"which is one seed; use {out}"):
        main(["finetune", "--resume", str(out / "seed-0"), "--device", "cpu"])
    assert (out / "seed-0/metrics.json").read_bytes() == before


@pytest.mark.parametrize("role", ["train", "dev"])
def test_all_seeds_have_the_same_data(role, tmp_path):
    paths = fine_tunings.files(tmp_path)
    fine_tunings.small(paths, tmp_path / "run", steps=1)
    lines = Path(paths[role]).read_text().splitlines()
    Path(paths[role]).write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(SystemExit, match=f"--{role} must be the data with which .*run was started"):
        main(["finetune", "--resume", str(tmp_path / "run"), "--seeds", "2", "--device", "cpu"])


def test_the_options_reach_the_optimizer(paths, tmp_path):
    options = {"layer_decay": 0.5, "weight_decay": 0.03, "beta2": 0.95, "bias_correction": True}
    found = TaskData(fine_tunings.recipe(paths, precision="float32", **options).resolved())
    training = FineTuning(found.recipe, tmp_path / "seed", found, torch.device("cpu"))
    groups = training.optimizer.param_groups
    assert {group["scale"] for group in groups} == {1, 0.5**2, 0.5**3}  # the head, one layer, the embeddings
    assert {group["weight_decay"] for group in groups} == {0.0, 0.03}
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}
    assert {state["step"].item() for state in training.optimizer.state.values()} == {0}
    training.close()


def test_runs_that_do_not_learn_are_counted_as_failed(paths, tmp_path):
    results = fine_tunings.small(paths, tmp_path / "run", steps=1, seeds=2, lr=1e-9)
    assert all("not better than the best constant prediction" in r["failed"] for r in results["seeds"])


def test_a_seed_that_diverges_is_a_result_if_another_one_does_not(paths, tmp_path, monkeypatch):
    run, diverged = FineTuning.run, []

    def once(training):
        if training.recipe.seed == 0:
            with torch.no_grad():
                next(training.model.parameters()).fill_(math.nan)
            diverged.append(training.out)
        return run(training)

    monkeypatch.setattr(FineTuning, "run", once)
    results = fine_tunings.small(paths, tmp_path / "run", seeds=2)
    assert diverged and results["best"] == 1
    assert "was not finite" in results["seeds"][0]["failed"] and results["seeds"][0]["dev"] is None


def test_a_test_file_without_labels_gets_predictions(paths, tmp_path):
    rows = Path(paths["test"]).read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join(["text", *(row.rpartition(",")[0] for row in rows[1:])]))
    results = fine_tunings.small(paths | {"test": str(tmp_path / "test.csv")}, tmp_path / "run", steps=2)
    assert results["test"] == {}
    assert len((tmp_path / "run/predictions.jsonl").read_text().splitlines()) == 40


def test_batches_of_a_fixed_shape_replayed_train_the_same(paths, tmp_path, monkeypatch):
    """On a GPU all batches have one shape and a step is a CUDA graph; here `stand_in` runs the step again."""
    wanted = fine_tunings.small(paths, tmp_path / "eager")
    init, replays, made = FineTuning.__init__, [], []

    def fixed(training, *args, **options):
        init(training, *args, **options)
        batches = training.loader.batches
        training.loader.make = TaskBatches(batches.examples, batches.batch, batches.seed, 0, True).make
        training.take_step.capture = lambda body: lambda: replays.append(body())
        made.append(training)

    monkeypatch.setattr(FineTuning, "__init__", fixed)
    found = fine_tunings.small(paths, tmp_path / "fixed")
    assert made[0].take_step.why_eager is None and len(replays) == 24 - steps.WARM_UP
    assert found["dev"] == wanted["dev"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_cuda_graph_trains_the_same(paths, tmp_path):
    found = TaskData(fine_tunings.recipe(paths, precision="bf16").resolved())
    logs = []
    for graph in (False, True):
        training = FineTuning(found.recipe, tmp_path / str(graph), found, torch.device("cuda"), graph)
        # Both have batches of one shape, so that sums have the same order.
        training.loader.make = TaskBatches(found.splits["train"].examples, 12, 0, 0, True).make
        training.run()
        assert training.take_step.why_eager is None and (training.take_step._replay is not None) == graph
        lines = [json.loads(line) for line in (training.out / "log.jsonl").read_text().splitlines()]
        logs.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert logs[0] == logs[1]


def test_a_metric_that_is_not_defined_is_null_and_a_failure(paths, tmp_path):
    (tmp_path / "scores.csv").write_text("text,score\nhigh,1\nlow,0\nmiddle,0.5\n")
    (tmp_path / "one.csv").write_text("text,score\nhigh,1\n")
    files = {"train": str(tmp_path / "scores.csv"), "dev": str(tmp_path / "one.csv")}
    results = fine_tunings.small(files, tmp_path / "run", task="regress", steps=1)
    assert results["median"] is None and "is not defined" in results["seeds"][0]["failed"]
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == results


def test_the_head_of_another_run_is_copied(finished, paths, tmp_path, capsys):
    out, _ = finished
    changes = {"preset": None, "set": (), "vocab": None, "model": str(out), "init_head": str(out)}
    results = fine_tunings.small(paths, tmp_path / "run", steps=1, lr=1e-9, **changes)
    assert "--init-head: copied, with the rows of 3 of 3 labels" in capsys.readouterr().out
    assert results["dev"]["accuracy"] > 0.9
