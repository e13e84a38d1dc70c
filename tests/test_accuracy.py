"""`numerics` tells rounding errors from a wrong kernel, and leaves the model unchanged."""

import copy

import pytest
import torch
import transformers

import electra_fast
from electra_fast import ElectraConfig, hf
from electra_fast.hf import blocks, heads

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 96, "max_position_embeddings": 40}
TINY = ElectraConfig.tiny()


def batch(key_mask="attention_mask", ids="input_ids", **labels):
    x = torch.randint(104, 300, (3, 20))
    real = torch.arange(20) < torch.tensor([20, 7, 12])[:, None]
    return {ids: x * real, key_mask: real} | labels


def electra(head="ElectraForPreTraining"):
    return getattr(transformers, head)(transformers.ElectraConfig(**SIZES, embedding_size=32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head", ["ElectraForPreTraining", "ElectraForMaskedLM", "ElectraModel"])
def test_fused_is_within_twice_the_error_of_pytorch(head, dtype):
    labels = {} if head == "ElectraModel" else {"labels": torch.randint(0, 2, (3, 20))}
    result = electra_fast.numerics(electra(head), batch(**labels), dtype)
    assert {row.module.split(".")[-1] for row in result.rows} >= {"embeddings", "self", "intermediate"}
    for row in result.rows:
        assert row.ratio < 2 and row.gradient_fused is not None, row
    assert "encoder.layer.*.attention.self" in str(result) and "torch " in str(result)


def test_our_own_halves_are_within_twice_the_error_of_pytorch():
    model = electra_fast.Electra(TINY)
    for half in (model.generator, model.discriminator):
        result = electra_fast.numerics(half, batch("key_mask", "ids"))
        assert len(result.rows) > 5 and all(row.ratio < 2 for row in result.rows)


def test_a_wrong_kernel_shows_in_its_own_module(monkeypatch):
    right = blocks.ops.bias_gelu
    monkeypatch.setattr(blocks.ops, "bias_gelu", lambda x, bias: right(x, bias) * 1.05)
    rows = {row.module: row for row in electra_fast.numerics(electra(), batch()).rows}
    assert rows["electra.encoder.layer.0.attention"].output_fused < 0.02
    wrong = rows["electra.encoder.layer.0.intermediate"]
    assert wrong.output_fused > 0.04 and wrong.ratio > 3


def test_a_wrong_head_shows_only_in_the_head(monkeypatch):
    right = heads.ops.mlm_head
    monkeypatch.setattr(heads.ops, "mlm_head", lambda x, *rest: right(x * 1.3, *rest))
    batch_ = batch(labels=torch.randint(0, 300, (3, 20)))
    rows = {row.module: row for row in electra_fast.numerics(electra("ElectraForMaskedLM"), batch_).rows}
    assert rows["generator_predictions"].ratio > 5 and rows["electra.embeddings"].output_fused < 1e-6


def test_the_model_is_left_unchanged():
    model = electra()
    for patched in (False, True):
        if patched:
            hf.patch(model)
        before, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
        electra_fast.numerics(model, batch())
        assert [type(m) for m in model.modules()] == before and model.training
        assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_models_that_cannot_be_compared_are_refused():
    with pytest.raises(TypeError, match="numerics: model must be one half, Generator or Discriminator"):
        electra_fast.numerics(electra_fast.Electra(TINY), batch("key_mask", "ids"))
    with pytest.raises(TypeError, match="must have ELECTRA's or BERT's encoder"):
        electra_fast.numerics(torch.nn.Linear(2, 2), {})
