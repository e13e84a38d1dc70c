"""The experiments of benchmarks/learning: they measure what they claim, and LEARNING.md is up to date."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.learning import __main__ as command
from benchmarks.learning import (
    checkpoints,
    fine_tune,
    fine_tune_report,
    objectives,
    on_gpu,
    pretend_data,
    probes,
    report,
    results,
    transfer,
)
from benchmarks.learning import runs as learning
from electra_fast import data
from electra_fast.config import ElectraConfig
from electra_fast.model import Discriminator, Electra, Generator
from electra_fast.ops import FUSED
from electra_fast.tasks.examples import Examples
from electra_fast.train.checkpoint import read
from electra_fast.train.task_data import Split

TINY = {"layers": 1, "hidden": 32, "heads": 1, "ffn": 64, "embedding": 16, "vocab_size": 200}
TINY |= {"generator_layers": 1, "generator_hidden": 32, "generator_heads": 1, "generator_ffn": 64}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_page_is_what_was_found():
    if not results.FILE.exists():
        pytest.skip("no results yet")
    found = results.read()
    assert report.PAGE.read_text() == report.markdown(found), "python -m benchmarks.learning report"
    assert report.CURVES.read_text() == report.curves(found), "python -m benchmarks.learning report"


def test_a_bag_of_words_counts_wordpieces_and_knows_the_most_frequent_tag():
    ids = np.array([101, 7, 7, 102, 101, 9, 102], np.int32)
    split = Split(["first", "second"], Examples(ids, np.array([0, 4, 7]), np.array([4, 3])))
    counts = transfer.counts(split, 200)
    assert counts[0, 7] == 2 and counts[1, 9] == 1 and counts.sum() == 7 and (counts[:, 101] == 1).all()
    tagged = [(["Ann", "is", "ann"], ["B-x", "O", "O"]), (["ANN", "Is"], ["B-x", "B-x"])]
    found = transfer.most_frequent_tags(tagged, [["ann", "runs"], ["Ann"]])
    assert found == [["B-x", "O"], ["B-x"]]


def test_the_masked_model_is_the_generators_half_of_electra():
    """With the same size, weights, masks and tokens, both have the same loss."""
    config = ElectraConfig(**TINY, dropout=0.0, sharing="none")
    torch.manual_seed(0)
    both, alone = Electra(config), objectives.MaskedLM(config, FUSED)
    alone.generator.load_state_dict(both.generator.state_dict())
    ids, rng = torch.randint(104, 200, (3, 20)), torch.tensor([1, 2])
    key_mask = torch.arange(20) < torch.tensor([[20], [11], [7]])
    a, b = (model(ids, key_mask=key_mask, rng=rng) for model in (both, alone))
    assert torch.equal(a.mlm_loss, b.loss) and torch.equal(a.mlm_correct, b.mlm_correct)
    assert b.rtd_counts.sum() == 0


def test_a_linear_probe_finds_what_is_there_and_nothing_else():
    y = {split: (normal(n, seed=n) > 0).long() for split, n in (("train", 400), ("dev", 200), ("test", 300))}
    noise = {split: normal(len(labels), 8, seed=len(labels) + 1) for split, labels in y.items()}
    apart = {split: x + 4 * y[split][:, None] for split, x in noise.items()}
    assert probes.linear_probe(apart, y).accuracy > 0.99
    found = probes.linear_probe(noise, y)
    assert abs(found.accuracy - 0.5) < 0.1 and found.low < found.accuracy < found.high


def test_features_do_not_depend_on_padding_or_order():
    encoder = Discriminator(ElectraConfig(**TINY)).eval().encoder
    sequences = [[101, *range(110, 110 + n), 102] for n in (3, 17, 1, 9)]
    together = probes.features(encoder, sequences)
    for one, sequence in zip(together, sequences, strict=True):
        with torch.inference_mode():
            alone = encoder(torch.tensor([sequence])).mean(1)[0]
        assert torch.allclose(one, alone, atol=1e-5)


def test_a_masked_model_scores_each_token_by_the_others():
    half = Generator(ElectraConfig(**TINY)).eval()
    sequences = [[101, 120, 130, 140, 102], [101, 150, 102]]
    wanted = []
    for s in sequences:
        total = 0.0
        for t in range(1, len(s) - 1):
            masked = torch.tensor([[*s[:t], 103, *s[t + 1 :]]])
            with torch.inference_mode():
                total += half(masked)[0, t].log_softmax(-1)[s[t]].item()
        wanted.append(total)
    assert probes.masked_scores(half, sequences).tolist() == pytest.approx(wanted, abs=1e-4)


class Suspicious(nn.Module):
    """Classifies token 190 as replaced and all others as original."""

    def forward(self, ids, *, key_mask):
        return torch.where(ids == 190, 5.0, -5.0)


def test_a_discriminator_prefers_the_sentence_it_believes():
    good, bad = probes.discriminator_scores(Suspicious(), [[101, 120, 130, 102], [101, 120, 190, 102]])
    assert good > bad
    assert good == pytest.approx(-4 * torch.nn.functional.softplus(torch.tensor(-5.0)).item())


def run_of(aucs, seed=0, replaced=0.1, rtd_loss=0.3):
    keep = {"mlm_loss": 5.0, "mlm_accuracy": 0.2, "rtd_loss": rtd_loss, "replaced": replaced}
    points = [
        keep | {"step": 10 * i, "tokens": 80 * i, "auc": a, "auc_low": a - 0.01, "auc_high": a + 0.01}
        for i, a in enumerate(aucs)
    ]
    facts = {"steps": 40, "loss_without_context": 6.0, "seconds": 60.0, "vocabulary": 9, "train_tokens": 9}
    return {"seed": seed, "curve": points} | facts


@pytest.mark.parametrize(
    ("aucs", "whole", "later"),
    [
        ((0.68, 0.50, 0.52, 0.55), "(0.680) it falls: -0.130", "(0.500) it rises: +0.050"),
        ((0.50, 0.55, 0.58, 0.60), "(0.500) it rises: +0.100", "(0.550) it rises: +0.050"),
        ((0.60, 0.61, 0.58, 0.60), "(0.600) it does not change", "(0.610) it does not change"),
    ],
)
def test_an_auc_that_fell_at_first_has_not_risen(aucs, whole, later):
    # The last AUC of the seeds has a standard error of 0.012.
    runs = [run_of((*aucs[:3], aucs[3] + offset), seed) for seed, offset in enumerate((-0.02, 0, 0.02))]
    line = next(x for x in report._verdicts({"fused": runs, "reference": runs}) if "final AUC" in x)
    assert f"first evaluation {whole}" in line and f"a quarter of the run {later}" in line
    assert "in 3 of 3 runs" in line


def test_an_interval_that_has_a_half_in_it_is_not_above():
    runs = [run_of((0.7, auc), seed) for seed, auc in enumerate((0.505, 0.52))]
    assert "in 1 of 2 runs" in " ".join(report._verdicts({"fused": runs, "reference": runs}))


def test_one_seed_has_no_standard_error():
    runs = [run_of((0.5, 0.6, 0.7))]
    text = "\n".join(report._verdicts({"fused": runs, "reference": runs}))
    assert "nan" not in text and "fused minus reference: +0.0000 (one seed has no standard error)" in text
    assert "(0.500) it changes by +0.200 (one seed);" in text and "more than two standard errors: no" in text


@pytest.mark.parametrize(("below", "word"), [(0.01, "yes"), (-0.01, "no")])
def test_knowing_how_many_are_replaced_is_not_learning(below, word):
    entropy = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    runs = [run_of((0.6, 0.6), seed, rtd_loss=entropy - below + 0.001 * seed) for seed in (-1, 0, 1)]
    lines = report._verdicts({"fused": runs, "reference": runs})
    (line,) = (x for x in lines if "best constant prediction" in x)
    assert f"{below:.4f} ± 0.0006 nats below" in line and line.endswith(f": {word}.")


@pytest.mark.filterwarnings("ignore:.*TensorBoard:")
def test_from_text_to_page(tmp_path, monkeypatch):
    """All steps on a small text with small probes; the numbers mean nothing."""
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(command, "ROOT", tmp_path)
    pretend_data.write(tmp_path)
    text = tmp_path / on_gpu.TEXTS[0]
    facts = [{"corpus": "c", "model": name, "seed": 0} for name in ("fused", "reference", "masked")]
    runs = [command.run(each, (str(text),), 3) for each in facts]
    threads = torch.get_num_threads()
    for run in runs:
        learning.train(run)
    probed = [probes.probe(run.folder, objectives.MODELS[run.model][0], tmp_path) for run in runs[::2]]
    torch.set_num_threads(threads)
    for run, half in zip(runs[::2], ("discriminator", "generator"), strict=True):
        first = read(run.folder / "checkpoints" / "step-000000000").tensors["model"]
        initial = checkpoints.initial_weights(run.folder, objectives.MODELS[run.model][0])
        for name, weight in initial.named_parameters():
            # A checkpoint stores shared weights under the generator's name only.
            names = (f"{half}.{name}", f"generator.{name}")
            assert torch.equal(weight, next(first[n] for n in names if n in first)), name
    with pytest.raises(ValueError, match=r"steps must be 3, as in .*, got 4; or remove that folder"):
        learning.train(command.run(facts[0], (str(text),), 4))
    assert all(p["pairs"].accuracy in (0, 1) for p in probed)  # equal pairs: all or none
    assert all(p["sentiment"].accuracy == p["sentiment_words"].accuracy == 1 for p in probed)
    found = [
        each | command.described(run) | learning.collect(run.folder)
        for each, run in zip(facts, runs, strict=True)
    ]
    everything = json.loads(json.dumps({"runs": found, "machine": "here", "torch": "2"}))
    page = report.markdown(everything)
    for words in ("the same: c", "sequences of 32, 3 steps", "| fused | 1 |", "fused minus reference"):
        assert words in page
    assert everything["runs"][0]["curve"][-1]["step"] == 3
    assert data.load_tokenizer(runs[0].folder / "tokenizer").get_vocab_size() > 104


def test_fine_tuning_and_trainer_learn_from_the_same_texts(tmp_path):
    pytest.importorskip("transformers")
    rows = "".join(f"it is {'good' if i % 2 else 'bad'},{i % 2}\n" for i in range(64))
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text(f"text,label\n{rows}")
    threads = torch.get_num_threads()
    found = [fine_tune.train(fine_tune.Run(name, 0, tmp_path, 3.0)) for name in fine_tune.MODELS]
    torch.set_num_threads(threads)
    assert [(run["items"], run["tested"]) for run in found] == [(64, 64)] * 2
    assert all(0.4 < run["accuracy"] <= 1 and run["cpu_seconds"] > 0 for run in found)


@pytest.mark.parametrize(("accuracy", "verdict"), [(0.86, "within"), (0.9, "outside")])
def test_accuracies_are_compared_within_their_noise(accuracy, verdict):
    runs = [
        {"model": model, "seed": seed, "accuracy": a + seed / 100, "cpu_seconds": seconds}
        | {"epochs": 8.0, "data": "some", "items": 10, "tested": 5}
        for model, a, seconds in (("finetune", 0.86, 10.0), ("trainer", accuracy, 25.0))
        for seed in range(3)
    ]
    page = "\n".join(fine_tune_report.section({"machine": "here", "torch": "2", "runs": runs}))
    assert f"{0.86 - accuracy:+.4f}, {verdict} two standard errors (0.0163)" in page
    assert "it is 2.50 times as fast" in page and "0.8700 ± 0.0058" in page
