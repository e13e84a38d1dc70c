"""The generator's head: tied vocabulary projection, its loss, one sample a slot, and the gradient, in sweeps
over tiles of logits that are not kept (Clark et al. 2020, eq. 1).

    used        which slots have a weight: the others cost nothing
    sweep       logits of BLOCK_M slots and BLOCK_V tokens; of each slot and SUB tokens the maximum and the
                sum of exponentials
    draw        a slot's log-sum-exp from those; one uniform picks the SUB tokens by their masses in float64,
                a second look at them the token; another look gives the target's logit
    loss        the weighted mean, added up in a fixed order
    gradient    d = w (softmax - onehot) / sum(w), times the table and times x

For narrow rows the gradient's kernels make the logits again and hold their sums in registers. For wide ones,
and for float32, the sums do not fit: the sweep keeps the exponentials of a chunk of slots, and cuBLAS
multiplies. Differences of logits are in units of log 2, so that an exponential is one instruction; the logits
themselves may be so large that these units do not hold them. No result depends on the order in which programs
end.
"""

import torch
import triton
from torch import Tensor

from electra_fast.kernels._common import architecture, refuse_float64
from electra_fast.kernels._mlm_draw import mlm_head_draw, mlm_head_loss
from electra_fast.kernels._mlm_gradient import (
    mlm_head_difference,
    mlm_head_dtable,
    mlm_head_dx,
    mlm_head_gather,
    mlm_head_scatter,
)
from electra_fast.kernels._mlm_sweep import mlm_head_sweep, mlm_head_used

SUB = 32  # tokens behind one maximum and one sum; a second look reads as many rows of the table
NARROW = 128  # columns up to which the gradient's sums stay in registers: at 256 they spill on sm_86 and 100
CHUNK_BYTES = 512 << 20  # of kept exponentials
PROGRAMS = 396  # that a sweep is cut into: three for each multiprocessor of an H100 or H200
BLOCK = 1024  # slots, or blocks of tokens, that one program takes at a time

# (BLOCK_M, BLOCK_V, BLOCK_E, warps, stages), none of which spills: DESIGN.md has the registers.
SWEEP = (128, 64, 128, 8, 3)
DX = (128, 64, 128, 8, 2)
DTABLE = (64, 64, 128, 4, 2)
WIDE_SWEEP = (128, 128, 64, 8, 3)
WIDEST_SWEEP = (128, 256, 64, 8, 3)  # for the matrix units of sm_90 and sm_100; others would spill
FLOAT32_SWEEP = (128, 64, 32, 8, 3)


def _blocks(shape: tuple[int, ...], E: int) -> dict[str, int]:
    names = ("BLOCK_M", "BLOCK_V", "BLOCK_E", "num_warps", "num_stages")
    blocks = dict(zip(names, shape, strict=True))
    return blocks | {"BLOCK_E": min(blocks["BLOCK_E"], triton.next_power_of_2(max(E, 16)))}


class _Head:
    """The arguments of one call, what its kernels hand on, and their launches in the order of the page."""

    def __init__(self, x, table, bias, targets, weights, rng, temperature, disallow_correct):
        refuse_float64("mlm_head", "x", x)
        (self.M, self.E), self.V = x.shape, len(table)
        self.x, self.table, self.targets, self.weights, self.rng = x, table, targets, weights, rng
        self.disallow_correct = disallow_correct
        # A float32 whose product with 0 is 0, and with -inf -inf.
        self.inverse_temperature = min(max(1 / temperature, 1.2e-38), 3e38)
        self.narrow = self.E <= NARROW and x.dtype != torch.float32
        self.subs = triton.cdiv(self.V, SUB)
        self.row = {"E": self.E, "BLOCK_E": triton.next_power_of_2(max(self.E, 16))}

        self.samples, self.lse = torch.empty_like(targets), self.floats(self.M)
        self.loss, self.correct, self.scale = (self.floats() for _ in range(3))
        self.used = {"index_ptr": x.new_empty(self.M, dtype=torch.int32)}
        self.used["count_ptr"] = x.new_empty((), dtype=torch.int32)
        unit = self.floats(self.M)
        self.norm, self.nll, self.leads = self.floats(self.M, 2), self.floats(self.M), self.floats(self.M)
        self.operands = {"x_ptr": x, "table_ptr": table, "bias_ptr": bias, "V": self.V, **self.used}
        self.slots = {"targets_ptr": targets, "weights_ptr": unit, "norm_ptr": self.norm, **self.used}

        mlm_head_used[(1,)](
            weights, **self.used, unit_ptr=unit, scale_ptr=self.scale, samples_ptr=self.samples,
            lse_ptr=self.lse, M=self.M, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip

    def floats(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def sweep(self, first: int, R: int, kept: Tensor | None = None) -> Tensor:
        """Sweep and draw for R used slots from `first` on; return the maxima ``[R, subs]``."""
        maxima, sums = self.floats(R, self.subs), self.floats(R, self.subs)
        tempered = None if self.inverse_temperature == 1 else self.floats(R, self.subs)
        both = {
            "maxima_ptr": maxima,
            "sums_ptr": sums,
            "tempered_ptr": tempered,
            "blocks": self.subs,
            "SUB": SUB,
        }
        both |= {"first": first, "inverse_temperature": self.inverse_temperature, **self.operands}

        shape = SWEEP if self.narrow else WIDEST_SWEEP if architecture() in (90, 100) else WIDE_SWEEP
        shape = FLOAT32_SWEEP if self.x.dtype == torch.float32 else shape
        blocks = _blocks(shape, self.E)
        rows, programs, tiles = _grid(R, self.V, blocks)
        mlm_head_sweep[(rows, programs)](
            **both,
            kept_ptr=kept,
            stride=0 if kept is None else kept.stride(0),
            tiles=tiles,
            E=self.E,
            **blocks,
        )
        mlm_head_draw[(R,)](
            **both, targets_ptr=self.targets, rng_ptr=self.rng, samples_ptr=self.samples, lse_ptr=self.lse,
            norm_ptr=self.norm, nll_ptr=self.nll, leads_ptr=self.leads, DISALLOW=self.disallow_correct,
            E=self.E, BLOCK=BLOCK, BLOCK_E=min(self.row["BLOCK_E"], 32), num_warps=4,
        )  # fmt: skip
        return maxima

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mlm_head_loss[(1,)](
            self.weights, **self.used, nll_ptr=self.nll, leads_ptr=self.leads, loss_ptr=self.loss,
            correct_ptr=self.correct, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        return self.loss, self.samples, self.correct, self.lse

    def narrow_gradient(self, dx: Tensor | None, dtable: Tensor | None, dbias: Tensor) -> None:
        self.sweep(0, self.M)
        arguments = self.operands | self.slots | {"E": self.E}
        if dx is not None:
            blocks = _blocks(DX, self.E)
            rows, programs, tiles = _grid(self.M, self.V, blocks)
            partial = self.floats(programs, self.M, self.E)
            mlm_head_dx[(rows, programs)](**arguments, partial_ptr=partial, tiles=tiles, M=self.M, **blocks)
            self.scatter(partial, dx, 0)
        blocks = _blocks(DTABLE, self.E)
        mlm_head_dtable[(triton.cdiv(self.V, blocks["BLOCK_V"]),)](
            **arguments, scale_ptr=self.scale, dtable_ptr=dtable, dbias_ptr=dbias, **blocks
        )

    def wide_gradient(self, dx: Tensor | None, dtable: Tensor | None, dbias: Tensor) -> None:
        stride = triton.cdiv(self.V, 128) * 128  # rows that cuBLAS reads fast
        chunk = max(CHUNK_BYTES // (stride * self.x.element_size()) // 128 * 128, 128)
        for first in range(0, self.M, chunk):
            R = min(chunk, self.M - first)
            kept = self.x.new_empty(R, stride)
            maxima = self.sweep(first, R, kept)
            mlm_head_difference[(stride // 128,)](
                kept, maxima, **self.slots, dbias_ptr=dbias, first=first, R=R, V=self.V, blocks=self.subs,
                stride=stride, BLOCK_M=32, BLOCK_V=128, SUB=SUB, num_warps=8,
            )  # fmt: skip
            d = kept[:, : self.V]
            if dx is not None:
                self.scatter(_product(d, self.table)[None], dx, first)
            if dtable is not None:
                x = self.x.new_empty(R, self.E)
                mlm_head_gather[(R,)](self.x, **self.used, out_ptr=x, first=first, **self.row, num_warps=2)
                dtable += _product(d.T, x)
        dbias *= self.scale
        if dtable is not None:
            dtable *= self.scale

    def scatter(self, partial: Tensor, dx: Tensor, first: int) -> None:
        parts, R, _ = partial.shape
        mlm_head_scatter[(R,)](
            partial, **self.used, scale_ptr=self.scale, dx_ptr=dx, first=first, R=R, parts=parts, **self.row,
            num_warps=2,
        )  # fmt: skip


def _grid(R: int, V: int, blocks: dict[str, int]) -> tuple[int, int, int]:
    """Cut R slots and V tokens for about PROGRAMS programs; return rows, programs and tiles a program."""
    rows, tiles = triton.cdiv(R, blocks["BLOCK_M"]), triton.cdiv(V, blocks["BLOCK_V"])
    share = triton.cdiv(tiles, max(PROGRAMS // rows, 1))
    return rows, triton.cdiv(tiles, share), share


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def mlm_head_fwd(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    rng: Tensor,
    temperature: float,
    disallow_correct: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the kernels on contiguous tensors; return (loss [], samples [M], correct [], lse [M])."""
    head = _Head(x, table, bias, targets, weights, rng, temperature, disallow_correct)
    if head.M > 0:
        head.sweep(0, head.M)
    return head.results()


def mlm_head_bwd(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    rng: Tensor,
    temperature: float,
    disallow_correct: bool,
    want_dx: bool,
    want_dtable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `mlm_head_fwd`, and the float32 gradients of the loss: dx [M, E], dtable [V, E], dbias [V].

    What is not wanted is empty.
    """
    head = _Head(x, table, bias, targets, weights, rng, temperature, disallow_correct)
    dx = head.floats(*x.shape).zero_() if want_dx else None  # unused slots stay 0
    dtable = head.floats(*table.shape) if want_dtable else None
    dbias = head.floats(head.V)
    if head.M > 0 and head.narrow:
        head.narrow_gradient(dx, dtable, dbias)
    else:  # chunks are added up
        for total in (dbias,) if dtable is None else (dbias, dtable):
            total.zero_()
        head.wide_gradient(dx, dtable, dbias)
    nothing = head.floats(0)
    return *head.results(), nothing if dx is None else dx, nothing if dtable is None else dtable, dbias
