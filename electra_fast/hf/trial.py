"""The checks of `python -m electra_fast doctor` with the installed transformers, on models of two layers.

Each function raises an error if a result is wrong, and returns which blocks run unfused.
"""

import copy

import torch
import transformers
from torch import Tensor, nn

from electra_fast.hf.patching import Patched, patch
from electra_fast.hf.pretrainer import ElectraPretrainer

SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 32}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL = {"mask_id": 4, "special_ids": (0, 2, 3)}


def patch_electra(device: str) -> str:
    """Compare loss, gradients and attention weights of a discriminator, patched and not."""
    return _patch(transformers.ElectraForPreTraining(_electra()), device)


def patch_bert(device: str) -> str:
    """Compare the same for BERT's masked language model."""
    return _patch(transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), device)


def pretrainer(device: str) -> str:
    """Compare one step of an `ElectraPretrainer`, patched and not."""
    generator = transformers.ElectraForMaskedLM(_electra())
    discriminator = transformers.ElectraForPreTraining(_electra())
    theirs = ElectraPretrainer(generator, discriminator, **SPECIAL).to(device)
    ours = copy.deepcopy(theirs)
    patched = patch(ours)
    inputs = _batch(device) | {"rng": torch.tensor([0, 1], device=device)}
    _assert_close(_loss_and_gradients(ours, inputs), _loss_and_gradients(theirs, inputs))
    return _unfused(patched)


def export(device: str) -> str:
    """Export a patched ELECTRA with torch.export."""
    theirs = transformers.ElectraForPreTraining(_electra()).to(device).eval()
    ours = copy.deepcopy(theirs)
    patched = patch(ours)
    inputs = _batch(device)
    program = torch.export.export(ours, (), inputs).module()
    real = inputs["attention_mask"].bool()
    _assert_close([program(**inputs).logits[real]], [theirs(**inputs).logits[real]])
    return _unfused(patched)


TRIALS = {
    "patch ELECTRA": patch_electra,
    "patch BERT": patch_bert,
    "pretrainer": pretrainer,
    "export": export,
}


def _electra() -> transformers.ElectraConfig:
    return transformers.ElectraConfig(**SIZES, embedding_size=16, pad_token_id=0)


def _batch(device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    real = torch.arange(16) < torch.tensor([16, 9])[:, None]  # [B, L]
    ids = torch.randint(5, SIZES["vocab_size"], real.shape, generator=generator) * real
    return {"input_ids": ids.to(device), "attention_mask": real.long().to(device)}


def _patch(theirs: nn.Module, device: str) -> str:
    theirs = theirs.to(device)
    ours = copy.deepcopy(theirs)
    patched = patch(ours)
    inputs = _batch(device)
    labelled = inputs | {"labels": inputs["input_ids"] % 2}
    _assert_close(_loss_and_gradients(ours, labelled), _loss_and_gradients(theirs, labelled))
    unfused = _unfused(patched)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():  # on a CPU a whole layer is one operator
        _assert_close(*([model.eval()(**inputs).logits[real]] for model in (ours, theirs)))
    for model in (ours, theirs):
        model.set_attn_implementation("eager")
    results = [model(**inputs, output_attentions=True) for model in (ours, theirs)]
    _assert_close(*([result.logits[real], *result.attentions] for result in results))
    return unfused


def _loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    loss = model.train()(**inputs).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [
        loss,
        *(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)),
    ]


def _assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Find gross errors in float32; the ops themselves are checked with the error budget."""
    for a, b in zip(ours, theirs, strict=True):
        error, size = (a - b).norm().item(), b.norm().item()
        # The gradient of a key's bias is 0 except for rounding.
        if not error <= 5e-3 * size + 1e-5:
            raise AssertionError(f"an error of {error:.2g} for a norm of {size:.2g}")


def _unfused(patched: Patched) -> str:
    # In training, the blocks of a layer run and not the layer.
    rows = [row for row in patched.rows() if row.of and row.why_not and row.option != "layer"]
    return "; ".join(f"{row.block} runs unfused, {row.why_not}" for row in rows)
