"""What the judge says about the maskers and samplers of other packages: docs/check_your_kernel.md has it."""

import pytest
from test_distributions import COUNT, FEWER, MASK, PADDED, wrong

from electra_fast.testing.distributions.maskers import masker_properties
from electra_fast.testing.distributions.samplers import sampler_properties
from electra_fast.testing.supports import fit


class Tokenizer:
    """What transformers' collator asks of a tokenizer."""

    mask_token = "[MASK]"

    def convert_tokens_to_ids(self, token):
        return MASK

    def __len__(self):
        return 30522


def judged(function):
    """Return the wrong properties of a function (ids, candidates) -> (masked ids, labels)."""
    function, _ = fit("test", "mask_tokens", function, "labels")
    return wrong(masker_properties(function))


@pytest.mark.parametrize(
    ("options", "quantities"),
    [
        ({}, {COUNT, PADDED, "share that keeps its id", "changed tokens are [MASK]"}),
        ({"mask_replace_prob": 0.85, "random_replace_prob": 0.0}, {COUNT, PADDED}),
    ],
    ids=["defaults", "as ELECTRA"],
)
def test_the_collator_of_transformers(options, quantities):
    transformers = pytest.importorskip("transformers")
    collator = transformers.DataCollatorForLanguageModeling(Tokenizer(), **options)
    masks = collator.torch_mask_tokens
    assert judged(lambda ids, candidates: masks(ids, special_tokens_mask=~candidates)) == quantities


def test_the_masker_and_the_sampler_of_electra_pytorch():
    package = pytest.importorskip("electra_pytorch.electra_pytorch")

    def masks(ids, candidates):
        hit = package.get_mask_subset_with_prob(candidates, 0.15)
        return ids.masked_fill(hit * package.prob_mask_like(ids, 0.85), MASK), ids.masked_fill(~hit, -100)

    assert judged(masks) == {COUNT, PADDED, "only candidates, if there are few"}
    sampler, _ = fit("test", "mlm_head", package.gumbel_sample, "sampler")
    assert wrong(sampler_properties(sampler, **FEWER)) <= {"disallow_correct: the target"}
