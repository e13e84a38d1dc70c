"""A collapsed generator or discriminator is reported once, with a remedy."""

import math

import pytest
import torch

from electra_fast.train.divergence import LEAST_STD, Collapse, not_finite
from electra_fast.train.evaluation import moments, standard_deviation
from electra_fast.train.metrics import StepMetrics

ZEROS = StepMetrics(*[0.0] * len(StepMetrics._fields))


def test_a_discriminator_with_equal_logits_is_reported_once_with_a_remedy():
    collapse = Collapse(warmup=10)
    assert collapse.discriminator(10, 0.0) is None, "during the warm-up the logits hardly differ yet"
    for step, spread in ((20, 0.5), (30, LEAST_STD), (40, math.nan)):
        assert collapse.discriminator(step, spread) is None
    said = collapse.discriminator(50, 0.00123)
    assert "discriminator collapsed? The standard deviation of its logits is 0.00123" in said
    assert "lower --lr" in said and "longer --warmup" in said and "--set rtd_weight=1" in said
    assert collapse.discriminator(60, 0.0) is None
    assert collapse.discriminator(70, 1.0) is None
    assert collapse.discriminator(80, 0.0) is not None


@pytest.mark.parametrize(
    "sums, collapsed",
    [
        ({"masked": 9, "mlm_correct": 9, "true_positives": 1}, True),  # it predicts all masked tokens
        ({"masked": 9, "mlm_correct": 1, "true_negatives": 50}, True),  # it replaces no token
        ({"masked": 9, "mlm_correct": 1, "true_negatives": 50, "false_negatives": 1}, False),
        ({"masked": 0}, False),
        ({"masked": 9, "mlm_correct": 0}, False),  # a masked language model replaces no tokens
    ],
)
def test_a_generator_that_leaves_nothing_to_find_is_reported_once(sums, collapsed):
    collapse = Collapse(0)
    metrics = ZEROS._replace(**sums)
    said = collapse.generator(metrics)
    assert (said is not None) == collapsed
    assert said is None or "has the generator collapsed? Of 9 masked tokens" in said
    assert collapse.generator(metrics) is None


@pytest.mark.parametrize("shape", [(40,), (4, 10)])
def test_the_standard_deviation_is_over_the_real_tokens_of_all_batches(shape):
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(*shape, generator=generator) - 3 for _ in range(3)]
    weights = [(torch.rand(*shape, generator=generator) < 0.7).float() for _ in range(2)] + [None]
    real = [a if w is None else a[w > 0] for a, w in zip(x, weights, strict=True)]
    for a, w in zip(x, weights[:2], strict=False):
        a[w == 0] = torch.nan  # padding may have any value
    found = standard_deviation(sum(map(moments, x, weights)))
    wanted = torch.cat([a.flatten() for a in real]).double().std(correction=0)
    assert torch.isclose(found, wanted, rtol=1e-12)
    assert standard_deviation(moments(torch.full((9,), -1.7), None)) < 1e-7


def test_a_loss_that_is_not_finite_is_found():
    fine = {"mlm_loss": 1.0, "rtd_loss": 0.3, "replaced": 0.1}
    assert not not_finite(fine)
    without_discriminator = {"rtd_loss": math.nan, "replaced": math.nan}
    assert not not_finite(fine | without_discriminator)
    assert not_finite(fine | {"rtd_loss": math.nan}) and not_finite(fine | {"mlm_loss": math.inf})
