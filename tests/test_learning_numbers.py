"""The numbers of the experiments of benchmarks/learning, derived again by plain loops."""

import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the harness is not installed

from benchmarks.learning import (
    ablations,
    electric,
    equal_compute,
    gpu_stages,
    planted,
    pretend_data,
    probes,
    runs,
    transfer,
    uses,
    variants,
)
from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.ops import FUSED
from electra_fast.train.recipe import Recipe
from electra_fast.use.suggest import Candidate

SIZES = {"layers": 1, "hidden": 32, "heads": 1, "ffn": 64, "embedding": 16, "vocab_size": 200}
SIZES |= {"generator_layers": 1, "generator_hidden": 32, "generator_heads": 1, "generator_ffn": 64}
CONFIG = ElectraConfig(**SIZES, dropout=0.0, initializer=0.3, mask_prob=0.4)


def test_the_masked_model_has_the_flops_of_electra(monkeypatch):
    flops = {"fused": 300, "masked": 200}
    monkeypatch.setattr(equal_compute.Comparison, "flops", lambda self, model: flops[model])
    comparison = equal_compute.Comparison(Path("out"), Recipe(preset="tiny", steps=1000), Path("data"))
    steps = {model: comparison.run(model).recipe.steps for model in flops}
    assert steps == {"fused": 1000, "masked": 1500}
    assert comparison.run("masked").recipe.save_every == 150
    # ELECTRA takes 5 steps per second and the masked model 9, of which it needs 1.5 times as many.
    rates = {"fused": 5, "masked": 9}
    monkeypatch.setattr(equal_compute, "rate", lambda comparison, model, timed: rates[model])
    assert equal_compute.steps_in(comparison, 60.0, 100) == 60 * 5
    rates["masked"] = 6
    assert equal_compute.steps_in(comparison, 60.0, 100) == 60 * 4


def test_the_flops_are_those_of_the_formula():
    """Forward, and twice as many backward; without dropout, masks are at a fixed number of positions."""
    T, V, E, M = 32, 4096, 64, 8
    config = ElectraConfig.tiny()
    config = ElectraConfig(**vars(config) | {"vocab_size": V, "dropout": 0.0, "mask_prob": 0.25})

    def encoder(W, F):
        projected = 0 if W == E else 2 * T * E * W
        return projected + 4 * (8 * T * W**2 + 4 * T * W * F + 4 * T**2 * W)

    def head(W):
        return M * 2 * E * (W + V)

    discriminator = encoder(128, 512) + 2 * T * 128 * (128 + 1)
    assert runs.flops(Electra, config, T) == 3 * (discriminator + encoder(64, 256) + head(64))
    masked = runs.MODELS["masked"][0]
    assert runs.flops(masked, config, T) == 3 * (encoder(128, 512) + head(128))


def test_the_accuracy_on_pairs_is_that_of_paradigms(tmp_path, monkeypatch):
    """In one of three paradigms all pairs are right, in one half of them, in one none."""
    right = [True] * 20 + [True, False] * 10 + [False] * 20
    pairs = [{"sentence_good": "good" if r else "bad", "sentence_bad": "bad" if r else "good"} for r in right]
    monkeypatch.setattr(probes, "minimal_pairs", lambda archive: pairs)
    monkeypatch.setattr(probes, "_encode", lambda tokenizer, text: text)
    monkeypatch.setattr(probes, "masked_scores", lambda half, texts: torch.tensor([len(t) for t in texts]))
    found = probes.preferred(None, None, tmp_path)
    half = 1.96 * statistics.stdev([1.0, 0.5, 0.0]) / math.sqrt(3)
    assert found == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_a_probe_is_chosen_on_dev_and_judged_on_test(monkeypatch):
    """Of each fit the share of correct answers is known; the best one on dev is not the best on test."""
    accuracy = {"dev": (0.6, 0.9, 0.7, 0.5), "test": (0.9, 0.8, 0.7, 0.95)}
    monkeypatch.setattr(probes, "_fit", lambda x, y, decay: probes.DECAYS.index(decay))
    monkeypatch.setattr(probes, "_accuracy", lambda fit, x, y: accuracy[x][fit])
    labels = {split: torch.zeros(400) for split in ("train", "dev", "test")}
    found = probes.linear_probe({split: split for split in labels}, labels)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert found == pytest.approx((0.8, 0.8 - half, 0.8 + half))


def test_features_are_standardised_by_the_training_texts(monkeypatch):
    x = {"train": torch.tensor([[1.0], [3.0]]), "test": torch.tensor([[5.0], [9.0]])}
    monkeypatch.setattr(probes, "features", lambda encoder, sequences: x[sequences])
    found = probes._of_encoder(None, {split: split for split in x})
    torch.testing.assert_close(found["test"], (x["test"] - 2) / math.sqrt(2))


def test_positive_comments_are_labelled_1(tmp_path):
    pretend_data.write(tmp_path)
    found = probes.sentiment(tmp_path / "goemotions" / "group_test.tsv.xz")
    assert found[:2] == [("it is bad", 0), ("it is good", 1)]


def test_all_discriminators_of_the_common_auc_read_the_samples_of_one_generator():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Electra(CONFIG, FUSED).eval())
    judge, other = models
    key_mask = torch.arange(20) < torch.tensor([[20], [11], [7]])
    ids = torch.randint(104, 200, (3, 20), generator=torch.Generator().manual_seed(0)) * key_mask
    rng = torch.tensor([variants.SEED, 3])
    layout = variants.Layout(key_mask)
    with torch.no_grad():
        masked = judge.mask(ids, rng, layout)
        samples = judge.generator.propose(ids, masked, layout, type_ids=None, rng=rng).samples
        read = ids.flatten().clone()
        for position, sample, weight in zip(masked.positions, samples, masked.weights, strict=True):
            read[position] = sample if weight else read[position]
        logits = other.discriminator(read.view(3, 20), key_mask=key_mask)[key_mask]
    replaced = (read.view(3, 20) != ids)[key_mask]
    pairs = [(a > b) + (a == b) / 2 for a in logits[replaced] for b in logits[~replaced]]
    found = variants._auc(judge, other, {"ids": ids, "key_mask": key_mask}, 3)
    assert found == pytest.approx(float(sum(pairs)) / len(pairs)) and len(pairs) > 50


def test_a_log_counts_each_step_once(tmp_path):
    """The run was killed after step 30, and continued at step 20."""
    begin = {"parameters": 1, "vocabulary": 9, "train_tokens": 99, "loss_without_context": 5.5}
    held_out = dict.fromkeys(runs.KEPT, 0.5)

    def train(step, tokens):
        return {"kind": "train", "step": step, "tokens": tokens, "tokens_per_second": 10.0}

    lines = [{"kind": "begin", "step": 0} | begin, train(10, 19), train(20, 21)]
    lines += [held_out | {"kind": "held_out", "step": 20, "auc": 0.6}, train(30, 1000)]
    lines += [train(30, 30), held_out | {"kind": "held_out", "step": 40, "auc": 0.7}, train(40, 40)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = runs.collect(tmp_path)
    assert [(p["step"], p["tokens"], p["auc"]) for p in found["curve"]] == [(20, 40, 0.6), (40, 110, 0.7)]
    assert found["seconds"] == pytest.approx(11.0) and found["loss_without_context"] == 5.5


def test_new_weights_have_the_initial_attention_of_pre_training_and_the_dropout_of_all(tmp_path):
    pretend_data.write(tmp_path)
    for start, given in (
        (transfer.NEW_WEIGHTS, {"preset": "tiny", "vocab": str(tmp_path), "model": None}),
        ("fused", {"preset": None, "vocab": None, "model": str(tmp_path)}),
    ):
        run = transfer.Run("banking77", start, 3, tmp_path, "tiny", tmp_path, share=0.5)
        found = transfer.recipe(run, tmp_path)
        local = ("initial_attention=local",) if start == transfer.NEW_WEIGHTS else ()
        assert found.set == ("dropout=0", *local) and found.epochs == 4.0 and found.seed == 3
        assert {name: getattr(found, name) for name in given} == given


def test_encoders_come_back_in_bfloat16(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.tensor([1.001])}, tmp_path / "model.safetensors")
    gpu_stages.to_bfloat16(tmp_path / "model.safetensors")
    found = safetensors.load_file(tmp_path / "model.safetensors")["w"]
    assert found.dtype == torch.bfloat16 and found.item() == 1.0


def test_an_objective_without_a_head_has_no_score_of_pairs(monkeypatch):
    monkeypatch.setattr(probes, "probe", lambda *run: {"sentiment": 0.7, "pairs": 0.5})
    for name, run in ablations.runs(("text",)).items():
        assert ("pairs" in ablations.probed(run, None)) == (name not in ("All-Tokens MLM", "Replace MLM"))


def test_the_original_word_is_searched_in_the_suggestions(monkeypatch):
    """It is the first suggestion for a text and the second for another; a third text has no known word."""
    texts = ["red", "green", "?"]
    found = [
        [Candidate("red", 0.1, 0.0), Candidate("blue", 0.9, 0.5)],
        [Candidate("blue", 0.2, 0.5), Candidate("green", 0.8, 0.1)],
    ]

    def suggest(given, model, spans):
        assert len(given) == 2 and all(
            text[slice(*span[0])] == text for text, span in zip(given, spans, strict=True)
        )
        return [SimpleNamespace(suggestions=[SimpleNamespace(candidates=each)]) for each in found]

    monkeypatch.setattr(uses, "suggest", suggest)
    vocabulary = dict.fromkeys(("red", "green", "blue"), 0)
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, decode_batch=lambda ids: texts)
    assert uses.suggested(SimpleNamespace(tokenizer=tokenizer), np.zeros((3, 1))) == {
        "first": 0.5,
        "among five": 1.0,
        "first of the generator": 0.5,
    }


def test_both_corruptions_are_those_of_one_model(monkeypatch):
    monkeypatch.setattr(planted, "by_any_piece", lambda ids, pieces: ("pieces", pieces))
    monkeypatch.setattr(planted, "by_generator", lambda model, ids: ("generator of", model.name))
    monkeypatch.setattr(planted, "auc", lambda model, found: [0.25, 0.75] if found[0] == "pieces" else [0.9])
    tokenizer = SimpleNamespace(get_vocab_size=lambda: 9)
    model = SimpleNamespace(name="last", tokenizer=tokenizer)
    rows = planted.detected(model, None, {"first": SimpleNamespace(name="first"), "last": model})
    assert [(row["model"], row["by"]) for row in rows] == [
        (name, by) for name in ("first", "last") for by in ("any piece", "the generator")
    ]
    assert rows[0]["auc"] == pytest.approx((0.5, 0.25)) and rows[1]["auc"][0] == 0.9


def test_shuffled_sentences_have_the_same_words():
    text = "one two three four five six."
    (found,) = electric.shuffled([text])
    assert found != text and sorted(found[:-1].split()) == sorted(text[:-1].split()) and found[-1] == "."
