"""`attention` of the three slices of one tensor: the same kernels, which read and write by strides."""

from torch import Tensor

from electra_fast.kernels.attention import attention_fwd, attention_gradients, contiguous_like


def attention_qkv_fwd(qkv: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Return (o, lse) as `attention_fwd`."""
    return attention_fwd(*qkv.unbind(-3), *options)


def attention_qkv_bwd(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, *options) -> Tensor:
    """Return the gradient of qkv; the kernels write its three slices."""
    dqkv = contiguous_like(qkv)
    attention_gradients(dqkv.unbind(-3), do, *qkv.unbind(-3), o, lse, *options)
    return dqkv
