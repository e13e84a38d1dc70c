"""The preset that a CPU can train does not end with a discriminator that gives every token the same logit.

A test takes five minutes on one free core, so only `make test-all` runs them. `small` and larger are not
covered: a million steps of 16,384 tokens would take a CPU months.
"""

import json

import pytest

from electra_fast.train.pretrain import Pretraining
from electra_fast.train.recipe import Recipe

pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest_plugins = ["corpus"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:.*TensorBoard:"),
]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_tiny_learns_at_its_own_defaults(tmp_path, capsys, precision):
    recipe = Recipe(preset="tiny", precision=precision, eval_every=500)
    metrics = Pretraining(recipe, tmp_path, device="cpu").run()
    assert "collapsed" not in capsys.readouterr().out
    begin, *lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    spreads = [line["logit_std"] for line in lines if line["kind"] == "held_out"]
    assert len(spreads) == 8 and min(spreads) > 0.1
    assert metrics["auc_low"] > 0.5 and metrics["mlm_loss"] < begin["loss_without_context"] - 0.3
