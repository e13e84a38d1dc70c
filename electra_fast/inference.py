"""Inference on a CPU: one operator per encoder layer, with weights that are packed once.

Packed weights are kept in a table beside the modules, so state dicts, copies and pickles do not contain them.
They belong to a fingerprint of the weights (`ops.encoder_layer.fingerprint`), which is computed in each call:
weights that changed are packed again.
"""

import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

from electra_fast.ops.encoder_layer import encoder_layer, fingerprint, pack

# By module and dtype, the fingerprint of the weights and the packed weights.
_PACKED: weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype, tuple[int, list[Tensor]]]]
_PACKED = weakref.WeakKeyDictionary()


class Int8Warning(UserWarning):
    """int8 was requested, and a call in eval mode uses the float weights."""


def why_not(layer: nn.Module, x: Tensor, int8: bool = False) -> str | None:
    """Return why a call of `layer` with x must not use packed weights, None if it can.

    A layer in training frees its packed weights, which will change.
    """
    if layer.training:
        _PACKED.pop(layer, None)
        return "it is in training mode"
    why = _why_not(x)
    if why and int8 and not torch.compiler.is_compiling():
        text = f"electra_fast: int8 was requested, and the float weights are used: {why}"
        warnings.warn(text, Int8Warning, stacklevel=2)
    return why


def _why_not(x: Tensor) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are enabled; call the model under torch.inference_mode()"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is compiled, exported or traced"
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return "the tokens are not a plain tensor on a CPU"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"its dtype is {str(x.dtype).removeprefix('torch.')}"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast is not in bfloat16"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a transformation of torch.func or forward-mode differentiation is active"
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "there are global hooks of modules"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its class's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def run(
    layer: nn.Module,
    parts: Sequence[Sequence[nn.Module]],
    x: Tensor,  # [B, L, W] or [T, W]
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    *,
    heads: int,
    scale: float,
    eps: float,
    int8: bool,
) -> Tensor:
    """Return the output of a layer.

    Args:
        layer: the module whose packed weights these are.
        parts: its modules in the order of `encoder_layer`: qkv, out, LayerNorm, up, down, LayerNorm. Those of
            one group are joined by rows.
        int8: multiply in int8; else in the autocast dtype if enabled, or in that of x.
    """
    dtype = torch.int8 if int8 else x.dtype
    if not int8 and torch.is_autocast_enabled("cpu"):
        dtype = torch.bfloat16
    weights = _packed(layer, parts, dtype)
    return encoder_layer(x.contiguous(), weights, key_mask, cu_seqlens, max_seqlen, heads, scale, eps)


def _packed(layer: nn.Module, parts: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> list[Tensor]:
    modules = [module._parameters for group in parts for module in group]
    mark = fingerprint([parameters[name] for parameters in modules for name in ("weight", "bias")])
    of_layer = _PACKED.get(layer)
    if of_layer is None:
        of_layer = _PACKED[layer] = {}
    found = of_layer.get(dtype)
    if found is None or found[0] != mark:
        tensors = [x for group in parts for x in _pack(group, dtype)]
        found = of_layer[dtype] = (mark, tensors)
    return found[1]


def _pack(group: Sequence[nn.Module], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if isinstance(group[0], nn.LayerNorm):
        return group[0].weight.detach().float(), group[0].bias.detach().float()
    return pack([m.weight for m in group], [m.bias for m in group], dtype)
