"""The measurement of what a small discriminator is good for: what it plants, and what the page says."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from small_use import CONFIG

from benchmarks.learning import electric, planted, uses, uses_report
from electra_fast.model import Electra
from electra_fast.tasks.items import Utterance
from electra_fast.train.recipe import TINY, Recipe
from electra_fast.use import load

pytest.importorskip("sklearn")
pytest_plugins = ["small_tokenizer", "small_run"]
IDS = np.random.default_rng(5).integers(104, 108, (6, 20))


def test_the_same_share_of_each_passage_is_replaced_by_any_piece():
    found = planted.by_any_piece(IDS, 50_000)
    assert found.ids.shape == IDS.shape and found.replaced.sum(1).tolist() == [3] * 6
    assert (found.replaced == (found.ids != IDS)).all() and (found.replaced <= planted.masked(IDS)).all()
    assert len(set(map(tuple, planted.masked(IDS)))) == 6  # other tokens in each passage
    assert (planted.by_any_piece(IDS, 50_000).ids == found.ids).all()


def test_the_generators_samples_are_put_at_the_masks_only(small_run):
    model = load(small_run, device="cpu")
    with torch.no_grad():
        model.generator.head.bias[77] = 1000.0
    found = planted.by_generator(model, IDS)
    assert (found.ids == np.where(planted.masked(IDS), 77, IDS)).all()
    with torch.no_grad():
        model.generator.head.bias.zero_()
    found = planted.by_generator(model, IDS)
    assert (found.ids[~planted.masked(IDS)] == IDS[~planted.masked(IDS)]).all()
    assert len(set(found.ids[planted.masked(IDS)].tolist())) > 5 and found.ids.max() < CONFIG.vocab_size


def test_the_area_is_that_of_each_passage(monkeypatch):
    found = planted.by_any_piece(IDS, 50_000)
    monkeypatch.setattr(planted, "replaced_logits", lambda model, ids: list(found.replaced * 1.0))
    assert planted.auc(None, found) == [1.0] * 6
    monkeypatch.setattr(planted, "replaced_logits", lambda model, ids: [np.zeros(20)] * 6)
    assert planted.auc(None, found) == [0.5] * 6


def test_a_passage_without_a_replaced_token_does_not_count(monkeypatch):
    found = planted.by_any_piece(IDS, 50_000)
    found.replaced[1] = False  # the generator's samples were the originals
    monkeypatch.setattr(planted, "replaced_logits", lambda model, ids: list(found.replaced * 1.0))
    assert planted.auc(None, found) == [1.0] * 5


def test_a_passage_fills_a_sequence_of_the_run(small_run, tmp_path):
    Recipe(preset="tiny", seq=12, steps=7, accumulate=2).resolved().save(tmp_path / "recipe.json")
    text = tmp_path / "text.txt"
    text.write_text("too short\n" + "the red cat sat in the rain and ran to the green dog\n" * 3)
    model = load(small_run, device="cpu")
    found = planted.passages(tmp_path, model, text)
    assert found.shape == (3, 10) and model.tokenizer.decode(found[0]).startswith("the red cat sat")


def test_the_page_names_the_options_of_a_run(tmp_path):
    Recipe(preset="tiny", steps=7, batch_tokens=512, accumulate=2).resolved().save(tmp_path / "recipe.json")
    facts = {"train_tokens": 900, "vocabulary": 200, "parameters": 1, "loss_without_context": 5.5}
    lines = [{"kind": "begin", "step": 0} | facts]
    lines += [{"kind": "train", "step": 7, "tokens": 700, "tokens_per_second": 100.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = uses.pretraining(tmp_path)
    assert (found["steps"], found["batch_tokens"], found["seconds"]) == (7, 1024, 7.0)
    assert set(found["set"]) == set(TINY) and found["seq"] == 32 and found["vocabulary"] == 200


def test_slots_are_compared_as_texts():
    item = Utterance(["play", "some", "cool", "jazz"], "play", ["O", "O", "B-mood", "B-genre"], "line 1")
    assert uses.slot_texts(item) == [("mood", "cool"), ("genre", "jazz")]


def test_the_page_says_what_was_found():
    run = {"steps": 3500, "batch_tokens": 4096, "vocabulary": 8192, "train_tokens": 1, "seconds": 90.0}
    run |= {"preset": "tiny", "set": ["mask_prob=0.25"], "seq": 32}
    values = {"0 steps": (0.5, 0.51), "9 steps": (0.8, 0.505)}
    detect = [
        {"model": name, "by": by, "auc": (value, 0.01)}
        for name, both in values.items()
        for by, value in zip(("any piece", "the generator"), both, strict=True)
    ]
    found = {"pretraining": run, "default": run, "machine": "here", "torch": "2", "detect": detect}
    found |= {"detect by default": [], "suggest": {"first": 0.1, "among five": 0.25, "seconds": 3}}
    found["suggest"]["first of the generator"] = 0.2
    found |= {"choose": {"accuracy": 0.5, "majority": 0.6, "seconds": 1}}
    found |= {"score": {"generator": 0.52, "discriminator": 0.51, "pairs": 7, "seconds": 1}}
    found["pairs"] = {"generator": {"rate": 0.5, "low": 0.47, "high": 0.53}, "seconds": 1}
    found |= {"intent": {"intent": 0.9, "slots": 0.4, "seconds": 1}}
    found |= {"rank": {"mrr": 0.9, "mrr by chance": 0.29, "first": 0.8, "seconds": 1}}
    page = "\n".join(uses_report.section(found))
    assert (
        "| 9 steps | 0.800 ± 0.010 | 0.505 ± 0.010 |" in page
        and "14.3 million tokens in sequences of 32" in page
    )
    assert "by any piece: with training the AUC rises (0.500 to 0.800); at the end it is above chance" in page
    assert (
        "by the generator: with training the AUC does not rise (0.510 to 0.505); at the end it is not above"
        in page
    )
    assert "first in 10.0%, among five in 25.0%" in page and "50.0 % [47.0, 53.0] by the generator |" in page


def test_electrics_loss_is_compared_with_constant_answers(small_run, monkeypatch):
    model = load(small_run, device="cpu")
    electra = Electra(dataclasses.replace(CONFIG, objective="electric", generator="uniform"))
    electra.discriminator.load_state_dict(model.discriminator.state_dict())
    monkeypatch.setattr(electric, "PASSAGES_PER_BATCH", 2)
    found = electric.judged(electra.eval(), model, IDS)
    assert len(found.output) == IDS.size and found.log_q.unique().item() == pytest.approx(-math.log(128))
    noise, share = found.replaced.double(), CONFIG.mask_prob
    losses = electric.losses(found)
    p = torch.sigmoid(found.output - math.log(128) + math.log(share / (1 - share))).double()
    wanted = -(noise * p.log() + (1 - noise) * (1 - p).log()).mean()
    assert losses["NCE loss"] == pytest.approx(wanted.item(), rel=1e-5)
    constant = -(noise * math.log(share) + (1 - noise) * math.log(1 - share)).mean()
    assert losses["of a constant probability"] == pytest.approx(constant.item(), rel=1e-5)
    rate = noise.mean()  # log q is the same for every token, so the best energy gives every token this rate
    best = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    assert losses["of a constant energy"] == pytest.approx(best.item(), abs=1e-3)
