"""The embedding of both towers: word + position + type, LayerNorm, dropout (Devlin et al. 2019, section 3).

    x = word[id] + position[position id] + type[type id]      h = (x - mean) rstd      y = drop(w h + b)

A program holds the rows of BLOCK_T tokens in registers. An id outside its table is not dereferenced: the
token's mean becomes NaN, and so does every result from it. The mean is corrected once (`_rows.row_means`), so
that the h of a constant row is 0, however its sum rounds.

Backward looks the rows up again. With dy' = drop(dy) and g = w dy'

    dx = rstd (g - avg(g) - h avg(g h))      dw = sum of h dy'      db = sum of dy'

A program adds dx, h dy' and dy' over tokens of one group, in registers. Without position ids, a group is one
position of all sequences, so that its sum of dx is a row of the position table's gradient and nothing is
scattered. For tables that are looked up by ids, dx goes to memory in float32 and `_embed_sums` adds it by id.
Nothing is atomic, and no sum depends on the order in which programs end.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import cdiv, dropout_arguments, keep, next_power_of_2, refuse_float64
from electra_fast.kernels._embed_sums import rows_with_pieces, table_gradient
from electra_fast.kernels._launch import launch
from electra_fast.kernels._rows import row_means

PROGRAMS = 2048  # of backward: three times what an H100 or H200 runs at once


@triton.jit
def _look_up(table_ptr, ids_ptr, default, offs_t, in_t, size, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the tokens' rows of a table in float32, and their ids, `size` in place of a bad one."""
    ids = default if ids_ptr is None else tl.load(ids_ptr + offs_t, mask=in_t, other=-1)
    legal = (ids >= 0) & (ids < size)  # in the ids' own width
    offs_e = tl.arange(0, BLOCK_E)
    offs = ids.to(tl.int64)[:, None] * E + offs_e[None, :]
    rows = tl.load(table_ptr + offs, mask=legal[:, None] & (offs_e < E)[None, :], other=0.0)
    return rows.to(tl.float32), tl.where(legal, ids, size)


@triton.jit(do_not_specialize=["T", "L", "threshold", "dropout_stream"])  # their values must not recompile
def _embed_fwd(
    ids_ptr,  # [T]
    type_ids_ptr,  # [T], or None for 0
    position_ids_ptr,  # [T], or None for t % L
    word_ptr,  # [V, E]
    position_ptr,  # [P, E]
    type_ptr,  # [N, E]
    weight_ptr,  # [E]
    bias_ptr,  # [E]
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    y_ptr,  # [T, E] out
    mean_ptr,  # [T] f32 out
    rstd_ptr,  # [T] f32 out
    T,
    L,
    V,
    P,
    N,
    eps,
    threshold,
    keep_scale,
    dropout_stream,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = offs_t < T
    word, id = _look_up(word_ptr, ids_ptr, offs_t, offs_t, in_t, V, E, BLOCK_E)
    position, position_id = _look_up(position_ptr, position_ids_ptr, offs_t % L, offs_t, in_t, P, E, BLOCK_E)
    type, type_id = _look_up(type_ptr, type_ids_ptr, tl.zeros_like(offs_t), offs_t, in_t, N, E, BLOCK_E)
    x = word + position + type  # [BLOCK_T, BLOCK_E]

    offs_e = tl.arange(0, BLOCK_E)
    in_e = (offs_e < E)[None, :]
    legal = (id < V) & (position_id < P) & (type_id < N)
    mean = tl.where(legal[:, None], row_means((x,), (in_e,), 1 / E), float("nan"))  # [BLOCK_T, 1]
    d = tl.where(in_e, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(d * d, axis=1) / E + eps)  # [BLOCK_T]
    w = tl.load(weight_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)
    y = d * rstd[:, None] * w[None, :] + b[None, :]
    if rng_ptr is not None:
        y = tl.where(keep(rng_ptr, dropout_stream, offs_t, 0, threshold, BLOCK_E), y * keep_scale, 0.0)

    tl.store(mean_ptr + offs_t[:, None], mean, mask=in_t[:, None])
    tl.store(rstd_ptr + offs_t, rstd, mask=in_t)
    offs = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=in_t[:, None] & in_e)


@triton.jit(do_not_specialize=["T", "chunk", "threshold", "dropout_stream"])
def _embed_bwd(
    dy_ptr,  # [T, E]
    ids_ptr,  # [T]
    type_ids_ptr,  # [T], or None for 0
    position_ids_ptr,  # [T], or None for the group
    word_ptr,  # [V, E]
    position_ptr,  # [P, E]
    type_ptr,  # [N, E]
    weight_ptr,  # [E]
    mean_ptr,  # [T] f32
    rstd_ptr,  # [T] f32
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    partial_ptr,  # [splits, groups, 3, E] f32 out: sums of dx, h dy' and dy'
    dx_ptr,  # [T, E] f32 out, or None
    keys_ptr,  # [3, T] out: ids, position ids and type ids if given, a table's size for a bad one; or None
    T,
    chunk,  # tokens of a group per program
    V,
    P,
    N,
    threshold,
    keep_scale,
    dropout_stream,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    group, groups = tl.program_id(0), tl.num_programs(0)
    offs_e = tl.arange(0, BLOCK_E)
    in_e = (offs_e < E)[None, :]
    w = tl.load(weight_ptr + offs_e, mask=offs_e < E, other=0.0).to(tl.float32)[None, :]
    sum_dx = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    dw = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    db = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for i in range(0, chunk, BLOCK_T):
        offs_t = group + groups * (tl.program_id(1) * chunk + i + tl.arange(0, BLOCK_T))
        in_t = offs_t < T
        zero = tl.zeros_like(offs_t)
        word, id = _look_up(word_ptr, ids_ptr, offs_t, offs_t, in_t, V, E, BLOCK_E)
        position, position_id = _look_up(
            position_ptr, position_ids_ptr, zero + group, offs_t, in_t, P, E, BLOCK_E
        )
        type, type_id = _look_up(type_ptr, type_ids_ptr, zero, offs_t, in_t, N, E, BLOCK_E)
        x = word + position + type  # [BLOCK_T, BLOCK_E]
        if keys_ptr is not None:
            key = keys_ptr.dtype.element_ty
            tl.store(keys_ptr + offs_t, id.to(key), mask=in_t)
            if position_ids_ptr is not None:
                tl.store(keys_ptr + T + offs_t, position_id.to(key), mask=in_t)
            if type_ids_ptr is not None:
                tl.store(keys_ptr + 2 * T + offs_t, type_id.to(key), mask=in_t)

        offs = offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
        dy = tl.load(dy_ptr + offs, mask=in_t[:, None] & in_e, other=0.0).to(tl.float32)
        if rng_ptr is not None:
            dy = tl.where(keep(rng_ptr, dropout_stream, offs_t, 0, threshold, BLOCK_E), dy * keep_scale, 0.0)
        mean = tl.load(mean_ptr + offs_t, mask=in_t, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_t, mask=in_t, other=0.0)[:, None]  # 0: tokens beyond T add nothing
        h = (x - mean) * rstd
        g = w * dy
        avg_g = tl.sum(g, axis=1)[:, None] / E
        avg_gh = tl.sum(g * h, axis=1)[:, None] / E
        dx = rstd * (g - avg_g - h * avg_gh)

        sum_dx += dx
        dw += h * dy
        db += dy
        if dx_ptr is not None:
            tl.store(dx_ptr + offs, dx, mask=in_t[:, None] & in_e)

    out_ptr = partial_ptr + (tl.program_id(1).to(tl.int64) * groups + group) * 3 * E + offs_e
    tl.store(out_ptr, tl.sum(sum_dx, axis=0), mask=offs_e < E)
    tl.store(out_ptr + E, tl.sum(dw, axis=0), mask=offs_e < E)
    tl.store(out_ptr + 2 * E, tl.sum(db, axis=0), mask=offs_e < E)


@functools.cache
def _tile_shape(E: int, per_thread: int) -> dict[str, int]:
    """Return the launch shape for rows of E columns, with about `per_thread` elements per thread."""
    BLOCK_E = next_power_of_2(max(E, 32))
    warps = min(max(BLOCK_E // 512, 4), 32)
    BLOCK_T = max(32 * warps * per_thread // BLOCK_E, 1)
    return {"E": E, "BLOCK_T": BLOCK_T, "BLOCK_E": BLOCK_E, "num_warps": warps}


def embed_fwd(
    ids, type_ids, position_ids, word, position, type, weight, bias, eps, dropout, rng, dropout_stream, dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel on contiguous tensors; return (y [.., E], mean [..], rstd [..])."""
    refuse_float64("embed", "tables", word)
    T, E = ids.numel(), word.shape[1]
    shape = _tile_shape(E, 32 // word.element_size())  # 32 bytes of a row per thread
    y = word.new_empty(*ids.shape, E, dtype=dtype)
    mean = torch.empty_like(ids, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if y.numel() > 0:
        rng, *drop = dropout_arguments(dropout, rng, dropout_stream)
        launch(
            _embed_fwd, (cdiv(T, shape["BLOCK_T"]),), ids, type_ids, position_ids, word, position, type,
            weight, bias, rng, y, mean, rstd, T, ids.shape[-1], word.shape[0], position.shape[0],
            type.shape[0], eps, *drop, **shape,
        )  # fmt: skip
    return y, mean, rstd


def embed_bwd(
    dy, ids, type_ids, position_ids, word, position, type, weight, mean, rstd, dropout, rng, dropout_stream,
    dword, want_word,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the backward kernels; return the gradients of word, position, type, weight and bias.

    `dword` is added to the gradient of word, which is empty unless `want_word`.
    """
    T, (V, E) = ids.numel(), word.shape
    P, N = position.shape[0], type.shape[0]
    shape = _tile_shape(E, 8)
    groups = ids.shape[-1] if position_ids is None else min(cdiv(T, shape["BLOCK_T"]), PROGRAMS)
    groups = max(groups, 1)
    tiles = cdiv(T, groups * shape["BLOCK_T"])  # per group
    chunk = max(cdiv(tiles, max(PROGRAMS // groups, 1)), 1)  # tiles per program
    partial = word.new_empty(cdiv(tiles, chunk), groups, 3, E, dtype=torch.float32)
    dx = keys = None
    if want_word or position_ids is not None or type_ids is not None:
        narrow = max(V, P, N) < 2**15  # a radix sort needs half the passes
        keys = ids.new_empty(3, T, dtype=torch.int16 if narrow else torch.int32)
        dx = word.new_empty(rows_with_pieces(T), E, dtype=torch.float32)
    if dy.numel() > 0:
        rng, *drop = dropout_arguments(dropout, rng, dropout_stream)
        launch(
            _embed_bwd, (groups, partial.shape[0]), dy, ids, type_ids, position_ids, word, position, type,
            weight, mean, rstd, rng, partial, dx, keys, T, chunk * shape["BLOCK_T"], V, P, N, *drop, **shape,
        )  # fmt: skip

    sums = partial.sum((0, 1))
    dweight, dbias = (x.to(weight.dtype, copy=True) for x in sums[1:])  # no result is a view of another
    dword = table_gradient(dx, keys[0], word, dword) if want_word else word.new_empty(0)
    if position_ids is None:
        dposition = _first_rows(position, partial[:, :, 0].sum(0))
    else:
        dposition = table_gradient(dx, keys[1], position)
    dtype = _first_rows(type, sums[:1]) if type_ids is None else table_gradient(dx, keys[2], type)
    return dword, dposition, dtype, dweight, dbias


def _first_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return a gradient like `table`: `rows`, followed by zeros."""
    gradient = torch.zeros_like(table)
    gradient[: len(rows)] = rows
    return gradient
