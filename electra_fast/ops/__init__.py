"""The ops in the order of the paper: `FUSED` is the fastest kernel installed, `REFERENCE` the definition."""

from collections.abc import Callable
from typing import NamedTuple

from electra_fast import reference
from electra_fast.ops import _flops
from electra_fast.ops._register import SlowPathWarning
from electra_fast.ops.add_norm import add_norm
from electra_fast.ops.attention import attention
from electra_fast.ops.attention_qkv import attention_qkv
from electra_fast.ops.bias_gelu import bias_gelu
from electra_fast.ops.embed import embed
from electra_fast.ops.linear import linear
from electra_fast.ops.mask_tokens import mask_tokens
from electra_fast.ops.mlm_head import mlm_head
from electra_fast.ops.replace_tokens import replace_tokens
from electra_fast.ops.rtd_loss import rtd_loss


class Ops(NamedTuple):
    """The ops as one value: a model is handed its implementation, as in `Electra(config, ops=REFERENCE)`."""

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


FUSED = Ops(
    mask_tokens,
    embed,
    linear,
    attention,
    attention_qkv,
    add_norm,
    bias_gelu,
    mlm_head,
    replace_tokens,
    rtd_loss,
)
REFERENCE = Ops(*(getattr(reference, name) for name in Ops._fields))
_flops.install()

__all__ = ["FUSED", "REFERENCE", "Ops", "SlowPathWarning", *Ops._fields]
