"""A tower that has collapsed is reported once, with what to change."""

import math

import pytest
import torch

from electra_fast.divergence import LEAST_SPREAD, Collapse, not_finite
from electra_fast.evaluation import moments, standard_deviation
from electra_fast.ledger import Row

ROW = Row(*[0.0] * len(Row._fields))


def test_a_discriminator_that_answers_alike_is_reported_once_with_the_remedy():
    collapse = Collapse(warmup=10)
    assert collapse.discriminator(10, 0.0) is None, "in the warm-up its logits hardly differ yet"
    for step, spread in ((20, 0.5), (30, LEAST_SPREAD), (40, math.nan)):
        assert collapse.discriminator(step, spread) is None
    said = collapse.discriminator(50, 0.00123)
    assert "discriminator collapsed? The standard deviation of its logits is 0.00123" in said
    assert "lower --lr" in said and "--beta2 0.999" in said and "longer --warmup" in said
    assert collapse.discriminator(60, 0.0) is None
    assert collapse.discriminator(70, 1.0) is None
    assert collapse.discriminator(80, 0.0) is not None


@pytest.mark.parametrize(
    "sums, collapsed",
    [
        ({"masked": 9, "mlm_correct": 9, "true_positives": 1}, True),  # it knows everything
        ({"masked": 9, "mlm_correct": 1, "true_negatives": 50}, True),  # it replaces nothing
        ({"masked": 9, "mlm_correct": 1, "true_negatives": 50, "false_negatives": 1}, False),
        ({"masked": 0}, False),
        ({"masked": 9, "mlm_correct": 0}, False),  # a masked language model: nothing to replace
    ],
)
def test_a_generator_that_leaves_nothing_to_find_is_reported_once(sums, collapsed):
    collapse, row = Collapse(0), ROW._replace(**sums)
    said = collapse.generator(row)
    assert (said is not None) == collapsed
    assert said is None or "has the generator collapsed? Of 9 masked tokens" in said
    assert collapse.generator(row) is None


@pytest.mark.parametrize("shape", [(40,), (4, 10)])
def test_the_standard_deviation_is_that_of_the_real_tokens_of_all_batches(shape):
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(*shape, generator=generator) - 3 for _ in range(3)]
    weights = [(torch.rand(*shape, generator=generator) < 0.7).float() for _ in range(2)] + [None]
    real = [a if w is None else a[w > 0] for a, w in zip(x, weights, strict=True)]
    for a, w in zip(x, weights[:2], strict=False):
        a[w == 0] = torch.nan  # padding may hold anything
    found = standard_deviation(sum(map(moments, x, weights)))
    wanted = torch.cat([a.flatten() for a in real]).double().std(correction=0)
    assert torch.isclose(found, wanted, rtol=1e-12)
    assert standard_deviation(moments(torch.full((9,), -1.7), None)) < 1e-7


def test_a_loss_that_is_not_finite_is_found():
    fine = {"mlm_loss": 1.0, "rtd_loss": 0.3, "replaced": 0.1}
    assert not not_finite(fine)
    assert not not_finite(fine | {"rtd_loss": math.nan, "replaced": math.nan}), "there is no discriminator"
    assert not_finite(fine | {"rtd_loss": math.nan}) and not_finite(fine | {"mlm_loss": math.inf})
