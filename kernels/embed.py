"""The embedding of both towers: word + position + type, LayerNorm, dropout (Devlin et al. 2019, section 3).

    x = word[id] + position[place] + type[type id]      h = (x - mean) rstd      y = drop(w h + b)

A program holds the rows of BLOCK_T tokens in registers. An id outside its table is not dereferenced: the
token's mean is NaN, and so is all that comes of it. The mean is refined once (`_rows.average`), so that the h
of a constant row is 0 whatever a sum rounds.

Backward looks the rows up again. With dy' = drop(dy) and g = w dy'

    dx = rstd (g - avg(g) - h avg(g h))      dw = sum of h dy'      db = sum of dy'

A program adds up dx, h dy' and dy' over tokens of one group, in registers. Where no places are given a group
is a place in all sequences, so that its sum of dx is a row of the position's gradient and nothing is
scattered. For tables that are looked up by ids dx goes to memory, in float32, and `_embed_sums` adds it up by
id. Nothing is atomic, and no sum depends on the order in which programs end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import dropout_arguments, keep, refuse_float64
from electra_fast.kernels._embed_sums import rows_with_pieces, table_gradient
from electra_fast.kernels._rows import average

PROGRAMS = 2048  # that backward is cut into, three times what an H100 or H200 holds at once


@triton.jit
def _look_up(table_ptr, ids_ptr, default, t, in_t, size, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the rows of a table that the tokens t ask for, in float32, and their ids: `size` where bad."""
    ids = default if ids_ptr is None else tl.load(ids_ptr + t, mask=in_t, other=-1)
    legal = (ids >= 0) & (ids < size)  # in the ids' own width
    e = tl.arange(0, BLOCK_E)
    at = ids.to(tl.int64)[:, None] * E + e[None, :]
    rows = tl.load(table_ptr + at, mask=legal[:, None] & (e < E)[None, :], other=0.0)
    return rows.to(tl.float32), tl.where(legal, ids, size)


@triton.jit(do_not_specialize=["T", "L", "threshold", "site"])  # neither a batch's size nor a site recompiles
def _embed_fwd(
    ids_ptr,  # [T]
    types_ptr,  # [T], or None for 0
    places_ptr,  # [T], or None for t % L
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
    scale,
    site,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = t < T
    word, id = _look_up(word_ptr, ids_ptr, t, t, in_t, V, E, BLOCK_E)
    position, place = _look_up(position_ptr, places_ptr, t % L, t, in_t, P, E, BLOCK_E)
    type, type_id = _look_up(type_ptr, types_ptr, tl.zeros_like(t), t, in_t, N, E, BLOCK_E)
    x = word + position + type

    e = tl.arange(0, BLOCK_E)
    in_e = (e < E)[None, :]
    legal = (id < V) & (place < P) & (type_id < N)
    mean = tl.where(legal[:, None], average((x,), (in_e,), 1 / E), float("nan"))
    d = tl.where(in_e, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(d * d, axis=1) / E + eps)
    w = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + e, mask=e < E, other=0.0).to(tl.float32)
    y = d * rstd[:, None] * w[None, :] + b[None, :]
    if rng_ptr is not None:
        y = tl.where(keep(rng_ptr, site, t, 0, threshold, BLOCK_E), y * scale, 0.0)

    tl.store(mean_ptr + t[:, None], mean, mask=in_t[:, None])
    tl.store(rstd_ptr + t, rstd, mask=in_t)
    at = t.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=in_t[:, None] & in_e)


@triton.jit(do_not_specialize=["T", "chunk", "threshold", "site"])
def _embed_bwd(
    dy_ptr,  # [T, E]
    ids_ptr,  # [T]
    types_ptr,  # [T], or None for 0
    places_ptr,  # [T], or None for the group
    word_ptr,  # [V, E]
    position_ptr,  # [P, E]
    type_ptr,  # [N, E]
    weight_ptr,  # [E]
    mean_ptr,  # [T] f32
    rstd_ptr,  # [T] f32
    rng_ptr,  # [2] i64: seed, step; or None without dropout
    partial_ptr,  # [splits, groups, 3, E] f32 out: sums of dx, h dy' and dy'
    dx_ptr,  # [T, E] f32 out, or None
    keys_ptr,  # [3, T] out: ids, places and types as far as given, its table's size for a bad one; or None
    T,
    chunk,  # tokens of a group that one program takes
    V,
    P,
    N,
    threshold,
    scale,
    site,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    group, groups = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, BLOCK_E)
    in_e = (e < E)[None, :]
    w = tl.load(weight_ptr + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    sum_dx = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    sum_dw = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    sum_db = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for i in range(0, chunk, BLOCK_T):
        t = group + groups * (tl.program_id(1) * chunk + i + tl.arange(0, BLOCK_T))
        in_t = t < T
        word, id = _look_up(word_ptr, ids_ptr, t, t, in_t, V, E, BLOCK_E)
        position, place = _look_up(position_ptr, places_ptr, tl.zeros_like(t) + group, t, in_t, P, E, BLOCK_E)
        type, type_id = _look_up(type_ptr, types_ptr, tl.zeros_like(t), t, in_t, N, E, BLOCK_E)
        x = word + position + type
        if keys_ptr is not None:
            key = keys_ptr.dtype.element_ty
            tl.store(keys_ptr + t, id.to(key), mask=in_t)
            if places_ptr is not None:
                tl.store(keys_ptr + T + t, place.to(key), mask=in_t)
            if types_ptr is not None:
                tl.store(keys_ptr + 2 * T + t, type_id.to(key), mask=in_t)

        at = t.to(tl.int64)[:, None] * E + e[None, :]
        dy = tl.load(dy_ptr + at, mask=in_t[:, None] & in_e, other=0.0).to(tl.float32)
        if rng_ptr is not None:
            dy = tl.where(keep(rng_ptr, site, t, 0, threshold, BLOCK_E), dy * scale, 0.0)
        mean = tl.load(mean_ptr + t, mask=in_t, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + t, mask=in_t, other=0.0)[:, None]  # 0: what is no token adds nothing
        h = (x - mean) * rstd
        g = w * dy
        avg_g = tl.sum(g, axis=1)[:, None] / E
        avg_gh = tl.sum(g * h, axis=1)[:, None] / E
        dx = rstd * (g - avg_g - h * avg_gh)

        sum_dx += dx
        sum_dw += h * dy
        sum_db += dy
        if dx_ptr is not None:
            tl.store(dx_ptr + at, dx, mask=in_t[:, None] & in_e)

    out = partial_ptr + (tl.program_id(1).to(tl.int64) * groups + group) * 3 * E + e
    tl.store(out, tl.sum(sum_dx, axis=0), mask=e < E)
    tl.store(out + E, tl.sum(sum_dw, axis=0), mask=e < E)
    tl.store(out + 2 * E, tl.sum(sum_db, axis=0), mask=e < E)


def _shape(E: int, each: int) -> dict[str, int]:
    """Return the launch shape for rows of E columns, about `each` elements a thread."""
    BLOCK_E = triton.next_power_of_2(max(E, 32))
    warps = min(max(BLOCK_E // 512, 4), 32)
    return {"E": E, "BLOCK_T": max(32 * warps * each // BLOCK_E, 1), "BLOCK_E": BLOCK_E, "num_warps": warps}


def embed_fwd(
    ids: Tensor,
    types: Tensor | None,
    places: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float,
    rng: Tensor | None,
    stream: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel on contiguous tensors; return (y [.., E], mean [..], rstd [..])."""
    refuse_float64("embed", "tables", word)
    T, E = ids.numel(), word.shape[1]
    shape = _shape(E, 32 // word.element_size())  # 32 bytes of a row a thread
    y = word.new_empty(*ids.shape, E, dtype=dtype)
    mean, rstd = (word.new_empty(ids.shape, dtype=torch.float32) for _ in range(2))
    if y.numel() > 0:
        _embed_fwd[(triton.cdiv(T, shape["BLOCK_T"]),)](
            ids, types, places, word, position, type, weight, bias, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
            T=T, L=ids.shape[-1], V=len(word), P=len(position), N=len(type), eps=eps,
            **dropout_arguments(dropout, rng, stream), **shape,
        )  # fmt: skip
    return y, mean, rstd


def embed_bwd(
    dy: Tensor,
    ids: Tensor,
    types: Tensor | None,
    places: Tensor | None,
    word: Tensor,
    position: Tensor,
    type: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    rng: Tensor | None,
    stream: int,
    dword: Tensor | None,
    want_word: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels; return the gradients of word, position, type, weight and bias.

    That of word begins with `dword`, and is empty where it is not wanted.
    """
    T, E = ids.numel(), word.shape[1]
    shape = _shape(E, 8)
    groups = ids.shape[-1] if places is None else min(triton.cdiv(T, shape["BLOCK_T"]), PROGRAMS)
    groups = max(groups, 1)
    tiles = triton.cdiv(T, groups * shape["BLOCK_T"])  # of a group
    chunk = max(triton.cdiv(tiles, max(PROGRAMS // groups, 1)), 1)
    partial = word.new_empty(triton.cdiv(tiles, chunk), groups, 3, E, dtype=torch.float32)
    dx = keys = None
    if want_word or places is not None or types is not None:
        narrow = max(len(word), len(position), len(type)) < 2**15  # half the passes of a radix sort
        keys = ids.new_empty(3, T, dtype=torch.int16 if narrow else torch.int32)
        dx = word.new_empty(rows_with_pieces(T), E, dtype=torch.float32)
    if dy.numel() > 0:
        _embed_bwd[(groups, len(partial))](
            dy, ids, types, places, word, position, type, weight, mean, rstd, partial_ptr=partial, dx_ptr=dx,
            keys_ptr=keys, T=T, chunk=chunk * shape["BLOCK_T"], V=len(word), P=len(position), N=len(type),
            **dropout_arguments(dropout, rng, stream), **shape,
        )  # fmt: skip

    sums = partial.sum((0, 1))
    dweight, dbias = (x.to(weight.dtype, copy=True) for x in sums[1:])  # no result is a view of another
    if want_word:
        dword = table_gradient(dx, keys[0], word, dword)
    else:
        dword = word.new_empty(0)
    if places is None:
        dposition = _first_rows(position, partial[:, :, 0].sum(0))
    else:
        dposition = table_gradient(dx, keys[1], position)
    dtype = _first_rows(type, sums[:1]) if types is None else table_gradient(dx, keys[2], type)
    return dword, dposition, dtype, dweight, dbias


def _first_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Return the gradient of a table that has `rows` for its first rows, and 0 for the others."""
    gradient = torch.zeros_like(table)
    gradient[: len(rows)] = rows
    return gradient
