"""A linear layer of a model of transformers, as one operator per direction.

A layer that is not a plain `nn.Linear` is called as a module, so a LoRA adapter or a quantised layer in its
place still works.
"""

import torch
from torch import Tensor, nn

from electra_fast import ops
from electra_fast.hf.fused import has_hooks

PLAIN = {Tensor, nn.Parameter, type(None)}  # types of the parameters of a linear layer that an op can read


def dense(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x); a plain `nn.Linear` needs one operator per direction instead of a dozen.

    torch.compile gets the module, whose product it may fuse with what follows.
    """
    plain = type(layer) is nn.Linear and not has_hooks(layer) and not torch.compiler.is_compiling()
    if not plain or not PLAIN.issuperset(map(type, layer._parameters.values())):
        return layer(x)
    return ops.linear(x, **layer._parameters)


def dense_gelu(x: Tensor, dense: nn.Linear) -> Tensor:
    return ops.bias_gelu(ops.linear(x, dense.weight), dense.bias)
