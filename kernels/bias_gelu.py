"""Bias and GELU, the erf form (Hendrycks & Gimpel 2016): between the two products of a feed-forward.

    z = x + bias      y = z Phi(z)      dx = dy (Phi(z) + z phi(z))      dbias = sum of dx over rows

Here phi is the normal density and Phi its integral. For a = |z| the logarithm of Phi(-a) is nearly a
parabola, so a polynomial P of degree 8 approximates it: Phi(-a) = 2^P(a), one exponential and no division,
and Phi(a) is 1 - Phi(-a). In float32 the error of Phi and of a Phi(-a) is at most 4e-8 for every z, half a
unit in the last place of 1. The relative error of Phi(z) is 2e-6 at z = -3, 2e-5 at -4 and 6e-3 at -5, where
1 + erf has one digit left. P falls without end, so a large |z| needs no case of its own.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import LOG2E, cdiv, next_power_of_2, refuse_float64, rounded
from electra_fast.kernels._launch import launch
from electra_fast.kernels._rows import column_sums, fold, programs, side, tile_shape

BLOCK, WARPS = 1024, 4  # columns and warps of a tile
FORWARD, BACKWARD = 4, 2  # rows per thread
REGISTERS = 80  # per thread of backward: 24 warps fit a multiprocessor

# log2 Phi(-a), from a^8 down: the smallest possible largest error of a Phi(-a), and of Phi(-a) for a < 1, on
# [0, 8], 1.4e-8 (Lawson's reweighted least squares on 2000 Chebyshev nodes, in float64).
LOG2_PHI = tl.constexpr(
    (
        -2.275866171e-06,
        3.296794503e-05,
        -1.572784254e-04,
        -2.024798562e-04,
        7.142783114e-03,
        -5.254643707e-02,
        -4.591930569e-01,
        -1.151106941e00,
        -1.0,
    )
)
LOG2_ROOT_2PI = tl.constexpr(math.log2(2 * math.pi) / 2)


@triton.jit
def normal_cdf(z):
    """Return Phi(z)."""
    a = tl.abs(z)
    p = a * LOG2_PHI[0] + LOG2_PHI[1]
    for i in tl.static_range(2, 9):
        p = p * a + LOG2_PHI[i]
    below = tl.exp2(p)
    return tl.where(z < 0, below, 1.0 - below)


@triton.jit
def gelu_slope(z):
    """Return the derivative of gelu(z), Phi(z) + z phi(z)."""
    density = tl.exp2(z * z * (-0.5 * LOG2E) - LOG2_ROOT_2PI)
    return normal_cdf(z) + z * density


@triton.jit(do_not_specialize=["T"])  # T changes with every packed batch and must not recompile
def _bias_gelu_fwd(
    x_ptr,  # [T, W]
    bias_ptr,  # [W]
    y_ptr,  # [T, W] out
    T,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = (offs_t < T)[:, None] & (offs_w < W)[None, :]
    offs = offs_t.to(tl.int64)[:, None] * W + offs_w[None, :]
    bias = tl.load(bias_ptr + offs_w, mask=offs_w < W, other=0.0).to(tl.float32)[None, :]
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias  # [BLOCK_T, BLOCK_W]
    tl.store(y_ptr + offs, rounded(z * normal_cdf(z), y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _bias_gelu_bwd(
    dy_ptr,  # [T, W]
    x_ptr,  # [T, W]
    bias_ptr,  # [W]
    dx_ptr,  # [T, W] out
    partial_ptr,  # [1, programs, W] f32 out: sums of dx
    T,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    in_w = offs_w < W
    bias = tl.load(bias_ptr + offs_w, mask=in_w, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((SIDE, BLOCK_W), tl.float32)
    for t0 in range(program * BLOCK_T, T, programs * BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        mask = (offs_t < T)[:, None] & in_w[None, :]
        offs = offs_t.to(tl.int64)[:, None] * W + offs_w[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_W]
        z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias
        dx = dy * gelu_slope(z)
        sums += fold(dx, SIDE)
        tl.store(dx_ptr + offs, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program * W + offs_w, tl.sum(sums, axis=0), mask=in_w)


@functools.cache
def _tile_shape(W: int, rows: int) -> dict[str, int]:
    return tile_shape(W, min(next_power_of_2(max(W, 32)), BLOCK), rows, WARPS)


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """Launch the forward kernel on a contiguous x [.., W]."""
    refuse_float64("bias_gelu", "x", x)
    T, W = math.prod(x.shape[:-1]), x.shape[-1]
    shape = _tile_shape(W, FORWARD)
    y = torch.empty_like(x)
    if x.numel() > 0:
        grid = (cdiv(T, shape["BLOCK_T"]), cdiv(W, shape["BLOCK_W"]))
        launch(_bias_gelu_fwd, grid, x, bias, y, T, **shape)
    return y


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels; return the gradients of x and bias."""
    T, W = math.prod(x.shape[:-1]), x.shape[-1]
    shape = _tile_shape(W, BACKWARD)
    blocks = max(cdiv(W, shape["BLOCK_W"]), 1)
    n = programs(T, shape, REGISTERS, x.device, blocks)
    dx, partial = torch.empty_like(x), x.new_empty(1, n, W, dtype=torch.float32)
    if x.numel() > 0:
        launch(
            _bias_gelu_bwd, (n, blocks), dy, x, bias, dx, partial, T, SIDE=side(shape["BLOCK_W"], WARPS),
            maxnreg=REGISTERS, **shape,
        )  # fmt: skip
    return dx, *column_sums(partial, bias)
