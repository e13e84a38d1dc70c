"""Sums of rows by key, for the gradients of `embed`'s tables: out[v] = base[v] + sum of x[t] over key[t] = v.

A stable sort gives the tokens of key v the ranks from start[v] to start[v + 1]. A frequent key ([MASK],
padding, a type) may have twenty thousand tokens, too many to add one after another. So groups of them are
added first, each by its own program:

    piece       PIECE ranks from a multiple of PIECE on, if they all have the same key
    block       PIECE pieces from a multiple of PIECE on, if they all have the same key

Then the sum of a key adds its blocks, its other pieces and its other tokens. So the order of every addition
is fixed, and every row of the table's gradient is written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from electra_fast.kernels._common import cdiv, next_power_of_2
from electra_fast.kernels._launch import launch

PIECE = 32
LEVELS = 2  # pieces and blocks
BLOCK_V = 8  # keys per program, one after another
BLOCK_K = 8  # terms of a key that are added at a time
BLOCK_E = 128


@triton.jit(do_not_specialize=["first_term", "first_sum", "span"])  # they change with every packed batch
def embed_pieces(
    keys_ptr,  # [T] sorted
    order_ptr,  # [T] i64: the token at each rank
    x_ptr,  # [rows, E] f32, in and out: tokens, pieces, blocks
    first_term,  # row of the first term: 0 for tokens
    first_sum,  # row of the first sum
    span,  # ranks per sum
    E: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    first_key_ptr = keys_ptr + piece * span
    if tl.load(first_key_ptr) == tl.load(first_key_ptr + span - 1):
        row = first_term + piece * PIECE + tl.arange(0, PIECE)
        if first_term == 0:
            row = tl.load(order_ptr + row)
        offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
        in_e = offs_e < E
        x = tl.load(x_ptr + row[:, None] * E + offs_e[None, :], mask=in_e[None, :], other=0.0)
        tl.store(x_ptr + (first_sum + piece) * E + offs_e, tl.sum(x, axis=0), mask=in_e)


@triton.jit(do_not_specialize=["T", "V"])
def embed_table(
    start_ptr,  # [V + 1] i32: the first rank of each key
    order_ptr,  # [T] i64: the token at each rank
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
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    v0 = tl.program_id(0).to(tl.int64) * BLOCK_V
    for i in range(tl.minimum(V - v0, BLOCK_V)):
        v = v0 + i
        start, end = tl.load(start_ptr + v), tl.load(start_ptr + v + 1)
        acc = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
        row0, rows = 0, T  # of this level in x
        for level in tl.static_range(LEVELS + 1):
            # Add start .. head_end and tail_start .. end. The next level adds the whole pieces between them.
            head_end, tail_start = end, end
            if level < LEVELS:
                whole = (start + PIECE - 1) // PIECE < end // PIECE
                head_end = tl.where(whole, (start + PIECE - 1) // PIECE * PIECE, end)
                tail_start = tl.where(whole, end // PIECE * PIECE, end)
            for k0 in range(start, end - (tail_start - head_end), BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                k = tl.where(k < head_end, k, k + (tail_start - head_end))
                row = tl.load(order_ptr + k, mask=k < end, other=0) if level == 0 else (row0 + k).to(tl.int64)
                mask = (k < end)[:, None] & (offs_e < E)[None, :]
                acc += tl.load(x_ptr + row[:, None] * E + offs_e[None, :], mask=mask, other=0.0)
            start, end = head_end // PIECE, tail_start // PIECE
            row0, rows = row0 + rows, rows // PIECE

        out = tl.sum(acc, axis=0)  # [BLOCK_E]
        offs = v * E + offs_e
        if base_ptr is not None:
            out += tl.load(base_ptr + offs, mask=offs_e < E, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=offs_e < E)


def rows_with_pieces(T: int) -> int:
    """Return the number of rows of T tokens, their pieces and their blocks."""
    return sum(T // PIECE**level for level in range(LEVELS + 1))


def table_gradient(x: Tensor, keys: Tensor, table: Tensor, base: Tensor | None = None) -> Tensor:
    """Return base, or 0, plus the sums of x by key, in the table's shape and dtype.

    x ``[rows_with_pieces(T), E]`` float32 starts with T tokens; its other rows are overwritten. Tokens of key
    len(table) count nowhere.
    """
    T, (V, E) = len(keys), table.shape
    keys, order = torch.sort(keys, stable=True)
    every_key = torch.arange(V + 1, dtype=keys.dtype, device=keys.device)
    start = torch.searchsorted(keys, every_key, out_int32=True)

    out = torch.empty_like(table)
    shape = {"E": E, "PIECE": PIECE, "BLOCK_E": min(next_power_of_2(max(E, 32)), BLOCK_E)}
    parts = cdiv(E, shape["BLOCK_E"])
    first_term, first_sum = 0, T
    for level in range(1, LEVELS + 1):
        span = PIECE**level
        if T >= span:
            grid = (T // span, parts)
            launch(embed_pieces, grid, keys, order, x, first_term, first_sum, span, **shape, num_warps=4)
        first_term, first_sum = first_sum, first_sum + T // span
    launch(
        embed_table, (cdiv(V, BLOCK_V), parts), start, order, x, base, out, T, V, LEVELS=LEVELS,
        BLOCK_V=BLOCK_V, BLOCK_K=BLOCK_K, **shape, num_warps=1,  # no sum crosses a warp
    )  # fmt: skip
    return out
