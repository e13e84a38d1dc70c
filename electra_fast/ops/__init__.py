"""The ops in the order of the paper, and three tables of them: the definition, plain PyTorch, the kernels.

`FUSED` dispatches to the kernel that this installation has for each op and device (`electra_fast.info()`).
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, Self

from electra_fast import baseline, reference
from electra_fast.ops import _flops
from electra_fast.ops._operators import SlowPathWarning
from electra_fast.ops.add_norm import add_norm
from electra_fast.ops.attention import attention
from electra_fast.ops.attention_qkv import attention_qkv
from electra_fast.ops.bias_gelu import bias_gelu
from electra_fast.ops.embed import embed
from electra_fast.ops.linear import linear
from electra_fast.ops.mask_tokens import mask_tokens
from electra_fast.ops.mlm_head import mlm_head
from electra_fast.ops.nce_loss import nce_loss
from electra_fast.ops.replace_tokens import replace_tokens
from electra_fast.ops.rtd_loss import rtd_loss


class Ops(NamedTuple):
    """The ops as one value, which says how a model computes: `Electra(config, ops=REFERENCE)`."""

    mask_tokens: Callable
    embed: Callable
    linear: Callable
    attention: Callable
    attention_qkv: Callable
    add_norm: Callable
    bias_gelu: Callable
    mlm_head: Callable
    replace_tokens: Callable
    rtd_loss: Callable
    nce_loss: Callable

    @classmethod
    def of(cls, module: ModuleType) -> Self:
        """Return the functions of a module that have the names of the ops."""
        return cls(*(getattr(module, name) for name in cls._fields))


REFERENCE, TORCH, FUSED = map(Ops.of, (reference, baseline, sys.modules[__name__]))
_flops.install()

__all__ = ["FUSED", "REFERENCE", "TORCH", "Ops", "SlowPathWarning", *Ops._fields]
