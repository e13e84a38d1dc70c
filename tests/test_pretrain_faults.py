"""Faults during a run: batches that are never made, full disks, lost folders, losses that are not finite."""

import contextlib
import json
import math
import shutil
import threading
import time
import types

import pytest
import torch
import trainings

from electra_fast import data
from electra_fast.model import Discriminator, Electra
from electra_fast.train import loader
from electra_fast.train.divergence import MAX_SKIPPED, NotFinite

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]


@pytest.mark.parametrize("where", ["loader", "held_out_loader"])
def test_a_batch_that_is_never_made_ends_the_run_in_time(corpus, tmp_path, monkeypatch, where):
    released = threading.Event()
    training = trainings.small(corpus, tmp_path, steps=6, eval_every=4)
    make = getattr(training, where)._make
    last = {"loader": 3, "held_out_loader": 0}[where]

    def hangs(index):
        return make(index) if index < last else released.wait(60)

    monkeypatch.setattr(getattr(training, where), "_make", hangs)
    monkeypatch.setattr(loader, "BATCH_TIMEOUT", 3.0)
    monkeypatch.setattr(loader, "POLL", 0.05)
    monkeypatch.setattr(loader, "CLOSING", 0.05)
    step = {"loader": 3, "held_out_loader": 4}[where]
    with pytest.raises(
        loader.NoBatch,
        match=rf"batch {last} must be ready within 3 seconds.*saved at step {step}; continue with --resume",
    ):
        training.run()
    released.set()
    assert max(tmp_path.glob("checkpoints/step-*")).name == f"step-00000000{step}"


def slow(index):
    """Return a batch; all but the first take 0.3 s."""
    time.sleep(0.3 * index)
    return {"ids": torch.ones(1, 1)}


def test_no_thread_is_left_when_a_run_ends():
    """A process that ends while another thread is inside torch would be aborted."""
    before = set(threading.enumerate())
    of_slow = loader.Loader(types.SimpleNamespace(pad_id=0), slow, torch.device("cpu"))
    with contextlib.closing(of_slow.prefetch()) as batches:
        next(batches)
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) <= before


def test_an_error_in_making_a_batch_is_raised_by_the_run(corpus, tmp_path, monkeypatch):
    training = trainings.small(corpus, tmp_path, steps=6)

    def fails(index):
        raise MemoryError("no room for a batch")

    monkeypatch.setattr(training.loader, "_make", fails)
    with pytest.raises(MemoryError, match="no room for a batch"):
        training.run()


def test_a_disk_that_is_too_small_is_refused_before_training(corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"--out must have .* [GM]B free for 4 checkpoints"):
        trainings.small(corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        trainings.small(corpus, tmp_path / "file" / "run")


def test_one_failed_save_causes_a_warning_and_several_end_the_run(corpus, tmp_path, monkeypatch, capsys):
    training = trainings.small(corpus, tmp_path, steps=12, save_every=1)
    save, failing = training._write, {3, 6, 7, 8}

    def write(state):
        if state.step in failing:
            raise OSError(28, "No space left on device")
        save(state)

    monkeypatch.setattr(training, "_write", write)
    with pytest.raises(OSError, match="No space left"):
        training.run()
    assert "step 3: not all was saved, [Errno 28] No space left" in capsys.readouterr().out
    assert training.step == 9  # the failure of step 8 is found there
    assert max(tmp_path.glob("checkpoints/step-*")).name == "step-000000005"


def test_one_failed_save_of_the_halves_causes_a_warning_and_several_end_the_run(
    corpus, tmp_path, monkeypatch, capsys
):
    training = trainings.small(corpus, tmp_path, steps=12, save_every=1)
    save, failing = data.save_tokenizer, {3, 6, 7, 8}

    def full(tokenizer, folder):
        if training.saver.step in failing:
            raise Exception("No space left on device (os error 28)")  # tokenizers raises no subclass
        save(tokenizer, folder)

    monkeypatch.setattr(data, "save_tokenizer", full)
    with pytest.raises(OSError, match="discriminator must be writable, got No space left"):
        training.run()
    assert "step 3: not all was saved, pretrain: " in (said := capsys.readouterr().out)
    assert "the checkpoint itself is complete" in said
    assert max(tmp_path.glob("checkpoints/step-*")).name == "step-000000008"


def test_halves_that_a_killed_save_left_out_are_written_at_the_end(corpus, tmp_path):
    trainings.small(corpus, tmp_path, steps=2).run()
    shutil.rmtree(tmp_path / "discriminator")
    trainings.small(corpus, tmp_path, steps=2).run()
    Discriminator.from_pretrained(tmp_path / "discriminator")


def test_a_folder_that_is_removed_during_a_run_is_created_again(corpus, tmp_path, monkeypatch):
    out = tmp_path / "run"
    training = trainings.small(corpus, out, steps=4, save_every=3)
    step = training._one_step

    def removing(batches):
        step(batches)
        if training.step == 2:
            shutil.rmtree(out)

    monkeypatch.setattr(training, "_one_step", removing)
    save = training._save

    def locked(logger):
        save(logger)
        assert training.saver.wait() is None
        with pytest.raises(OSError, match="is locked by another training process"):
            trainings.small(corpus, out, steps=4)

    monkeypatch.setattr(training, "_save", locked)
    training.run()
    resumed = trainings.small(corpus, out, steps=5)
    assert resumed.step == 4
    resumed.run()
    Discriminator.from_pretrained(out / "discriminator")


def test_a_log_that_cannot_be_written_does_not_end_the_run(corpus, tmp_path):
    training = trainings.small(corpus, tmp_path, steps=2, log_every=1)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.warns(UserWarning, match="log.jsonl cannot be written"):
        training.run()
    assert training.step == 2


class Faulty(Electra):
    """A model whose gradient is NaN in the steps `bad`."""

    bad = ()

    def forward(self, ids, *, rng, **layout):
        out = super().forward(ids, rng=rng, **layout)
        poison = math.nan if self.training and int(rng[1]) in self.bad else 1.0
        return out._replace(loss=out.loss * poison)


def test_a_step_that_is_not_finite_changes_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Faulty, "bad", (1, 2))
    training = trainings.small(corpus, tmp_path, steps=3, warmup=0, log_every=1, make_model=Faulty)
    states = []
    report = training._report

    def after_step(logger, wait):
        states.append([p.detach().clone() for p in training.model.parameters()])
        states[-1] += [x.clone() for s in training.optimizer.state.values() for x in s.values()]
        report(logger, wait)

    monkeypatch.setattr(training, "_report", after_step)
    training.run()
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if line["kind"] == "train"] == [0, 1, 2]
    assert trainings.small(corpus, tmp_path, steps=4).skipped.steps == 2  # a resumed run continues the count


def test_steps_that_are_never_finite_end_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Faulty, "bad", range(4, 100))
    training = trainings.small(
        corpus, tmp_path, steps=50, save_every=4, log_every=1, seed=3, make_model=Faulty
    )
    with pytest.raises(
        NotFinite, match=rf"{MAX_SKIPPED} times in a row, first at step 4; .* of step 8.*rng \(3, 4\)"
    ):
        training.run()
    assert training.step == 4 + MAX_SKIPPED
    record = json.loads((tmp_path / "not_finite.json").read_text())
    assert (record["step"], record["seed"], record["micro_batches"]) == (4, 3, [4, 4])
    assert all(p.isfinite().all() for p in training.model.parameters())


class Constant(Electra):
    """A model whose discriminator gives every token the same logit."""

    def __init__(self, config, ops):
        super().__init__(config, ops)
        self.discriminator.head.score.weight.data.zero_()
        self.discriminator.head.score.weight.requires_grad_(False)

    def parameters(self, recurse=True):
        return (p for _, p in self.named_parameters())

    def named_parameters(self, *args, **kwargs):
        return ((n, p) for n, p in super().named_parameters(*args, **kwargs) if p.requires_grad)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_discriminator_with_equal_logits_is_reported(corpus, tmp_path, capsys, precision):
    options = {"steps": 9, "warmup": 2, "eval_every": 3, "log_every": 3, "precision": precision}
    metrics = trainings.small(corpus, tmp_path, make_model=Constant, **options).run()
    said = [line for line in capsys.readouterr().out.splitlines() if "discriminator collapsed" in line]
    assert len(said) == 1 and said[0].startswith("step 3: has the discriminator collapsed?")
    assert "0.00000" in said[0] and "lower --lr" in said[0]
    assert metrics["logit_std"] < 1e-6 and metrics["auc"] == 0.5
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["logit_std"] < 1e-6 for line in lines if line["kind"] != "begin"] == [True] * 6


def test_a_discriminator_that_learns_is_not_reported(corpus, tmp_path, capsys):
    training = trainings.small(corpus, tmp_path, steps=20, lr=5e-3, eval_every=5, log_every=5)
    metrics = training.run()
    assert "collapsed" not in capsys.readouterr().out and metrics["logit_std"] > 0.1
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    spreads = {line["step"]: line["logit_std"] for line in lines if line["kind"] == "train"}
    assert spreads.keys() == {5, 10, 15, 20} and all(0 < spread < 10 for spread in spreads.values())
