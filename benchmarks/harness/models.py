"""Classifiers of transformers as their users build them, with the same weights for every provider."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.harness.providers import OURS


def build(head: str, config, provider: str, device: str, *, training: bool = True) -> nn.Module:
    """Return a model of the class `head`, patched if the provider is one of ours."""
    import transformers  # imported late, because it takes seconds

    from electra_fast import hf

    torch.manual_seed(0)
    model = getattr(transformers, head)(config).to(device).train(training)
    if provider in OURS:
        hf.patch(model, **({"int8": True} if provider == "fused_int8" else {}))
    return model


def patch_has_int8() -> None:
    """Raise ImportError if this version of the patch has no int8."""
    from electra_fast import hf

    if "int8" not in inspect.signature(hf.patch).parameters:
        raise ImportError("electra_fast.hf.patch has no argument int8")


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set the dropout of all layers to 0 within the context, because each provider draws other masks."""
    found = {layer: layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)}
    for layer in found:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in found.items():
            layer.p = p
