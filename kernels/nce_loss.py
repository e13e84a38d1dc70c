"""The loss of noise-contrastive estimation and its confusion counts (Clark et al. 2020b, section 2).

A token of energy E and log-probability log q has the logit E + log q + log_odds, which is computed in
registers in both passes and is stored in neither.
"""

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
def _load(x_ptr, q_ptr, y_ptr, w_ptr, log_odds, T, BLOCK_T: tl.constexpr):
    """Return (logit, noise, w, offsets, mask) of this program's tokens, each ``[BLOCK_T]``."""
    y, w, offs_t, in_t = load_labels(y_ptr, w_ptr, T, BLOCK_T)
    x = tl.load(x_ptr + offs_t, mask=in_t, other=0.0).to(tl.float32)
    q = tl.load(q_ptr + offs_t, mask=in_t, other=0.0)
    return counted(x + q + log_odds, w), y, w, offs_t, in_t


@triton.jit(do_not_specialize=["T"])  # T changes with every packed batch and must not recompile
def _nce_loss_partials(
    x_ptr,  # [T] energies
    q_ptr,  # [T] f32 log-probabilities
    y_ptr,  # [T] uint8, not 0 if the token is noise
    w_ptr,  # [T] f32, or None for all ones
    log_odds,
    partial_ptr,  # [5, blocks] f64 out
    T,
    BLOCK_T: tl.constexpr,
):
    x, y, w, _, _ = _load(x_ptr, q_ptr, y_ptr, w_ptr, log_odds, T, BLOCK_T)
    store_sums(partial_ptr, x, y, w)


@triton.jit(do_not_specialize=["T"])
def _nce_loss_bwd(
    dloss_ptr,  # [] upstream gradient
    counts_ptr,  # [4] f32
    x_ptr,  # [T]
    q_ptr,  # [T]
    y_ptr,  # [T]
    w_ptr,  # [T] or None
    log_odds,
    dx_ptr,  # [T] out, dtype of x
    T,
    BLOCK_T: tl.constexpr,
):
    x, y, w, offs_t, in_t = _load(x_ptr, q_ptr, y_ptr, w_ptr, log_odds, T, BLOCK_T)
    dx = gradient(dloss_ptr, counts_ptr, x, y, w)
    tl.store(dx_ptr + offs_t, dx.to(dx_ptr.dtype.element_ty), mask=in_t)


def nce_loss_fwd(x: Tensor, q: Tensor, y: Tensor, w: Tensor | None, log_odds: float) -> tuple[Tensor, Tensor]:
    """Launch the forward kernels on contiguous [T] tensors; return (loss [], counts [4]), both float32."""
    refuse_float64("nce_loss", "energies", x)
    return mean_and_counts(_nce_loss_partials, x, q, y.view(torch.uint8), w, log_odds)


def nce_loss_bwd(
    dloss: Tensor, counts: Tensor, x: Tensor, q: Tensor, y: Tensor, w: Tensor | None, log_odds: float
) -> Tensor:
    """Launch the backward kernel; return the gradient of x."""
    T = x.numel()
    dx = torch.empty_like(x)
    if T > 0:
        inputs, grid = (x, q, y.view(torch.uint8), w, log_odds), (cdiv(T, BLOCK_T),)
        launch(_nce_loss_bwd, grid, dloss, counts, *inputs, dx, T, BLOCK_T=BLOCK_T, num_warps=4)
    return dx
