"""Hugging Face: fused kernels in the models of transformers, 5.0 and newer.

    patched = electra_fast.hf.patch(model)              # one line in a script that trains ELECTRA or BERT
    pretrainer = ElectraPretrainer(generator, discriminator, tokenizer)  # two models become an ELECTRA
    model.set_attn_implementation("electra_fast")       # the attention alone, of any encoder

Importing this makes "electra_fast" an attention implementation of transformers; nothing else changes.
"""

from electra_fast.hf.attention import attention, mask
from electra_fast.hf.patching import Patched, patch
from electra_fast.hf.pretrainer import ElectraPretrainer, ElectraPretrainerOutput

__all__ = ["ElectraPretrainer", "ElectraPretrainerOutput", "Patched", "attention", "mask", "patch"]
