"""The generator's head: tied vocabulary projection, its loss, one sample per slot, and the gradient, in
sweeps over tiles of logits that are never stored (Clark et al. 2020, eq. 1).

    used        the slots whose weight is not 0; the others cost nothing
    sweep       logits of BLOCK_M slots and BLOCK_V tokens; of each slot and block of SUB tokens, the maximum
                and the sum of exponentials
    draw        each slot's log-sum-exp from these. One uniform picks a block by the masses in float64, then a
                token by the block's logits, computed again, as is the target's logit
    loss        the weighted mean, added in a fixed order
    gradient    d = w (softmax - onehot) / sum(w), times the table and times x

For narrow rows the gradient's kernels compute the logits again and hold their sums in registers. For wide
rows and for float32 these sums do not fit: the sweep keeps the exponentials of a chunk of slots, and cuBLAS
multiplies. Differences of logits are in units of log 2, so that an exponential is one instruction; the
logits themselves are not, since the largest would overflow. No result depends on the order in which programs
end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from electra_fast.kernels._common import architecture, cdiv, next_power_of_2, refuse_float64
from electra_fast.kernels._launch import launch
from electra_fast.kernels._mlm_draw import mlm_head_draw, mlm_head_loss
from electra_fast.kernels._mlm_gradient import (
    mlm_head_difference,
    mlm_head_dtable,
    mlm_head_dx,
    mlm_head_gather,
    mlm_head_scatter,
)
from electra_fast.kernels._mlm_sweep import mlm_head_sweep, mlm_head_used

SUB = 32  # tokens per block, which has one maximum and one sum; the draw reads its rows of the table again
NARROW = 128  # columns up to which the gradient's sums stay in registers: at 256 they spill on sm_86 and 100
CHUNK_BYTES = 512 << 20  # of kept exponentials
PROGRAMS = 396  # per sweep: three for each multiprocessor of an H100 or H200
BLOCK = 1024  # slots, or blocks of tokens, that one program reads at a time

# (BLOCK_M, BLOCK_V, BLOCK_E, warps, stages). None spills; docs/kernels/mlm_head.md has the registers.
SWEEP = (128, 64, 128, 8, 3)
DX = (128, 64, 128, 8, 2)
DTABLE = (64, 64, 128, 4, 2)
WIDE_SWEEP = (128, 128, 64, 8, 3)
WIDEST_SWEEP = (128, 256, 64, 8, 3)  # for the matrix units of sm_90 and sm_100; others would spill
FLOAT32_SWEEP = (128, 64, 32, 8, 3)


class Inputs(NamedTuple):
    """The arguments of `mlm_head_fwd`; tensors are contiguous."""

    x: Tensor  # [M, E]
    table: Tensor  # [V, E], dtype of x
    bias: Tensor  # [V]
    targets: Tensor  # [M]
    weights: Tensor  # [M] f32
    rng: Tensor  # [2] i64: seed, step
    temperature: float
    disallow_correct: bool

    @property
    def narrow(self) -> bool:
        return self.x.shape[1] <= NARROW and self.x.dtype != torch.float32

    def floats(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)


class UsedSlots(NamedTuple):
    """The slots whose weight is not 0."""

    index: Tensor  # [M] i32: the used slots, ascending
    count: Tensor  # [] i32: their number
    unit: Tensor  # [M] f32: the weights, divided by the largest if that is below 1
    scale: Tensor  # [] f32: 1 / sum of unit, 0 if the sum is 0


class Results(NamedTuple):
    """Results per slot; the last three are of used slots, in the order of `UsedSlots.index`."""

    samples: Tensor  # [M] dtype of targets, 0 in unused slots
    lse: Tensor  # [M] f32, 0 in unused slots
    norm: Tensor  # [M, 2] f32: maximum, and log-sum in units of log 2
    nll: Tensor  # [M] f32
    leads: Tensor  # [M] f32: 1 if the target is the arg-max, else 0


def _used(inputs: Inputs) -> tuple[UsedSlots, Results]:
    """List the used slots; return them and the results, so far written only in unused slots."""
    refuse_float64("mlm_head", "x", inputs.x)
    M, floats = len(inputs.x), inputs.floats
    index, count = (inputs.x.new_empty(shape, dtype=torch.int32) for shape in (M, ()))
    slots = UsedSlots(index, count, floats(M), floats())
    results = Results(torch.empty_like(inputs.targets), floats(M), floats(M, 2), floats(M), floats(M))
    launch(
        mlm_head_used, (1,), inputs.weights, *slots, results.samples, results.lse, M, BLOCK=BLOCK, num_warps=8
    )
    return slots, results


def _sweep(inputs: Inputs, slots: UsedSlots, results: Results, first: int, R: int, kept=None) -> Tensor:
    """Sweep and draw for R used slots from `first` on; return the maxima ``[R, blocks]``.

    kept ``[R, stride]``, in the dtype of x, becomes the exponentials.
    """
    x, table, bias, targets, _, rng, temperature, disallow_correct = inputs
    V, E = table.shape
    blocks = cdiv(V, SUB)
    inverse_temperature = min(max(1 / temperature, 1.2e-38), 3e38)  # its product with 0 is 0, with -inf -inf
    maxima, sums = inputs.floats(R, blocks), inputs.floats(R, blocks)
    tempered = None if inverse_temperature == 1 else inputs.floats(R, blocks)

    wide = WIDEST_SWEEP if architecture() in (90, 100) else WIDE_SWEEP
    wide = FLOAT32_SWEEP if x.dtype == torch.float32 else wide
    shape = _launch_shape(SWEEP if inputs.narrow else wide, E)
    rows, programs, tiles = _grid(R, V, shape)
    launch(
        mlm_head_sweep, (rows, programs), x, table, bias, slots.index, slots.count, maxima, sums, tempered,
        kept, inverse_temperature, first, tiles, V, blocks, 0 if kept is None else kept.stride(0), E=E,
        SUB=SUB, **shape,
    )  # fmt: skip
    launch(
        mlm_head_draw, (R,), x, table, bias, targets, slots.index, slots.count, rng, maxima, sums, tempered,
        *results, inverse_temperature, first, V, blocks, E=E, DISALLOW=disallow_correct, BLOCK=BLOCK,
        BLOCK_E=min(_whole_row(E), 32), SUB=SUB, num_warps=4,
    )  # fmt: skip
    return maxima


def _loss(inputs: Inputs, slots: UsedSlots, results: Results) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, samples, correct, lse)."""
    loss, correct = inputs.floats(), inputs.floats()
    launch(
        mlm_head_loss, (1,), inputs.weights, slots.index, slots.count, results.nll, results.leads, loss,
        correct, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return loss, results.samples, correct, results.lse


def _narrow_gradient(inputs: Inputs, slots: UsedSlots, results: Results, dx, dtable, dbias) -> None:
    """Sweep and draw, then write the gradients from logits that each kernel computes again."""
    x, table, bias, targets, *_ = inputs
    (M, E), V = x.shape, len(table)
    _sweep(inputs, slots, results, 0, M)
    if dx is not None:
        shape = _launch_shape(DX, E)
        rows, programs, tiles = _grid(M, V, shape)
        partial = inputs.floats(programs, M, E)
        launch(
            mlm_head_dx, (rows, programs), x, table, bias, targets, slots.unit, slots.index, slots.count,
            results.norm, partial, tiles, V, M, E=E, **shape,
        )  # fmt: skip
        _scatter(slots, partial, dx, 0)
    shape = _launch_shape(DTABLE, E)
    launch(
        mlm_head_dtable, (cdiv(V, shape["BLOCK_V"]),), x, table, bias, targets, slots.unit, slots.index,
        slots.count, slots.scale, results.norm, dtable, dbias, V, E=E, **shape,
    )  # fmt: skip


def _wide_gradient(inputs: Inputs, slots: UsedSlots, results: Results, dx, dtable, dbias) -> None:
    """Sweep, draw and write the gradients chunk by chunk, from kept exponentials."""
    x, table, _, targets, *_ = inputs
    (M, E), V = x.shape, len(table)
    stride = cdiv(V, 128) * 128  # cuBLAS reads rows of this length fast
    chunk = max(CHUNK_BYTES // (stride * x.element_size()) // 128 * 128, 128)
    for first in range(0, M, chunk):
        R = min(chunk, M - first)
        kept = x.new_empty(R, stride)
        maxima = _sweep(inputs, slots, results, first, R, kept)
        launch(
            mlm_head_difference, (stride // 128,), kept, maxima, targets, slots.unit, slots.index,
            slots.count, results.norm, dbias, first, R, V, maxima.shape[1], stride, BLOCK_M=32, BLOCK_V=128,
            SUB=SUB, num_warps=8,
        )  # fmt: skip
        d = kept[:, :V]
        if dx is not None:
            _scatter(slots, _product(d, table)[None], dx, first)
        if dtable is not None:
            rows = x.new_empty(R, E)
            launch(
                mlm_head_gather, (R,), x, slots.index, slots.count, rows, first, E=E, BLOCK_E=_whole_row(E),
                num_warps=2,
            )  # fmt: skip
            dtable += _product(d.T, rows)
    dbias *= slots.scale
    if dtable is not None:
        dtable *= slots.scale


def _scatter(slots: UsedSlots, partial: Tensor, dx: Tensor, first: int) -> None:
    """Write the sums of partial ``[parts, R, E]`` into dx, at the R used slots from `first` on."""
    parts, R, E = partial.shape
    launch(
        mlm_head_scatter, (R,), partial, slots.index, slots.count, slots.scale, dx, first, R, parts, E=E,
        BLOCK_E=_whole_row(E), num_warps=2,
    )  # fmt: skip


def _whole_row(E: int) -> int:
    """Return the BLOCK_E that covers a whole row."""
    return next_power_of_2(max(E, 16))


def _launch_shape(shape: tuple[int, ...], E: int) -> dict[str, int]:
    """Return a launch shape by name, with a BLOCK_E that is not larger than a row needs."""
    named = dict(zip(("BLOCK_M", "BLOCK_V", "BLOCK_E", "num_warps", "num_stages"), shape, strict=True))
    return named | {"BLOCK_E": min(named["BLOCK_E"], _whole_row(E))}


def _grid(R: int, V: int, shape: dict[str, int]) -> tuple[int, int, int]:
    """Cut R slots and V tokens for about PROGRAMS programs; return the grid and the tiles per program."""
    rows, tiles = cdiv(R, shape["BLOCK_M"]), cdiv(V, shape["BLOCK_V"])
    share = cdiv(tiles, max(PROGRAMS // rows, 1))
    return rows, cdiv(tiles, share), share


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def mlm_head_fwd(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels on the fields of `Inputs`; return (loss [], samples [M], correct [], lse [M])."""
    inputs = Inputs(*arguments)
    slots, results = _used(inputs)
    if len(inputs.x) > 0:
        _sweep(inputs, slots, results, 0, len(inputs.x))
    return _loss(inputs, slots, results)


def mlm_head_bwd(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `mlm_head_fwd`, and the float32 gradients of the loss: dx [M, E], dtable [V, E], dbias [V].

    After the fields of `Inputs` come want_dx and want_dtable; an unwanted gradient is empty.
    """
    *fields, want_dx, want_dtable = arguments
    inputs = Inputs(*fields)
    slots, results = _used(inputs)
    dx = inputs.floats(*inputs.x.shape).zero_() if want_dx else None  # unused slots stay 0
    dtable = inputs.floats(*inputs.table.shape) if want_dtable else None
    dbias = inputs.floats(len(inputs.table))
    if len(inputs.x) > 0 and inputs.narrow:
        _narrow_gradient(inputs, slots, results, dx, dtable, dbias)
    else:  # chunks are added to zeros
        for gradient in (dbias,) if dtable is None else (dbias, dtable):
            gradient.zero_()
        _wide_gradient(inputs, slots, results, dx, dtable, dbias)
    empty = inputs.floats(0)
    gradients = (empty if dx is None else dx, empty if dtable is None else dtable, dbias)
    return *_loss(inputs, slots, results), *gradients
