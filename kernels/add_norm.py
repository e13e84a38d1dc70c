"""Dropout, residual and LayerNorm (Devlin et al. 2019, post-LayerNorm): the end of both halves of a layer.

    z = residual + drop(x)      h = (z - mean) rstd      y = w h + b

Backward makes z again from x and residual. With g = w dy

    dz = rstd (g - avg(g) - h avg(g h))     dx = drop(dz)     dw = sum of h dy     db = sum of dy

Each pass reads every row once and keeps it in registers, in float32. Nothing but mean and rstd goes from one
pass to the other: dropout's mask is an integer function of its place. `_rows` says how rows lie over threads
and how the sums over them are made.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import dropout_arguments, keep, refuse_float64
from electra_fast.kernels._rows import column_sums, fold, programs, tile


@triton.jit
def _sum(x_ptr, residual_ptr, rng_ptr, t, at, inside, threshold, scale, site, BLOCK_W: tl.constexpr):
    """Return z of the rows t, in float32 and 0 outside, and what dropout keeps of x."""
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    kept = inside
    if rng_ptr is not None:
        kept = keep(rng_ptr, site, t, 0, threshold, BLOCK_W)
        z = tl.where(kept, z * scale, 0.0)  # what is dropped may be NaN
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return z, kept


@triton.jit(do_not_specialize=["T", "threshold", "site"])  # neither a batch's size nor a site recompiles
def _add_norm_fwd(
    x_ptr,  # [T, W]
    residual_ptr,  # [T, W], or None for 0
    weight_ptr,  # [W]
    bias_ptr,  # [W]
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    y_ptr,  # [T, W] out
    mean_ptr,  # [T] f32 out
    rstd_ptr,  # [T] f32 out
    T,
    eps,
    threshold,
    scale,
    site,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    w = tl.arange(0, BLOCK_W)
    in_w = (w < W)[None, :]
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = t < T
    at = t.to(tl.int64)[:, None] * W + w[None, :]
    inside = in_t[:, None] & in_w
    z, _ = _sum(x_ptr, residual_ptr, rng_ptr, t, at, inside, threshold, scale, site, BLOCK_W)

    mean = tl.sum(z, axis=1) / W
    d = tl.where(in_w, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(d * d, axis=1) / W + eps)
    weight = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + w, mask=w < W, other=0.0).to(tl.float32)[None, :]
    y = d * rstd[:, None] * weight + bias

    tl.store(mean_ptr + t, mean, mask=in_t)
    tl.store(rstd_ptr + t, rstd, mask=in_t)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "threshold", "site"])
def _add_norm_bwd(
    dy_ptr,  # [T, W]
    x_ptr,  # [T, W]
    residual_ptr,  # [T, W], or None for 0
    weight_ptr,  # [W]
    mean_ptr,  # [T] f32
    rstd_ptr,  # [T] f32
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    dx_ptr,  # [T, W] out
    dz_ptr,  # [T, W] out, or None where the residual has no gradient of its own
    partial_ptr,  # [2, programs, W] f32 out: sums of h dy and dy
    T,
    threshold,
    scale,
    site,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    w = tl.arange(0, BLOCK_W)
    in_w = (w < W)[None, :]
    weight = tl.load(weight_ptr + w, mask=w < W, other=0.0).to(tl.float32)[None, :]
    sum_dw = tl.zeros((SIDE, BLOCK_W), tl.float32)
    sum_db = tl.zeros((SIDE, BLOCK_W), tl.float32)
    for first in range(program * BLOCK_T, T, programs * BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        in_t = t < T
        at = t.to(tl.int64)[:, None] * W + w[None, :]
        inside = in_t[:, None] & in_w
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z, kept = _sum(x_ptr, residual_ptr, rng_ptr, t, at, inside, threshold, scale, site, BLOCK_W)
        mean = tl.load(mean_ptr + t, mask=in_t, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + t, mask=in_t, other=0.0)[:, None]  # 0: what is no row adds nothing

        h = (z - mean) * rstd
        g = weight * dy
        avg_g, avg_gh = tl.split(tl.sum(tl.join(g, g * h), axis=1) / W)  # one exchange between warps for both
        dz = rstd * (g - avg_g[:, None] - h * avg_gh[:, None])
        sum_dw += fold(h * dy, SIDE)
        sum_db += fold(dy, SIDE)

        dx = dz
        if rng_ptr is not None:
            dx = tl.where(kept, dz * scale, 0.0)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dz_ptr is not None:
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)

    out = partial_ptr + program * W + w
    tl.store(out, tl.sum(sum_dw, axis=0), mask=w < W)
    tl.store(out + programs * W, tl.sum(sum_db, axis=0), mask=w < W)


def add_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    rng: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel on contiguous tensors; return (y [.., W], mean [..], rstd [..])."""
    refuse_float64("add_norm", "x", x)
    T, W = math.prod(x.shape[:-1]), x.shape[-1]
    shape = tile(W, widest=W)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if T > 0:
        _add_norm_fwd[(triton.cdiv(T, shape["BLOCK_T"]),)](
            x, residual, weight, bias, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd, T=T, eps=eps,
            **dropout_arguments(dropout, rng, stream), **shape,
        )  # fmt: skip
    return y, mean, rstd


def add_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    rng: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels; return the gradients of x, residual, weight and bias.

    That of the residual is empty where it is that of x.
    """
    T, W = math.prod(x.shape[:-1]), x.shape[-1]
    shape = tile(W, widest=W)
    n = programs(T, shape, x.device)
    own = residual is not None and dropout > 0
    dx, dresidual = x.new_empty(x.shape), x.new_empty(x.shape if own else 0)
    partial = mean.new_empty(2, n, W)
    if T > 0:
        _add_norm_bwd[(n,)](
            dy, x, residual, weight, mean, rstd, dx_ptr=dx, dz_ptr=dresidual if own else None,
            partial_ptr=partial, T=T, **dropout_arguments(dropout, rng, stream), **shape,
        )  # fmt: skip
    return dx, dresidual, *column_sums(partial, weight)
