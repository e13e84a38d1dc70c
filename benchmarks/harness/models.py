"""Classifiers of transformers as their users build them, with the same weights for every provider."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.harness.providers import OURS
from electra_fast.heads import SequenceClassifier
from electra_fast.pretrained import config_from_hugging_face

PATCHED = {"fused_int8": {"int8": True}, "fused_graph": {"graphs": True}}  # options of the patch


def build(head: str, config, provider: str, device: str, *, training: bool = True) -> nn.Module:
    """Return a model of the class `head`, patched if the provider is one of ours."""
    import transformers  # imported late, because it takes seconds

    from electra_fast import hf

    torch.manual_seed(0)
    model = getattr(transformers, head)(config).to(device).train(training)
    if provider in OURS:
        hf.patch(model, **PATCHED.get(provider, {}))
    return model


def with_our_layers(model: nn.Module) -> SequenceClassifier:
    """Return our classifier with the weights, dtype, device and mode of a transformers' one."""
    config = config_from_hugging_face(model.config.to_dict())
    head = SequenceClassifier(config, [str(i) for i in range(model.config.num_labels)])
    head.load_state_dict(model.state_dict())
    return head.to(model.device, model.dtype).train(model.training)


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
