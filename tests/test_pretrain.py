"""An interrupted run ends with the same weights, and other programs can use the folder of a run."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import trainings

from electra_fast import data
from electra_fast.__main__ import main
from electra_fast.model import Discriminator, Electra
from electra_fast.ops import FUSED, REFERENCE
from electra_fast.train import checkpoint, warm_start
from electra_fast.train.pretrain import Pretraining

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """(recipe, folder, duration in seconds) of a run that is not interrupted."""
    recipe, out = trainings.recipe(corpus), tmp_path_factory.mktemp("runs") / "undisturbed"
    first = trainings.recipe(corpus, steps=1)  # its time for imports and for the cache is not measured
    assert trainings.finish(first, out.with_name("first")) == 0
    start = time.monotonic()
    assert trainings.finish(recipe, out) == 0
    return recipe, out, time.monotonic() - start


def finish_with_equal_bits(undisturbed, out):
    recipe, wanted, _ = undisturbed
    assert trainings.finish(recipe, out) == 0
    assert trainings.state(out, recipe.steps) == trainings.state(wanted, recipe.steps)


def kill_and_resume(undisturbed, out, moments):
    recipe, _, seconds = undisturbed
    for moment in moments:
        process = trainings.start(recipe, out)
        time.sleep(moment * seconds)
        process.kill()
        process.join()
    finish_with_equal_bits(undisturbed, out)


def test_killed_at_any_moment_it_resumes_to_the_same_bits(undisturbed, tmp_path):
    kill_and_resume(undisturbed, tmp_path / "run", [random.uniform(0.2, 1) for _ in range(3)])


def test_a_run_of_an_earlier_version_is_resumed(undisturbed, tmp_path, capsys):
    """Earlier versions called the recipe config.json, the name of a model's configuration."""
    recipe, out, _ = undisturbed
    old = shutil.copytree(out, tmp_path / "old")
    shutil.rmtree(old / "checkpoints" / f"step-{recipe.steps:09d}")
    (old / "recipe.json").rename(old / "config.json")
    main(["pretrain", "--resume", str(old), "--device", "cpu"])
    assert "was started by an earlier version; config.json is now recipe.json" in capsys.readouterr().out
    assert not (old / "config.json").exists() and (old / "recipe.json").exists()
    assert trainings.state(old, recipe.steps) == trainings.state(out, recipe.steps)


def test_a_folder_that_is_not_of_a_run_is_refused_in_python_too(undisturbed, corpus, tmp_path):
    _, out, _ = undisturbed
    with pytest.raises(ValueError, match=r"out must be .* got .*, which contains model\.safetensors"):
        trainings.small(corpus, out / "discriminator")
    lost = shutil.copytree(out, tmp_path / "lost")
    (lost / "recipe.json").unlink()
    with pytest.raises(ValueError, match="which contains checkpoints without a recipe; name another"):
        trainings.small(corpus, lost, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_killed_fifty_times_it_resumes_to_the_same_bits(undisturbed, tmp_path, part):
    kill_and_resume(undisturbed, tmp_path / "run", [random.uniform(0, 1) for _ in range(5)])


@pytest.mark.parametrize("die_at", [0, 3, 6, 13, 16])  # from 12 on, a thread saves while steps are taken
def test_killed_in_a_save_it_resumes_to_the_same_bits(undisturbed, tmp_path, die_at):
    recipe, *_ = undisturbed
    assert trainings.finish(recipe, tmp_path / "run", die_at=die_at) == -signal.SIGKILL
    finish_with_equal_bits(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_killed_at_every_call_of_three_saves_it_resumes_to_the_same_bits(undisturbed, tmp_path):
    recipe, *_ = undisturbed
    for die_at in range(40):
        out = tmp_path / str(die_at)
        assert trainings.finish(recipe, out, die_at=die_at) == -signal.SIGKILL
        finish_with_equal_bits(undisturbed, out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends(undisturbed, corpus, tmp_path, number):
    recipe, out = trainings.recipe(corpus, save_every=1000), tmp_path / "run"
    assert trainings.finish(recipe, out, signal_at=(number, 10, 1)) == 128 + number
    assert max(out.glob("checkpoints/step-*")).name == "step-000000011"  # the step was finished
    finish_with_equal_bits(undisturbed, out)


def test_a_second_signal_ends_at_once(undisturbed, tmp_path):
    recipe, out = undisturbed[0], tmp_path / "run"
    assert trainings.finish(recipe, out, signal_at=(signal.SIGTERM, 10, 2)) == -signal.SIGTERM
    newest = max(out.glob("checkpoints/step-*")).name  # step 9 may not be completely written
    assert newest in ("step-000000006", "step-000000009")
    finish_with_equal_bits(undisturbed, out)


def test_a_signal_ends_a_run_that_waits_for_a_batch(undisturbed, corpus, tmp_path):
    recipe, out = trainings.recipe(corpus, save_every=1000), tmp_path / "run"
    assert trainings.finish(recipe, out, hang_at=10) == 128 + signal.SIGTERM
    assert max(out.glob("checkpoints/step-*")).name == "step-000000010"
    finish_with_equal_bits(undisturbed, out)


class Broken(Electra):
    """A model that fails in step `at`, as if the memory were full."""

    at = None

    def forward(self, ids, *, rng, **layout):
        if self.training and int(rng[1]) == self.at:
            raise RuntimeError("out of memory")
        return super().forward(ids, rng=rng, **layout)


@pytest.mark.parametrize("packed", [False, True])
def test_on_any_device_it_resumes_to_the_same_bits(corpus, tmp_path, monkeypatch, device, packed):
    recipe = trainings.recipe(corpus, steps=8, packed=packed)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Pretraining(recipe, whole, device=device).run()
    monkeypatch.setattr(Broken, "at", 5)
    with pytest.raises(RuntimeError, match="out of memory"):
        # Broken reads the number of the step on the host, so its step cannot become a CUDA graph.
        Pretraining(recipe, broken, device=device, make_model=Broken, graph=False).run()
    resumed = Pretraining(recipe, broken, device=device)
    assert resumed.step == 3
    resumed.run()
    assert trainings.state(broken, 8) == trainings.state(whole, 8)


def test_a_run_can_be_made_longer(corpus, tmp_path):
    trainings.small(corpus, tmp_path, steps=4).run()
    resumed = trainings.small(corpus, tmp_path, steps=6)
    assert resumed.step == 4
    resumed.run()
    assert max(tmp_path.glob("checkpoints/step-*")).name == "step-000000006"


def test_the_same_run_twice_gives_the_same_log(corpus, tmp_path):
    logs = []
    for name in ("a", "b"):
        trainings.small(corpus, tmp_path / name, steps=5, log_every=1).run()
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if "second" not in k} for line in lines])
    assert logs[0] == logs[1]
    assert [line["kind"] for line in logs[0]] == ["begin", *["train"] * 5, "held_out"]


def test_the_reference_learns_the_same(corpus, tmp_path):
    """Masks and dropout are the same; a sample may differ if its uniform is between two float32 sums."""
    found = {}
    for name, ops in (("fused", FUSED), ("reference", REFERENCE)):
        training = trainings.small(corpus, tmp_path / name, steps=8, lr=1e-3, ops=ops)
        training.run()
        found[name] = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    start = torch.cat(
        [p.flatten() for p in trainings.small(corpus, tmp_path / "start").model.parameters()]
    ).detach()
    moved = (found["reference"] - start).norm()
    assert 0 < (found["fused"] - found["reference"]).norm() < 0.01 * moved


@pytest.mark.parametrize(
    "options", [{"packed": True}, {"pairs": False}, {"accumulate": 3}, {"precision": "bf16"}]
)
def test_other_batches_and_precisions_train_too(corpus, tmp_path, options):
    training = trainings.small(corpus, tmp_path, steps=30, lr=5e-3, eval_every=30, **options)
    before = training.evaluate()
    after = training.run()
    assert after["mlm_loss"] < before["mlm_loss"] - 1


def test_a_step_uses_the_micro_batches_of_its_number(corpus, tmp_path):
    seen = []

    class Recording(Electra):
        def forward(self, ids, *, rng, **layout):
            if self.training:
                seen.append((rng.tolist(), ids))
            return super().forward(ids, rng=rng, **layout)

    training = trainings.small(corpus, tmp_path, steps=3, accumulate=2, seed=7, make_model=Recording)
    training.run()
    assert [rng for rng, _ in seen] == [[7, micro] for micro in range(6)]
    for micro, (_, ids) in enumerate(seen):
        assert torch.equal(ids, training.loader[micro]["ids"])


def test_the_gradient_of_a_step_is_the_mean_over_its_micro_batches(corpus, tmp_path):
    training = trainings.small(corpus, tmp_path, steps=1, accumulate=2, seed=7)
    for micro in range(2):
        (training.model(**training.loader[micro], rng=torch.tensor([7, micro])).loss / 2).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in training.model.parameters()]).item()
    training.model.zero_grad()
    training.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[1]["gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_transformers_loads_both_halves(undisturbed):
    transformers = pytest.importorskip("transformers")
    _, out, _ = undisturbed
    ids = torch.arange(5, 25)[None]
    ours = Discriminator.from_pretrained(out / "discriminator")(ids)
    theirs = transformers.ElectraForPreTraining.from_pretrained(out / "discriminator").eval()
    assert torch.allclose(ours, theirs(ids).logits, atol=1e-5)
    transformers.ElectraForMaskedLM.from_pretrained(out / "generator")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "discriminator")
    inside = data.load_tokenizer(out / "tokenizer").encode("the model reads", add_special_tokens=False).ids
    assert tokenizer("the model reads").input_ids == [101, *inside, 102]


def test_init_starts_from_the_weights_of_another_run(undisturbed, corpus, tmp_path):
    _, out, _ = undisturbed
    both = trainings.small(corpus, tmp_path / "both", init=(str(out),), vocab=None, seed=9)
    wanted = Discriminator.from_pretrained(out / "discriminator").state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in both.model.discriminator.state_dict().items())
    one = trainings.small(corpus, tmp_path / "one", init=(str(out / "discriminator"),), vocab=None, seed=9)
    assert all(torch.equal(x, wanted[name]) for name, x in one.model.discriminator.state_dict().items())
    fresh = trainings.small(corpus, tmp_path / "fresh", seed=9)
    dense = [m.model.generator.head.dense.weight for m in (one, fresh, both)]
    assert torch.equal(dense[0], dense[1]) and not torch.equal(dense[0], dense[2])


def test_init_refuses_weights_that_are_not_electras(corpus, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ValueError, match="--init must be Hugging Face folders"):
        warm_start.load([str(tmp_path)])
    save_file({"bert.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ElectraForPreTraining or ElectraForMaskedLM, got .* with bert"):
        warm_start.load([str(tmp_path)])


def test_halves_whose_tables_differ_are_refused(undisturbed, corpus, tmp_path):
    _, out, _ = undisturbed
    shutil.copytree(out / "generator", tmp_path / "generator")
    other = warm_start.load([str(tmp_path / "generator")]).generator
    other.encoder.embedding.words.data += 1
    other.save_pretrained(tmp_path / "generator")
    init = (str(out / "discriminator"), str(tmp_path / "generator"))
    with pytest.raises(ValueError, match="equal tables for sharing='embeddings'"):
        trainings.small(corpus, tmp_path / "run", init=init, vocab=None)
    trainings.small(corpus, tmp_path / "none", init=init, vocab=None, set=(*trainings.SIZES, "sharing=none"))


def test_a_resumed_run_refuses_fewer_steps_and_other_text(corpus, tmp_path):
    trainings.small(corpus, tmp_path, steps=3).run()
    with pytest.raises(ValueError, match="--steps must be 3 or more, the steps taken, got 2"):
        trainings.small(corpus, tmp_path, steps=2)
    (tmp_path / "other.txt").write_text("\n\n".join(["another text"] * 50))
    with pytest.raises(ValueError, match="--data must be the text with which"):
        trainings.small(tmp_path / "other.txt", tmp_path)


def test_a_vocabulary_that_is_too_small_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be"):
        trainings.small(corpus, tmp_path, vocab="104")


def test_text_that_is_too_short_for_a_held_out_part_is_refused(corpus, tmp_path):
    (tmp_path / "short.txt").write_text("\n\n".join(["the model reads a text"] * 19))
    with pytest.raises(
        ValueError, match=r"--data must have 20 documents or more.* got 19; or name .* --held-out"
    ):
        trainings.small(tmp_path / "short.txt", tmp_path / "run")
    other = {"held_out": (str(corpus),), "steps": 1}  # nearly half of its words are not in the short text
    with pytest.raises(ValueError, match=r"--vocab must know .* of --held-out, got \[UNK\] for 4"):
        trainings.small(tmp_path / "short.txt", tmp_path / "other", **other)
    trainings.small(tmp_path / "short.txt", tmp_path / "other", **other, allow_unknown=True).run()


def test_a_resumed_run_keeps_its_precision(corpus, tmp_path, capsys):
    """The default on a CPU is float32. The precision is stored, and a resumed run prints it."""
    trainings.small(corpus, tmp_path, steps=2, precision="bf16").run()
    assert "continues in" not in capsys.readouterr().out
    resumed = trainings.small(corpus, tmp_path, steps=3)
    assert resumed.autocast
    resumed.run()
    assert (
        "continues in bf16, as it was started; the default for a new run on cpu is float32"
        in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="--precision must stay 'bf16'"):
        trainings.small(corpus, tmp_path, steps=3, precision="float32")


def test_the_default_precision_of_the_device_is_stored(corpus, tmp_path):
    trainings.small(corpus, tmp_path, steps=2).close()
    file = tmp_path / "recipe.json"
    kept = json.loads(file.read_text())
    assert kept["precision"] == "float32"
    file.write_text(json.dumps(kept | {"precision": None}))  # as older versions wrote it
    with pytest.warns(UserWarning, match="does not say the precision, so the run continues in float32"):
        trainings.small(corpus, tmp_path, steps=2).close()
    file.write_text(json.dumps(kept | {"precision": None}))
    assert trainings.small(corpus, tmp_path, steps=2, precision="bf16").autocast


def test_second_moments_that_are_negative_are_refused(corpus, tmp_path):
    trainings.small(corpus, tmp_path, steps=1).run()
    found = checkpoint.load(tmp_path / "checkpoints")
    for name, x in found.tensors["optimizer"].items():
        if name.startswith("exp_avg_sq"):
            x.fill_(-1.0)
    checkpoint.save(tmp_path / "checkpoints", 1, found.tensors, found.facts)
    with pytest.raises(ValueError, match=r"optimizer: exp_avg_sq\..* must not be negative, got -1"):
        trainings.small(corpus, tmp_path, steps=2)


def test_two_runs_cannot_share_a_folder(corpus, tmp_path):
    first = trainings.small(corpus, tmp_path, steps=1)
    with pytest.raises(OSError, match="is locked by another training process"):
        trainings.small(corpus, tmp_path, steps=1)
    first.close()
    trainings.small(corpus, tmp_path, steps=1)


def test_the_command_line_starts_and_resumes_a_run(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--preset", "tiny", "--set", *trainings.SIZES, "--data", str(corpus), "--vocab", "300"]
    options += ["--seq", "32", "--batch-tokens", "256", "--steps", "3", "--out", str(out)]
    main(["pretrain", *options, "--device", "cpu"])
    main(["pretrain", "--resume", str(out), "--steps", "5", "--device", "cpu"])
    assert max(out.glob("checkpoints/step-*")).name == "step-000000005"
    for arguments, message in (
        (["--out", str(out)], "--out must be a new folder"),
        (["--resume", str(tmp_path)], "--resume must be the folder of a run"),
        (["--resume", str(out), "--seq", "64"], "--seq must stay 32"),
        (["--resume", str(out), "--preset", "small"], "--preset must stay 'tiny'"),
        (["--out", str(tmp_path / "x"), "--data", str(tmp_path / "missing")], "missing"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(["pretrain", *arguments])
    assert not Path(tmp_path / "x" / "checkpoints").exists()
