"""Errors about models that cannot be patched, and about wrong batches for a patched model."""

import pytest
import torch
import transformers
from small_patched import SIZES, B, L, batch, build
from torch import nn

from electra_fast import hf


def compiled_in_place():
    model = build()
    model.compile(backend="eager")
    return model


def with_a_forward_pass_of_its_own():
    model = build()
    model.forward = model.forward
    return model


def patched_otherwise():
    model = build()
    hf.patch(model)
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: "google/electra-small", {}, TypeError, "model must be a torch.nn.Module, got str"),
        (
            lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
            {},
            TypeError,
            "model must have ELECTRA's or BERT's encoder of transformers, got RobertaModel",
        ),
        (
            lambda: torch.compile(build(), backend="eager"),
            {},
            ValueError,
            "OptimizedModule must not be compiled yet, got a compiled module; patch first, then compile",
        ),
        (compiled_in_place, {}, ValueError, "ElectraForPreTraining must not be compiled yet"),
        (
            with_a_forward_pass_of_its_own,
            {},
            ValueError,
            "ElectraForPreTraining must run its class's forward pass, got another, set on the module",
        ),
        (
            patched_otherwise,
            {"norm": False},
            ValueError,
            "attention.output must not be patched with other options, got norm already fused; undo()",
        ),
    ],
)
def test_the_error_names_a_module_that_cannot_be_patched(model, options, error, message):
    model = model()
    before = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error) as caught:
        hf.patch(model, **options)
    assert f"electra_fast.hf.patch: {message}" in str(caught.value) or message in str(caught.value)
    assert before == ([type(m) for m in model.modules()] if before else [])


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        (
            "ElectraForMaskedLM",
            {"labels": torch.zeros(B, L - 1, dtype=torch.long)},
            ValueError,
            "electra_fast.hf: labels must have one label per token, shape [3, 20], got [3, 19]",
        ),
        (
            "ElectraForPreTraining",
            {"labels": torch.zeros(B, dtype=torch.long)},
            ValueError,
            "electra_fast.hf: labels must have one label per token, shape [3, 20], got [3]",
        ),
        (
            "ElectraForPreTraining",
            {"labels": torch.full((B, L), -100), "attention_mask": torch.ones(B, L)},
            ValueError,
            "labels must be 0 (original) or 1 (replaced) where attention_mask is 1, got -100; mask padding",
        ),
        (
            "ElectraForPreTraining",
            {"attention_mask": torch.ones(B, 1, L, L, dtype=torch.bool)},
            ValueError,
            "electra_fast.hf: attention_mask must be [B, L] if labels are given, got [3, 1, 20, 20]",
        ),
        (
            "ElectraForPreTraining",  # transformers computes NaN here
            {"attention_mask": torch.zeros(B, 1, 1, L)},
            ValueError,
            "electra_fast.hf: attention_mask must be [B, L] if labels are given, got [3, 1, 1, 20]",
        ),
        (
            "ElectraForMaskedLM",
            {"labels": torch.full((B, L), 300)},
            IndexError,
            "mlm_head: targets must be in [0, 300), got 300",
        ),
        (
            "ElectraModel",
            {"input_ids": torch.full((B, L), 300)},
            IndexError,
            "embed: ids must be in [0, 300), got 300",
        ),
    ],
)
def test_the_error_names_the_argument_of_a_wrong_batch(name, change, error, message):
    model = build(name)
    hf.patch(model)
    with pytest.raises(error) as caught:
        model(**{**batch(name), **change})
    assert message in str(caught.value)
