"""The first layer of a feed-forward network in one kernel: product, bias and GELU, the erf form. No op uses
it yet: it is a candidate to replace `linear` and `bias_gelu` (docs/kernels/linear_gelu.md).

    h = x W^T      z = h + bias      y = z Phi(z)
    dz = dy (Phi(z) + z phi(z))      dbias = sum of dz over rows      dx = dz W      dW = dz^T x

Backward needs h. Storing and reading it moves 2 N numbers per row; computing it again costs 2 N K FLOPs. On
an H200, at 4.3 TB/s and 600 TFLOP/s, both take the same time for K = 280. So there are two forms:

    narrow   h is not stored. A program has some rows of x, and their sums dx in registers. For each tile of W
             it computes h again, then dz, and adds dz W. It writes dz, for dW, and the sums of dz over its
             rows
    wide     h is stored. Backward is that of `bias_gelu`, then cuBLAS: sums dx of more columns do not fit
             into registers, and dz would be computed once for each tile of dx

Float32 has the wide form for any K: its product is three TF32 products. In both forms cuBLAS makes dW, whose
sums run over all rows: with one program per tile of dW, most multiprocessors would have no work.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import architecture, cdiv, dot, next_power_of_2, refuse_float64, rounded
from electra_fast.kernels._launch import launch
from electra_fast.kernels._rows import column_sums
from electra_fast.kernels.bias_gelu import bias_gelu_bwd, gelu_slope, normal_cdf

NARROW = 256  # columns of x up to which backward computes the product again

# Chosen by registers on sm_80, 86, 90, 100 and 120 (benchmarks/static): none spills. None is timed yet;
# `python -m benchmarks tune linear_gelu` does it.
# (BLOCK_T, BLOCK_N, BLOCK_K, warps, stages) of 16-bit dtypes and of float32.
FORWARD = [(128, 128, 64, 8, 3), (128, 64, 32, 8, 3)]
# (BLOCK_T, BLOCK_N, warps, stages) for the matrix units of sm_90 and sm_100, and for the others, which would
# spill. More rows read W, which is in L2, less often.
DX = [(128, 64, 8, 2), (64, 32, 8, 2)]


@triton.jit
def _load_tile(x_ptr, row, column, rows, columns: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load the tile of a matrix ``[rows, columns]`` that begins at (row, column), 0 outside."""
    offs_r, offs_c = tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
    mask = (row + offs_r < rows)[:, None] & (offs_c < columns)[None, :]
    base_ptr = x_ptr + row.to(tl.int64) * columns  # a scalar base keeps the offsets in 32 bits
    return tl.load(base_ptr + offs_r[:, None] * columns + offs_c[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(y_ptr, y, row, column, rows, columns: tl.constexpr):
    """Store y, rounded, as the tile of a matrix ``[rows, columns]`` that begins at (row, column)."""
    offs_r, offs_c = tl.arange(0, y.shape[0]), column + tl.arange(0, y.shape[1])
    mask = (row + offs_r < rows)[:, None] & (offs_c < columns)[None, :]
    base_ptr = y_ptr + row.to(tl.int64) * columns
    y = rounded(y, y_ptr.dtype.element_ty)
    tl.store(base_ptr + offs_r[:, None] * columns + offs_c[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["T"])  # T changes with every packed batch and must not recompile
def _linear_gelu_fwd(
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    y_ptr,  # [T, N] out
    h_ptr,  # [T, N] out: the product, or None
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles of the same rows are neighbours. Those that run at the same time read all of W and a few rows of
    # x, which fit into L2, so grouping them in another order would save nothing.
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    t0, n0 = tl.program_id(0) // tiles * BLOCK_T, tl.program_id(0) % tiles * BLOCK_N
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x = _load_tile(x_ptr, t0, k0, T, K, BLOCK_T, BLOCK_K)
        w = _load_tile(weight_ptr, n0, k0, N, K, BLOCK_N, BLOCK_K)
        acc = dot(x, w.T, acc)
    if h_ptr is not None:
        _store_tile(h_ptr, acc, t0, n0, T, N)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    z = acc + tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    _store_tile(y_ptr, z * normal_cdf(z), t0, n0, T, N)


@triton.jit(do_not_specialize=["T"])
def _linear_gelu_dx(
    dy_ptr,  # [T, N]
    x_ptr,  # [T, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    dz_ptr,  # [T, N] out
    dx_ptr,  # [T, K] out
    partial_ptr,  # [1, programs, N] f32 out: sums of dz
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # all columns
):
    t0 = tl.program_id(0) * BLOCK_T
    x = _load_tile(x_ptr, t0, 0, T, K, BLOCK_T, BLOCK_K)
    dx = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        w = _load_tile(weight_ptr, tl.cast(n0, tl.int32), 0, N, K, BLOCK_N, BLOCK_K)
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        z = dot(x, w.T, tl.zeros((BLOCK_T, BLOCK_N), tl.float32)) + bias[None, :]
        dy = _load_tile(dy_ptr, t0, n0, T, N, BLOCK_T, BLOCK_N).to(tl.float32)
        dz = dy * gelu_slope(z)  # 0 in rows that do not exist
        sums_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * N + offs_n
        tl.store(sums_ptr, tl.sum(dz, axis=0), mask=offs_n < N)
        _store_tile(dz_ptr, dz, t0, n0, T, N)
        dx = dot(rounded(dz, w.dtype), w, dx)
    _store_tile(dx_ptr, dx, t0, 0, T, K)


def _narrow(x: Tensor) -> bool:
    return x.shape[-1] <= NARROW and x.dtype != torch.float32


def linear_gelu_fwd(x: Tensor, weight: Tensor, bias: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel on contiguous x [.., K], weight [N, K] and bias [N]; return (y [.., N], h).

    h is the product if a `backward` pass needs it, else it is empty.
    """
    refuse_float64("linear", "x", x)
    T, (N, K) = math.prod(x.shape[:-1]), weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    h = torch.empty_like(y) if backward and not _narrow(x) else None
    if y.numel() > 0:
        BLOCK_T, BLOCK_N, BLOCK_K, warps, stages = FORWARD[x.dtype == torch.float32]
        blocks = {"BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K}
        grid = (cdiv(T, BLOCK_T) * cdiv(N, BLOCK_N),)
        options = {"num_warps": warps, "num_stages": stages}
        launch(_linear_gelu_fwd, grid, x, weight, bias, y, h, T, N=N, K=K, **blocks, **options)
    return y, x.new_empty(0) if h is None else h


def linear_gelu_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels and cuBLAS; return the gradients of x, weight and bias."""
    if _narrow(x):
        dz, dx, dbias = _narrow_bwd(dy, x, weight, bias)
    else:
        dz, dbias = bias_gelu_bwd(dy, h, bias)
        dx = dz @ weight
    rows = dz[None].flatten(0, -2)
    return dx, rows.t() @ x[None].flatten(0, -2), dbias


def _narrow_bwd(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dz, dx, dbias) from a product that is computed again."""
    T, (N, K) = math.prod(x.shape[:-1]), weight.shape
    BLOCK_T, BLOCK_N, warps, stages = DX[architecture() not in (90, 100)]
    programs = cdiv(T, BLOCK_T)
    dz, dx = torch.empty_like(dy), torch.empty_like(x)
    partial = x.new_empty(1, programs, N, dtype=torch.float32)
    if programs > 0:
        blocks = {"BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N, "BLOCK_K": next_power_of_2(max(K, 16))}
        arguments = (dy, x, weight, bias, dz, dx, partial, T)
        options = {"num_warps": warps, "num_stages": stages}
        launch(_linear_gelu_dx, (programs,), *arguments, N=N, K=K, **blocks, **options)
    return dz, dx, *column_sums(partial, bias)
