"""Sums of rows by key, for the gradients of `embed`'s tables: out[v] = base[v] + sum of x[t] over key[t] = v.

A stable sort gives each key its tokens in line, at the places from start[v] to start[v + 1]. Twenty thousand
tokens of one key ([MASK], padding, a type) are not added up in as many turns, because of

    pieces      of PIECE places from a multiple of PIECE on, where one key has them all, and
    blocks      of PIECE pieces from a multiple of PIECE on, likewise,

which have a program each. What a key has left of places and pieces beside its blocks is added to these. So
every addition has its fixed place, and every row of the table's gradient is written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 32
LEVELS = 2  # of pieces and blocks
BLOCK_V = 8  # keys that a program takes one by one
BLOCK_K = 8  # terms of a key that it adds at a time
BLOCK_E = 128


@triton.jit(do_not_specialize=["below", "above", "span"])  # they change with every packed batch
def embed_pieces(
    keys_ptr,  # [T] sorted
    order_ptr,  # [T] i64: the token at each place
    x_ptr,  # [rows, E] f32, in and out: tokens, pieces, blocks
    below,  # the first row of what is added up: 0 for tokens
    above,  # the first row of the sums
    span,  # places of a sum
    E: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    first = keys_ptr + piece * span
    if tl.load(first) == tl.load(first + span - 1):
        row = below + piece * PIECE + tl.arange(0, PIECE)
        if below == 0:
            row = tl.load(order_ptr + row)
        e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        x = tl.load(x_ptr + row[:, None] * E + e[None, :], mask=(e < E)[None, :], other=0.0)
        tl.store(x_ptr + (above + piece) * E + e, tl.sum(x, axis=0), mask=e < E)


@triton.jit(do_not_specialize=["T", "V"])
def embed_table(
    start_ptr,  # [V + 1] i32: the first place of each key
    order_ptr,  # [T] i64: the token at each place
    x_ptr,  # [rows, E] f32: tokens, pieces, blocks
    base_ptr,  # [V, E], or None for 0
    out_ptr,  # [V, E] out
    T,
    V,
    E: tl.constexpr,
    PIECE: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    v0 = tl.program_id(0).to(tl.int64) * BLOCK_V
    for i in range(tl.minimum(V - v0, BLOCK_V)):
        v = v0 + i
        start, end = tl.load(start_ptr + v), tl.load(start_ptr + v + 1)
        acc = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
        row0, rows = 0, T
        for level in tl.static_range(LEVELS + 1):
            # This level adds start .. up and down .. end. In between lie whole pieces, the next level's.
            up, down = end, end
            if level < LEVELS:
                whole = (start + PIECE - 1) // PIECE < end // PIECE
                up = tl.where(whole, (start + PIECE - 1) // PIECE * PIECE, end)
                down = tl.where(whole, end // PIECE * PIECE, end)
            for k0 in range(start, end - (down - up), BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                k = tl.where(k < up, k, k + (down - up))
                row = tl.load(order_ptr + k, mask=k < end, other=0) if level == 0 else (row0 + k).to(tl.int64)
                inside = (k < end)[:, None] & (e < E)[None, :]
                acc += tl.load(x_ptr + row[:, None] * E + e[None, :], mask=inside, other=0.0)
            start, end = up // PIECE, down // PIECE
            row0, rows = row0 + rows, rows // PIECE

        total = tl.sum(acc, axis=0)
        place = v * E + e
        if base_ptr is not None:
            total += tl.load(base_ptr + place, mask=e < E, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=e < E)


def rows_with_pieces(T: int) -> int:
    """Return how many rows T tokens, their pieces and blocks have."""
    return sum(T // PIECE**level for level in range(LEVELS + 1))


def table_gradient(x: Tensor, keys: Tensor, table: Tensor, base: Tensor | None = None) -> Tensor:
    """Return base, or 0, plus the sums of x by key, in the table's shape and dtype.

    x ``[rows_with_pieces(T), E]`` float32 holds T tokens; the rest is overwritten. A key of len(table) counts
    nowhere.
    """
    T, (V, E) = len(keys), table.shape
    keys, order = torch.sort(keys, stable=True)
    every = torch.arange(V + 1, dtype=keys.dtype, device=keys.device)
    start = torch.searchsorted(keys, every, out_int32=True)

    out = torch.empty_like(table)
    shape = {"E": E, "PIECE": PIECE, "BLOCK_E": min(triton.next_power_of_2(max(E, 32)), BLOCK_E)}
    parts = triton.cdiv(E, shape["BLOCK_E"])
    below, above = 0, T
    for level in range(1, LEVELS + 1):
        pieces = T // PIECE**level
        if pieces > 0:
            embed_pieces[(pieces, parts)](keys, order, x, below, above, PIECE**level, **shape, num_warps=4)
        below, above = above, above + pieces
    embed_table[(triton.cdiv(V, BLOCK_V), parts)](
        start, order, x, base, out, T, V, LEVELS=LEVELS, BLOCK_V=BLOCK_V, BLOCK_K=BLOCK_K, **shape,
        num_warps=1,  # no sum crosses a warp
    )  # fmt: skip
    return out
