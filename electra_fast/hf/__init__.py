"""Fused kernels in the models of Hugging Face's transformers, 5.0 and newer.

    patched = electra_fast.hf.patch(model)              # one line in a script that trains ELECTRA or BERT
    pretrainer = ElectraPretrainer(generator, discriminator, tokenizer)  # two models become an ELECTRA
    model.set_attn_implementation("electra_fast")       # only the attention, of any encoder

The import registers "electra_fast" as an attention implementation of transformers, and changes nothing else.
"""

from electra_fast.hf.attention import attention, mask
from electra_fast.hf.patching import Patched, patch
from electra_fast.hf.pretrainer import ElectraPretrainer, ElectraPretrainerOutput

__all__ = ["ElectraPretrainer", "ElectraPretrainerOutput", "Patched", "attention", "mask", "patch"]
