"""Runs with Electric's objective or another generator: resumed, exported, and used as initial weights."""

import json

import pytest
import torch
import trainings

from electra_fast.model import Discriminator, Generator, TwoTowerGenerator
from electra_fast.train import warm_start

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus"]
pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:.*TensorBoard:")]

ELECTRIC = "objective=electric"


def run(corpus, out, *settings, stop_at=None, **changes):
    """Train 4 steps; with `stop_at`, end as after SIGTERM in this step."""
    options = {"steps": 4, "log_every": 1, "eval_every": 2, "eval_batches": 1} | changes
    training = trainings.small(corpus, out, set=(*trainings.SIZES, *settings), **options)
    if stop_at is not None:
        training.model.register_forward_hook(
            lambda *_: training._stop(15) if training.step == stop_at else None
        )
        with pytest.raises(SystemExit):
            training.run()
        return None
    return training.run()


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ((ELECTRIC,), {"packed": True, "precision": "bf16"}),
        ((ELECTRIC, "generator=masked"), {}),
        ((ELECTRIC, "generator=uniform"), {"accumulate": 2}),
        (("generator=two_tower",), {}),
    ],
    ids=str,
)
def test_a_resumed_run_ends_in_the_same_bits(corpus, tmp_path, settings, changes):
    metrics = run(corpus, tmp_path / "whole", *settings, **changes)
    run(corpus, tmp_path / "parts", *settings, stop_at=2, **changes)
    assert run(corpus, tmp_path / "parts", *settings, **changes) == metrics
    assert trainings.state(tmp_path / "parts", 4) == trainings.state(tmp_path / "whole", 4)
    assert 0 < metrics["rtd_loss"] < 10 and 0 < metrics["mlm_loss"] < 10


def test_the_folder_says_how_the_model_was_trained(corpus, tmp_path, capsys):
    run(corpus, tmp_path / "electric", ELECTRIC)
    assert "on held-out text: MLM loss" in (said := capsys.readouterr().out) and "; NCE loss" in said
    run(corpus, tmp_path / "electra", "generator=uniform")
    assert "; RTD loss" in capsys.readouterr().out
    discriminators = {}
    for name in ("electric", "electra"):
        folder = tmp_path / name / "discriminator"
        described = json.loads((folder / "config.json").read_text())
        assert described.get("pretraining_objective", "electra") == name
        discriminators[name] = Discriminator.from_pretrained(folder)
        assert discriminators[name].config.objective == name
    assert type(TwoTowerGenerator.from_pretrained(tmp_path / "electric" / "generator")) is TwoTowerGenerator
    assert not (tmp_path / "electra" / "generator").exists()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ElectraForPreTraining.from_pretrained(tmp_path / "electric" / "discriminator")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        wanted = theirs.eval()(ids).logits
        torch.testing.assert_close(discriminators["electric"](ids), wanted, rtol=1e-5, atol=1e-5)


def test_its_halves_are_initial_weights_of_another_run(corpus, tmp_path):
    run(corpus, tmp_path / "first", ELECTRIC)
    first = warm_start.load([str(tmp_path / "first")])
    init = {"init": (str(tmp_path / "first"),), "vocab": None, "seed": 9}
    second = trainings.small(corpus, tmp_path / "second", set=(ELECTRIC,), **init)
    for name in ("generator", "discriminator"):
        wanted = getattr(first, name).state_dict()
        assert all(torch.equal(x, wanted[n]) for n, x in getattr(second.model, name).state_dict().items())
    message = "--init must have a generator for generator='masked', got TwoTowerGenerator; name the folder of"
    with pytest.raises(ValueError, match=message):
        trainings.small(corpus, tmp_path / "third", **init)
    init["init"] = (str(tmp_path / "first" / "discriminator"),)
    third = trainings.small(corpus, tmp_path / "third", **init)
    assert type(third.model.generator) is Generator and third.config.objective == "electra"


def test_settings_are_given_as_text(corpus, tmp_path):
    with pytest.raises(
        ValueError, match="generator must be None or one of masked, two_tower, uniform, got 'None'"
    ):
        run(corpus, tmp_path, "generator=None")
    run(corpus, tmp_path / "run", "generator=uniform", stop_at=1)
    with pytest.raises(ValueError, match="--set must stay"):
        run(corpus, tmp_path / "run", ELECTRIC)
