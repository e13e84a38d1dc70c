"""Inference on a CPU: one operator per encoder layer, with weights that are packed once.

The packed weights of a layer are kept in a table and not in the module, so state dicts, copies and pickles do
not contain them. They belong to a fingerprint of the weights (`ops.encoder_layer.fingerprint`), computed in
each call: weights that changed are packed again. A layer in training frees its packed weights.

A call may use them if it would run the forward passes of the layer's modules and nothing else.
`Parts.why_not` looks for other modules and hooks, `why_not` at the state of PyTorch. Both run in each call of
each layer, so they read dictionaries instead of attributes, which is several times as fast.
"""

import warnings
import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from electra_fast.ops.encoder_layer import encoder_layer, fingerprint, pack

PARAMETERS = {Tensor, nn.Parameter}
# Hooks of this module remain after the first call that asked for hidden states. On the modules that the
# operator replaces they only record attention weights, which no fused attention has.
RECORDERS = "transformers.utils.output_capturing"


class Int8Warning(UserWarning):
    """int8 was requested, and a call in eval mode uses the float weights."""


class Parts(NamedTuple):
    """The modules of an encoder layer."""

    inner: tuple[nn.Module, ...]  # modules that only call the others
    linears: tuple[tuple[nn.Module, ...], ...]  # qkv, out, up, down; those of one group are joined by rows
    norms: tuple[nn.Module, nn.Module]

    def leaves(self) -> list[nn.Module]:
        return [*(m for group in self.linears for m in group), *self.norms]

    def why_not(
        self, linear: type[nn.Module] = nn.Linear, norm: type[nn.Module] = nn.LayerNorm
    ) -> str | None:
        """Return why the operator cannot replace the calls of these modules, None if it can."""
        leaves = self.leaves()
        for module in (*self.inner, *leaves):
            state = module.__dict__
            hooks = state["_forward_hooks"]
            if hooks and any(hook.__module__ != RECORDERS for hook in hooks.values()):
                return f"{type(module).__name__} has hooks"
            if state["_forward_pre_hooks"] or "forward" in state:
                return f"{type(module).__name__} has hooks"
        for module in leaves:
            if type(module) is not linear and type(module) is not norm:
                return f"a part is {type(module).__module__}.{type(module).__name__}"
        if not PARAMETERS.issuperset(map(type, self.parameters())):
            return "a parameter is not a plain tensor"
        first, second = self.norms
        return None if first.__dict__["eps"] == second.__dict__["eps"] else "its LayerNorms differ in eps"

    def parameters(self) -> list[Tensor]:
        return [x for module in self.leaves() for x in module._parameters.values()]

    def pack(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the weights for `encoder_layer`."""
        qkv, out, up, down = (
            pack([m.weight for m in group], [m.bias for m in group], dtype) for group in self.linears
        )
        first, second = ((m.weight.detach().float(), m.bias.detach().float()) for m in self.norms)
        return [*qkv, *out, *first, *up, *down, *second]


# By layer and dtype, the fingerprint of the weights and the packed weights.
_PACKED: weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype, tuple[int, list[Tensor]]]]
_PACKED = weakref.WeakKeyDictionary()


def _packed(layer: nn.Module, parts: Parts, dtype: torch.dtype) -> list[Tensor]:
    mark = fingerprint(parts.parameters())
    by_dtype = _PACKED.get(layer)
    if by_dtype is None:
        by_dtype = _PACKED[layer] = {}
    found = by_dtype.get(dtype)
    if found is None or found[0] != mark:
        found = by_dtype[dtype] = (mark, parts.pack(dtype))
    return found[1]


def check_int8(layer: nn.Module, int8: bool, why: str) -> None:
    """Warn that a call in eval mode does not multiply in int8 as requested."""
    if int8 and not layer.training and not torch.compiler.is_compiling():
        text = f"electra_fast: int8 was requested, and the float weights are used: {why}"
        warnings.warn(text, Int8Warning, stacklevel=3)


def why_not(layer: nn.Module, x: Tensor) -> str | None:
    """Return why a call of `layer` with x must not use packed weights, None if it can.

    A layer in training frees its packed weights, which will change.
    """
    if layer.training:
        _PACKED.pop(layer, None)
        return "it is in training mode"
    if torch.is_grad_enabled():
        return "gradients are enabled; call the model under torch.inference_mode()"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is compiled, exported or traced"
    if type(x) not in PARAMETERS or not x.is_cpu:
        return "the tokens are not a plain tensor on a CPU"
    if x.dtype != torch.float32 and x.dtype != torch.bfloat16:
        return f"its dtype is {str(x.dtype).removeprefix('torch.')}"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast is not in bfloat16"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a mode watches the operators, such as a counter of FLOPs"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a transformation of torch.func or forward-mode differentiation is active"
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "there are global hooks of modules"
    return None


def run(
    layer: nn.Module,
    parts: Parts,
    x: Tensor,  # [B, L, W] or [T, W]
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    heads: int,
    scale: float,
    int8: bool,
) -> Tensor:
    """Return the output of a layer, computed in int8, in the autocast dtype if enabled, or in that of x."""
    dtype = x.dtype
    if int8:
        dtype = torch.int8
    elif torch.is_autocast_enabled("cpu"):
        dtype = torch.bfloat16
    weights, eps = _packed(layer, parts, dtype), parts.norms[0].__dict__["eps"]
    return encoder_layer(x.contiguous(), weights, key_mask, cu_seqlens, max_seqlen, heads, scale, eps)
