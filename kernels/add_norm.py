"""Dropout, residual and LayerNorm (Devlin et al. 2019, post-LayerNorm): the end of both halves of a layer.

    z = residual + drop(x)      h = (z - mean) rstd      y = w h + b

The mean is corrected once (`_rows.row_means`), so that the h of a constant row is 0, however its sum rounds.

Backward computes z again from x and residual. With g = w dy

    dz = rstd (g - avg(g) - h avg(g h))     dx = drop(dz)     dw = sum of h dy     db = sum of dy

Each pass reads every row once and keeps it in registers, in float32. Only mean and rstd are saved for
backward: dropout's mask is an integer function of row and column. `_rows` explains tiles and sums over rows.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import (
    architecture,
    cdiv,
    dropout_arguments,
    keep,
    next_power_of_2,
    refuse_float64,
    rounded,
)
from electra_fast.kernels._launch import launch
from electra_fast.kernels._rows import (
    column_sums,
    fold,
    load_rows,
    load_shared_row,
    programs,
    row_means,
    row_offsets,
    row_sums,
    side,
    tile_shape,
)

FORWARD, BACKWARD = 4, 2  # rows per thread if a row is one block; half of that if it is three


@triton.jit
def _residual_sum(x_ptr, residual_ptr, offs_t, offs, mask, dropout, BLOCK_W: tl.constexpr):
    """Return z and the mask of the elements that dropout keeps."""
    rng_ptr, dropout_stream, threshold, keep_scale = dropout
    x, z, kept = load_rows(x_ptr, offs, mask), (), ()
    if residual_ptr is not None:
        residual = load_rows(residual_ptr, offs, mask)
    for i in tl.static_range(len(offs)):
        z_i, kept_i = x[i], mask[i]
        if rng_ptr is not None:
            kept_i = keep(rng_ptr, dropout_stream, offs_t, i * BLOCK_W, threshold, BLOCK_W)
            z_i = tl.where(kept_i, z_i * keep_scale, 0.0)  # a dropped element may be NaN
        if residual_ptr is not None:
            z_i += residual[i]
        z, kept = z + (z_i,), kept + (kept_i,)
    return z, kept


@triton.jit(do_not_specialize=["T", "threshold", "dropout_stream"])  # their values must not recompile
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
    keep_scale,
    dropout_stream,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = offs_t < T
    offs, mask = row_offsets(offs_t, T, W, BLOCK_W)
    dropout = (rng_ptr, dropout_stream, threshold, keep_scale)
    z, _ = _residual_sum(x_ptr, residual_ptr, offs_t, offs, mask, dropout, BLOCK_W)

    mean = row_means(z, mask, 1 / W)  # [BLOCK_T, 1]
    weight = load_shared_row(weight_ptr, W, BLOCK_W)
    bias = load_shared_row(bias_ptr, W, BLOCK_W)
    d, dd = (), ()
    for i in tl.static_range(len(z)):
        d_i = tl.where(mask[i], z[i] - mean, 0.0)
        d, dd = d + (d_i,), dd + (d_i * d_i,)
    rstd = tl.rsqrt(row_sums(dd) / W + eps)  # [BLOCK_T]

    for i in tl.static_range(len(d)):
        y = d[i] * rstd[:, None] * weight[i] + bias[i]
        tl.store(y_ptr + offs[i], rounded(y, y_ptr.dtype.element_ty), mask=mask[i])
    tl.store(mean_ptr + offs_t[:, None], mean, mask=in_t[:, None])
    tl.store(rstd_ptr + offs_t, rstd, mask=in_t)


@triton.jit(do_not_specialize=["T", "threshold", "dropout_stream"])
def _add_norm_bwd(
    dy_ptr,  # [T, W]
    x_ptr,  # [T, W]
    residual_ptr,  # [T, W], or None for 0
    weight_ptr,  # [W]
    mean_ptr,  # [T] f32
    rstd_ptr,  # [T] f32
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    dx_ptr,  # [T, W] out
    dz_ptr,  # [T, W] out, or None if the residual's gradient is dx
    partial_ptr,  # [2, programs, W] f32 out: sums of h dy and dy
    T,
    threshold,
    keep_scale,
    dropout_stream,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    dropout = (rng_ptr, dropout_stream, threshold, keep_scale)
    weight = load_shared_row(weight_ptr, W, BLOCK_W)
    dw, db = (), ()  # blocks [SIDE, BLOCK_W]
    for _ in tl.static_range(len(weight)):
        dw = dw + (tl.zeros((SIDE, BLOCK_W), tl.float32),)
        db = db + (tl.zeros((SIDE, BLOCK_W), tl.float32),)
    for t0 in range(program * BLOCK_T, T, programs * BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        offs, mask = row_offsets(offs_t, T, W, BLOCK_W)
        dy = load_rows(dy_ptr, offs, mask)
        mean = tl.load(mean_ptr + offs_t, mask=offs_t < T, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_t, mask=offs_t < T, other=0.0)[:, None]  # 0: rows beyond T add nothing
        z, kept = _residual_sum(x_ptr, residual_ptr, offs_t, offs, mask, dropout, BLOCK_W)

        h, g, gh = (), (), ()
        next_dw, next_db = (), ()  # a loop can replace a tuple that it carries, but not one of its items
        for i in tl.static_range(len(z)):
            h_i, g_i = (z[i] - mean) * rstd, weight[i] * dy[i]
            h, g, gh = h + (h_i,), g + (g_i,), gh + (g_i * h_i,)
            next_dw = next_dw + (dw[i] + fold(h_i * dy[i], SIDE),)
            next_db = next_db + (db[i] + fold(dy[i], SIDE),)
        dw, db = next_dw, next_db
        avg_g = row_sums(g)[:, None] / W
        avg_gh = row_sums(gh)[:, None] / W

        for i in tl.static_range(len(z)):
            dz = rstd * (g[i] - avg_g - h[i] * avg_gh)
            if dz_ptr is not None:
                tl.store(dz_ptr + offs[i], rounded(dz, dz_ptr.dtype.element_ty), mask=mask[i])
            dx = dz
            if rng_ptr is not None:
                dx = tl.where(kept[i], dz * keep_scale, 0.0)
            tl.store(dx_ptr + offs[i], rounded(dx, dx_ptr.dtype.element_ty), mask=mask[i])

    for i in tl.static_range(len(weight)):
        offs_w = i * BLOCK_W + tl.arange(0, BLOCK_W)
        out_ptr = partial_ptr + program * W + offs_w
        tl.store(out_ptr, tl.sum(dw[i], axis=0), mask=offs_w < W)
        tl.store(out_ptr + programs * W, tl.sum(db[i], axis=0), mask=offs_w < W)


@functools.cache
def _tile_shape(W: int, rows: int) -> dict[str, int]:
    """Return the launch shape: a row in one block, or in three if a quarter of one block would be empty."""
    whole = next_power_of_2(max(W, 32))
    if whole >= 128 and 4 * W <= 3 * whole:
        return tile_shape(W, whole // 4, rows // 2, max(whole // 1024, 1))
    return tile_shape(W, whole, rows, min(max(whole // 256, 4), 32))


def _registers(x: Tensor, shape: dict[str, int]) -> int:
    """Return backward's registers per thread: 16 warps fit a multiprocessor, or 12 or 8 with three blocks."""
    if shape["BLOCK_W"] >= shape["W"]:
        return 128
    return 168 if x.element_size() == 2 and architecture() in (90, 100) else 200  # others would spill at 168


def add_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, *dropout
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel on contiguous tensors; return (y [.., W], mean [..], rstd [..]).

    `dropout` is what `dropout_arguments` accepts.
    """
    refuse_float64("add_norm", "x", x)
    T, W = math.prod(x.shape[:-1]), x.shape[-1]
    shape = _tile_shape(W, FORWARD)
    y, mean = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel() > 0:
        rng, *drop = dropout_arguments(*dropout)
        grid = (cdiv(T, shape["BLOCK_T"]),)
        launch(_add_norm_fwd, grid, x, residual, weight, bias, rng, y, mean, rstd, T, eps, *drop, **shape)
    return y, mean, rstd


def add_norm_bwd(
    dy: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, *dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels; return the gradients of x, residual, weight and bias.

    The residual's is empty if it equals that of x.
    """
    T, W = math.prod(x.shape[:-1]), x.shape[-1]
    shape = _tile_shape(W, BACKWARD)
    registers = _registers(x, shape)
    n = programs(T, shape, registers, x.device)
    rng, *drop = dropout_arguments(*dropout)
    own = residual is not None and rng is not None
    dx, dresidual = torch.empty_like(x), torch.empty_like(x) if own else x.new_empty(0)
    partial = mean.new_empty(2, n, W)
    if x.numel() > 0:
        launch(
            _add_norm_bwd, (n,), dy, x, residual, weight, mean, rstd, rng, dx, dresidual if own else None,
            partial, T, *drop, SIDE=side(shape["BLOCK_W"], shape["num_warps"]), maxnreg=registers, **shape,
        )  # fmt: skip
    return dx, dresidual, *column_sums(partial, weight)
