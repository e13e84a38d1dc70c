"""Replaced-token-detection loss and its confusion counts (Clark et al. 2020, L_Disc)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._binary_cross_entropy import (
    BLOCK_T,
    counted,
    gradient,
    load_labels,
    mean_and_counts,
    store_sums,
)
from electra_fast.kernels._common import cdiv, refuse_float64
from electra_fast.kernels._launch import launch


@triton.jit
def _load(x_ptr, y_ptr, w_ptr, T, BLOCK_T: tl.constexpr):
    """Return (x, replaced, w, offsets, mask) of this program's tokens, each ``[BLOCK_T]``."""
    y, w, offs_t, in_t = load_labels(y_ptr, w_ptr, T, BLOCK_T)
    x = tl.load(x_ptr + offs_t, mask=in_t, other=0.0).to(tl.float32)
    return counted(x, w), y, w, offs_t, in_t


@triton.jit(do_not_specialize=["T"])  # T changes with every packed batch and must not recompile
def _rtd_loss_partials(
    x_ptr,  # [T] logits
    y_ptr,  # [T] uint8, not 0 if the token was replaced
    w_ptr,  # [T] f32, or None for all ones
    partial_ptr,  # [5, blocks] f64 out
    T,
    BLOCK_T: tl.constexpr,
):
    x, y, w, _, _ = _load(x_ptr, y_ptr, w_ptr, T, BLOCK_T)
    store_sums(partial_ptr, x, y, w)


@triton.jit(do_not_specialize=["T"])
def _rtd_loss_bwd(
    dloss_ptr,  # [] upstream gradient
    counts_ptr,  # [4] f32
    x_ptr,  # [T]
    y_ptr,  # [T]
    w_ptr,  # [T] or None
    dx_ptr,  # [T] out, dtype of x
    T,
    BLOCK_T: tl.constexpr,
):
    x, y, w, offs_t, in_t = _load(x_ptr, y_ptr, w_ptr, T, BLOCK_T)
    dx = gradient(dloss_ptr, counts_ptr, x, y, w)
    tl.store(dx_ptr + offs_t, dx.to(dx_ptr.dtype.element_ty), mask=in_t)


def rtd_loss_fwd(x: Tensor, y: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels on contiguous [T] tensors; return (loss [], counts [4]), both float32."""
    refuse_float64("rtd_loss", "logits", x)
    return mean_and_counts(_rtd_loss_partials, x, y.view(torch.uint8), w)


def rtd_loss_bwd(dloss: Tensor, counts: Tensor, x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
    """Launch the backward kernel; return the gradient of x."""
    T = x.numel()
    dx = torch.empty_like(x)
    if T > 0:
        flags, grid = y.view(torch.uint8), (cdiv(T, BLOCK_T),)
        launch(_rtd_loss_bwd, grid, dloss, counts, x, flags, w, dx, T, BLOCK_T=BLOCK_T, num_warps=4)
    return dx
