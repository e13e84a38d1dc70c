"""A change of the vocabulary resizes tables, bias and optimizer together, or nothing."""

import dataclasses

import pytest
import torch
from towers import CONFIG, padded

from electra_fast.model import Discriminator, Electra, Generator

RNG = torch.tensor([11, 3])


def trained(sharing="embeddings", make=torch.optim.AdamW):
    """Return a model, its optimizer, and a function that trains one step."""
    model = Electra(dataclasses.replace(CONFIG, sharing=sharing, dropout=0.0))
    optimizer = make(model.parameters(), lr=1e-3)

    def step(highest=300):
        ids, key_mask = padded(24, 9)
        ids = ids.clamp(max=highest - 2)
        ids[0, 1] = highest - 1
        optimizer.zero_grad()
        model(ids, key_mask=key_mask, rng=RNG).loss.backward()
        optimizer.step()

    step()
    return model, optimizer, step


def token_rows(model):
    return [r.parameter for m in model.modules() if hasattr(m, "token_rows") for r in m.token_rows()]


@pytest.mark.parametrize("size", [333, 250])
@pytest.mark.parametrize("sharing", ["none", "embeddings", "gdes"])
def test_old_rows_stay_and_new_ones_are_initialized(sharing, size):
    model, optimizer, step = trained(sharing)
    parameters = token_rows(model)
    assert len(parameters) == {"none": 3, "embeddings": 2, "gdes": 3}[sharing]
    before = [(p.detach().clone(), optimizer.state[p]["exp_avg"].clone()) for p in parameters]
    model.resize_token_embeddings(size, optimizer)

    kept = min(size, 300)
    for p, (values, averages) in zip(parameters, before, strict=True):
        average = optimizer.state[p]["exp_avg"]
        assert len(p) == len(average) == len(optimizer.state[p]["exp_avg_sq"]) == size
        assert torch.equal(p[:kept], values[:kept]) and torch.equal(average[:kept], averages[:kept])
        assert not average[kept:].any() and p.detach()[kept:].abs().le(0.04).all()
    words = model.generator.encoder.embedding.words
    assert size < 300 or 0.01 < words.detach()[300:].std() < 0.03
    assert model.config.vocab_size == model.generator.config.vocab_size == size
    assert all(a is b for a, b in zip(token_rows(model), parameters, strict=True))
    step(size)
    assert model(padded(24)[0].clamp(max=size - 1)).loss.isfinite()


def test_a_half_without_the_other_can_grow_too():
    for half in (Generator(CONFIG), Discriminator(CONFIG)):
        half.resize_token_embeddings(310)
        half(torch.tensor([[101, 309, 102]]))
        assert half.config.vocab_size == 310


def test_an_optimizer_that_was_not_resized_fails_in_the_next_step():
    model, _, step = trained()
    model.resize_token_embeddings(333)
    with pytest.raises(RuntimeError, match="size"):
        step()


def test_state_that_cannot_be_resized_is_refused_before_anything_changes():
    model, optimizer, step = trained()
    words = model.generator.encoder.embedding.words
    optimizer.state[words]["factored"] = torch.zeros(300)
    with pytest.raises(ValueError, match=r"optimizer must have state of shape \[300, 24\], got factored"):
        model.resize_token_embeddings(333, optimizer)
    assert len(words) == 300 and model.config.vocab_size == 300
    step()


@pytest.mark.parametrize("size", [0, 103, 310.0])
def test_a_size_without_the_special_tokens_is_refused(size):
    model, _, step = trained()
    with pytest.raises(ValueError, match=r"ElectraConfig: \w+ must be"):
        model.resize_token_embeddings(size)
    step()
