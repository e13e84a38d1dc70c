"""A model of this package as the model of transformers that generates, fused."""

import torch
from transformers import EncoderDecoderConfig, EncoderDecoderModel, GenerationConfig

from electra_fast.decoder import EncoderDecoder
from electra_fast.hf.patching import patch


def generator(model: EncoderDecoder) -> EncoderDecoderModel:
    """Return transformers' model with the weights of `model`, patched and in eval mode.

    The weights are the same memory, so it generates with those of a model in training. The seed of PyTorch's
    default generator does not change.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):  # random weights are drawn, and replaced
        made = EncoderDecoderModel(EncoderDecoderConfig(**model.described()))
    made.to(device)  # its buffers
    made.load_state_dict(model.state_dict(), assign=True)
    made.tie_weights()
    made.generation_config = GenerationConfig(**model.configs()["generation_config.json"])
    patch(made.eval())
    return made
