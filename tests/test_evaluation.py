"""Metrics of held-out text, compared with their definitions."""

import math

import pytest
import torch

from electra_fast.config import ElectraConfig
from electra_fast.model import Electra
from electra_fast.train.evaluation import (
    area_under_curve,
    evaluate,
    interval,
    loss_without_context,
    unigram_loss,
)


def test_the_area_under_the_curve_is_the_share_of_ordered_pairs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(6, (40,), generator=generator).float()  # ties
    y = torch.rand(40, generator=generator) < 0.3
    weights = (torch.rand(40, generator=generator) < 0.8).float()
    a, b = x[y & (weights > 0)], x[~y & (weights > 0)]
    wanted = ((a[:, None] > b).double() + (a[:, None] == b).double() / 2).mean()
    assert torch.isclose(area_under_curve(x, y, weights), wanted)
    x[weights == 0] = torch.nan  # padding may have any value
    assert torch.isclose(area_under_curve(x.view(4, 10), y.view(4, 10), weights.view(4, 10)), wanted)
    assert area_under_curve(y.float(), y, None) == 1 and area_under_curve(-y.float(), y, None) == 0
    assert area_under_curve(x, torch.zeros(40, dtype=torch.bool), None).isnan()


def test_the_95_percent_interval_contains_the_mean_in_95_percent_of_draws():
    generator = torch.Generator().manual_seed(0)
    for n, least in ((6, 0.94), (20, 0.94)):
        draws = torch.randn(4000, n, generator=generator, dtype=torch.float64)
        covered = sum(low < 0 < high for _, low, high in map(interval, draws.tolist())) / len(draws)
        assert least < covered < 0.96
    mean, low, _ = interval([1.0, 2.0])
    assert mean == 1.5 and math.isnan(low)
    assert math.isnan(interval([])[0])


def test_the_unigram_loss_is_the_entropy_of_the_counted_text():
    text = torch.tensor([0] * 998 + [1] * 998)
    assert unigram_loss(text, text, 2) == pytest.approx(math.log(2))
    assert unigram_loss(text, torch.tensor([2]), 4) == pytest.approx(math.log(2000))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, 0.85 * 2.0),
        ({"keep_prob": 0.0}, 2.0),
        ({"objective": "electric", "generator": "masked"}, 2.0),  # all masked positions get [MASK]
        ({"generator": "two_tower"}, 2.0),
        ({"generator": "uniform"}, math.log(1000)),
    ],
)
def test_without_context_only_a_kept_token_is_known(change, wanted):
    assert loss_without_context(2.0, ElectraConfig(vocab_size=1000, **change)) == pytest.approx(wanted)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Electra(ElectraConfig.tiny())


def batches():
    generator = torch.Generator().manual_seed(1)
    for length in (32, 20, 32):
        ids = torch.randint(200, 20_000, (3, 32), generator=generator)
        yield {"ids": ids, "key_mask": torch.arange(32) < torch.tensor([[32], [length], [9]])}


def test_two_evaluations_of_a_model_are_equal_and_leave_it_unchanged(model):
    ops, first = model.ops, evaluate(model, batches())
    second = evaluate(model, batches())
    assert first == second or all(
        a == b or a != a for a, b in zip(first.values(), second.values(), strict=True)
    )
    assert model.training and model.ops is ops and all(p.grad is None for p in model.parameters())
    assert abs(first["mlm_loss"] - math.log(30522)) < 0.5 and abs(first["auc"] - 0.5) < 0.2


def test_metrics_are_means_over_tokens_not_over_batches(model):
    """The metrics are computed again from the sums over all batches."""
    found = evaluate(model, batches())
    tokens = sum(int(batch["key_mask"].sum()) for batch in batches())
    model.eval()
    with torch.no_grad():
        outs = [model(**batch, rng=torch.tensor([2**62, i])) for i, batch in enumerate(batches())]
    model.train()
    masked = sum(out.masked for out in outs)
    assert found["mlm_loss"] == pytest.approx(float(sum(o.mlm_loss * o.masked for o in outs) / masked))
    assert found["mlm_accuracy"] == float(sum(o.mlm_correct for o in outs) / masked)
    tp, fp, fn, _ = sum(o.rtd_counts for o in outs).tolist()
    assert found["replaced"] == pytest.approx((tp + fn) / tokens)
    assert found["recall"] == tp / (tp + fn)
    assert found["precision"] == pytest.approx(tp / (tp + fp)) if tp + fp else math.isnan(found["precision"])


def test_logit_std_is_the_standard_deviation_of_the_logits(model):
    logits = []
    hook = model.discriminator.register_forward_hook(lambda *args: logits.append(args[2]))
    found = evaluate(model, batches())
    hook.remove()
    real = torch.cat([x[batch["key_mask"]] for x, batch in zip(logits, batches(), strict=True)])
    assert found["logit_std"] == pytest.approx(real.double().std(correction=0).item(), rel=1e-6)


def test_an_evaluation_under_autocast_has_float32_logits(model):
    """In bfloat16 most logits would be equal to others."""
    head, wanted, logits = model.discriminator.head, [], []

    def exact(score, inputs, output):
        with torch.autocast("cpu", enabled=False):
            wanted.append(inputs[0].float() @ score.weight[0] + score.bias)

    hooks = [head.score.register_forward_hook(exact)]
    hooks += [model.discriminator.register_forward_hook(lambda *args: logits.append(args[2]))]
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(model, batches())
        inside = model.eval()(**next(batches()), rng=torch.tensor([0, 0]))
    model.train()
    for hook in hooks:
        hook.remove()
    evaluated, after = logits[:3], logits[3]
    for found, expected in zip(evaluated, wanted, strict=False):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert len(found.unique()) > 0.9 * len(found.bfloat16().unique())
    assert after.dtype == torch.bfloat16 and inside.rtd_loss.isfinite(), "the hook has been removed"


def test_an_evaluation_can_be_stopped(model):
    seen = []
    evaluate(model, (seen.append(0) or batch for batch in batches()), stop=lambda: True)
    assert len(seen) == 1
