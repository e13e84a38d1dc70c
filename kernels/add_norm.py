"""Dropout, residual and LayerNorm (Devlin et al. 2019, post-LayerNorm): the end of both halves of a layer.

    z = residual + drop(x)      h = (z - mean) rstd      y = w h + b

The mean is refined once (`_rows.average`), so that the h of a constant row is 0 whatever a sum rounds.

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

from electra_fast.kernels._common import architecture, dropout_arguments, keep, refuse_float64, rounded
from electra_fast.kernels._rows import (
    average,
    column_sums,
    fold,
    load,
    load_row,
    places,
    programs,
    side,
    tile,
    total,
)

FORWARD, BACKWARD = 4, 2  # rows of a thread where a row is one block; half of them where it is three


@triton.jit
def _sum(x_ptr, residual_ptr, rng_ptr, t, at, inside, threshold, scale, site, BLOCK_W: tl.constexpr):
    """Return the blocks of z, and of the mask by which dropout keeps x."""
    x, z, kept = load(x_ptr, at, inside), (), ()
    if residual_ptr is not None:
        residual = load(residual_ptr, at, inside)
    for i in tl.static_range(len(at)):
        z_i, kept_i = x[i], inside[i]
        if rng_ptr is not None:
            kept_i = keep(rng_ptr, site, t, i * BLOCK_W, threshold, BLOCK_W)
            z_i = tl.where(kept_i, z_i * scale, 0.0)  # what is dropped may be NaN
        if residual_ptr is not None:
            z_i += residual[i]
        z, kept = z + (z_i,), kept + (kept_i,)
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
    BLOCK_W: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = t < T
    at, inside = places(t, T, W, BLOCK_W)
    z, _ = _sum(x_ptr, residual_ptr, rng_ptr, t, at, inside, threshold, scale, site, BLOCK_W)

    mean = average(z, inside, 1 / W)
    weight, bias = load_row(weight_ptr, W, BLOCK_W), load_row(bias_ptr, W, BLOCK_W)
    d, dd = (), ()
    for i in tl.static_range(len(z)):
        d_i = tl.where(inside[i], z[i] - mean, 0.0)
        d, dd = d + (d_i,), dd + (d_i * d_i,)
    rstd = tl.rsqrt(total(dd) / W + eps)

    for i in tl.static_range(len(d)):
        y = d[i] * rstd[:, None] * weight[i] + bias[i]
        tl.store(y_ptr + at[i], rounded(y, y_ptr.dtype.element_ty), mask=inside[i])
    tl.store(mean_ptr + t[:, None], mean, mask=in_t[:, None])
    tl.store(rstd_ptr + t, rstd, mask=in_t)


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
    weight = load_row(weight_ptr, W, BLOCK_W)
    sum_dw, sum_db = (), ()
    for _ in tl.static_range(len(weight)):
        sum_dw = sum_dw + (tl.zeros((SIDE, BLOCK_W), tl.float32),)
        sum_db = sum_db + (tl.zeros((SIDE, BLOCK_W), tl.float32),)
    for first in range(program * BLOCK_T, T, programs * BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        at, inside = places(t, T, W, BLOCK_W)
        dy = load(dy_ptr, at, inside)
        mean = tl.load(mean_ptr + t, mask=t < T, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + t, mask=t < T, other=0.0)[:, None]  # 0: what is no row adds nothing
        z, kept = _sum(x_ptr, residual_ptr, rng_ptr, t, at, inside, threshold, scale, site, BLOCK_W)

        h, g, gh, more_dw, more_db = (), (), (), (), ()  # a tuple that a loop carries is replaced as a whole
        for i in tl.static_range(len(z)):
            h_i, g_i = (z[i] - mean) * rstd, weight[i] * dy[i]
            h, g, gh = h + (h_i,), g + (g_i,), gh + (g_i * h_i,)
            more_dw = more_dw + (sum_dw[i] + fold(h_i * dy[i], SIDE),)
            more_db = more_db + (sum_db[i] + fold(dy[i], SIDE),)
        sum_dw, sum_db = more_dw, more_db
        avg_g, avg_gh = total(g)[:, None] / W, total(gh)[:, None] / W

        for i in tl.static_range(len(z)):
            dz = rstd * (g[i] - avg_g - h[i] * avg_gh)
            if dz_ptr is not None:
                tl.store(dz_ptr + at[i], rounded(dz, dz_ptr.dtype.element_ty), mask=inside[i])
            dx = dz
            if rng_ptr is not None:
                dx = tl.where(kept[i], dz * scale, 0.0)
            tl.store(dx_ptr + at[i], rounded(dx, dx_ptr.dtype.element_ty), mask=inside[i])

    for i in tl.static_range(len(weight)):
        w = i * BLOCK_W + tl.arange(0, BLOCK_W)
        out = partial_ptr + program * W + w
        tl.store(out, tl.sum(sum_dw[i], axis=0), mask=w < W)
        tl.store(out + programs * W, tl.sum(sum_db[i], axis=0), mask=w < W)


def _tile(W: int, rows: int) -> dict[str, int]:
    """Return the launch shape: a row in one block, or in three where a quarter of one would be empty."""
    whole = triton.next_power_of_2(max(W, 32))
    if whole >= 128 and 4 * W <= 3 * whole:
        return tile(W, whole // 4, rows // 2, max(whole // 1024, 1))
    return tile(W, whole, rows, min(max(whole // 256, 4), 32))


def _registers(x: Tensor, shape: dict[str, int]) -> int:
    """Return what a thread of backward may take: a multiprocessor holds 16 warps, of three blocks 12 or 8."""
    if shape["BLOCK_W"] >= shape["W"]:
        return 128
    return 168 if x.element_size() == 2 and architecture() in (90, 100) else 200  # others would spill at 168


def add_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, *site
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel on contiguous tensors; return (y [.., W], mean [..], rstd [..])."""
    refuse_float64("add_norm", "x", x)
    T, W = math.prod(x.shape[:-1]), x.shape[-1]
    shape = _tile(W, FORWARD)
    y = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if x.numel() > 0:
        _add_norm_fwd[(triton.cdiv(T, shape["BLOCK_T"]),)](
            x, residual, weight, bias, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd, T=T, eps=eps,
            **dropout_arguments(*site), **shape,
        )  # fmt: skip
    return y, mean, rstd


def add_norm_bwd(
    dy: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, *site
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels; return the gradients of x, residual, weight and bias.

    That of the residual is empty where it is that of x.
    """
    T, W = math.prod(x.shape[:-1]), x.shape[-1]
    shape, drop = _tile(W, BACKWARD), dropout_arguments(*site)
    registers = _registers(x, shape)
    n = programs(T, shape, registers, x.device)
    own = residual is not None and drop["rng_ptr"] is not None
    dx, dresidual = x.new_empty(x.shape), x.new_empty(x.shape if own else 0)
    partial = mean.new_empty(2, n, W)
    if x.numel() > 0:
        _add_norm_bwd[(n,)](
            dy, x, residual, weight, mean, rstd, dx_ptr=dx, dz_ptr=dresidual if own else None,
            partial_ptr=partial, T=T, SIDE=side(shape["BLOCK_W"], shape["num_warps"]), maxnreg=registers,
            **drop, **shape,
        )  # fmt: skip
    return dx, dresidual, *column_sums(partial, weight)
