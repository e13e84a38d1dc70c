"""`attention` of the three slices of one tensor: the same kernels, which read and write by strides."""

from torch import Tensor

from electra_fast.kernels.attention import attention_fwd, attention_gradients


def attention_qkv_fwd(qkv: Tensor, *site) -> tuple[Tensor, Tensor]:
    """Return (o, lse) as `attention_fwd`."""
    return attention_fwd(*qkv.unbind(-3), *site)


def attention_qkv_bwd(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, *site) -> Tensor:
    """Return the gradient of qkv, of which the kernels write the three slices."""
    dqkv = qkv.new_empty(qkv.shape)
    attention_gradients(dqkv.unbind(-3), do, *qkv.unbind(-3), o, lse, *site)
    return dqkv
