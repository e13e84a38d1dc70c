"""Count the products of the ops in `torch.utils.flop_counter.FlopCounterMode`, 2*M*N*K per product.

The count is that of the definition in plain PyTorch. It depends on shapes only: a masked key and a slot of
weight 0 count like any other. Each product counts once. The backward pass of attention counts four, as
PyTorch counts attention with stored scores, although the kernels compute the scores again (PyTorch counts
five for its flash kernels). A packed batch counts the pairs within each sequence, which are read from
`cu_seqlens`. Without values (fake tensors, the meta device) every sequence counts as long as `max_seqlen`, as
in PyTorch.
"""

import importlib.util
import math
import sys
from importlib.abc import MetaPathFinder

import torch
from torch._subclasses.fake_tensor import is_fake

COUNTER = "torch.utils.flop_counter"


def linear_fwd(x, weight, bias, out_val=None) -> int:
    return 2 * x.numel() * weight.shape[0]


def linear_bwd(dy, x, weight, dtype, want_dx, want_dweight, want_dbias, out_val=None) -> int:
    return 2 * x.numel() * weight.shape[0] * (want_dx + want_dweight)


def _attention(q, k, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k) -> int:
    """Return the count of q k^T, for q ``[B, L, H, D]`` or ``[T, H, D]``."""
    if cu_seqlens is None:
        pairs = q.shape[0] * q.shape[1] * k.shape[1]
    elif is_fake(cu_seqlens) or cu_seqlens.is_meta:
        pairs = (cu_seqlens.shape[0] - 1) * max_seqlen * max_seqlen_k
    else:
        keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        pairs = (cu_seqlens.diff().long() * keys.diff()).sum().item()
    return 2 * pairs * math.prod(q.shape[-2:])


def attention_fwd(q, k, v, key_mask, cu_seqlens, max_seqlen, *options, out_val=None) -> int:
    return 2 * _attention(q, k, cu_seqlens, max_seqlen, *options[-2:])


def attention_bwd(do, q, k, v, o, lse, key_mask, cu_seqlens, max_seqlen, *options, out_val=None) -> int:
    return 4 * _attention(q, k, cu_seqlens, max_seqlen, *options[-2:])


def attention_qkv_fwd(qkv, key_mask, cu_seqlens, max_seqlen, *options, out_val=None) -> int:
    q = qkv.select(-3, 0)
    return 2 * _attention(q, q, cu_seqlens, max_seqlen, None, max_seqlen)


def attention_qkv_bwd(do, qkv, o, lse, key_mask, cu_seqlens, max_seqlen, *options, out_val=None) -> int:
    q = qkv.select(-3, 0)
    return 4 * _attention(q, q, cu_seqlens, max_seqlen, None, max_seqlen)


def mlm_head_fwd(x, table, *rest, out_val=None) -> int:
    return 2 * x.numel() * table.shape[0]


def mlm_head_bwd(x, table, *rest, out_val=None) -> int:
    """Count the logits too: in training this operator is the forward and the backward pass."""
    *_, want_dx, want_dtable = rest
    return 2 * x.numel() * table.shape[0] * (1 + want_dx + want_dtable)


FORMULAS = (
    linear_fwd, linear_bwd, attention_fwd, attention_bwd, attention_qkv_fwd, attention_qkv_bwd,
    mlm_head_fwd, mlm_head_bwd,
)  # fmt: skip


def _register(counter) -> None:
    for formula in FORMULAS:
        operator = getattr(torch.ops.electra_fast, formula.__name__)
        counter.register_flop_formula(operator, get_raw=True)(formula)


class _AfterImport(MetaPathFinder):
    """Registers the formulas when PyTorch's counter is imported.

    The counter imports Triton, which takes a second, and which must not happen before `testing.interpret`.
    """

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    """Register the formulas now if PyTorch's counter is imported, else when it will be."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _AfterImport())
