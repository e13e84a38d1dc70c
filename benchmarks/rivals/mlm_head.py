"""`mlm_head` built from other libraries: their loss over the vocabulary, plus a separate sampling step.

These losses do not sample, so their user computes the logits a second time, one chunk of rows after another.
They return neither `correct` nor `lse`. A rival that is not installed raises ImportError and is dropped.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.inputs import CUDA
from benchmarks.rivals import gpu, needs, package, torch_has
from electra_fast.reference import MLMHead

IGNORED = -100
LOGITS = 2**25 if CUDA else 2**21  # logits per chunk: they occupy all of a GPU, or fit into a CPU's cache


def chunk(table: Tensor) -> int:
    """Return the number of rows per chunk."""
    return max(1, LOGITS // len(table))


@torch.no_grad()
def draw(x: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """Sample one token per row by the inverse CDF: on a CPU it needs a fifth of the Gumbel arg-max's time."""
    samples = []
    for rows in x.split(chunk(table)):
        cdf = F.linear(rows, table, bias).float().softmax(-1).cumsum(-1)
        u = torch.rand(len(rows), 1, device=x.device) * cdf[:, -1:]  # rounding: the CDF may end below 1
        samples.append(torch.searchsorted(cdf, u)[:, 0])
    return torch.cat(samples)


def with_a_draw(loss: Callable[..., Tensor], synchronizes: bool = False) -> Callable[..., MLMHead]:
    """Return `mlm_head` built from `loss(x, table, bias, targets)`, for weights of 0 and 1."""

    def mlm_head(x, table, bias, targets, weights, rng):
        labels = targets.long().masked_fill(weights == 0, IGNORED)
        samples = draw(x, table, bias).to(targets.dtype)
        return MLMHead(loss(x, table, bias, labels), samples, correct=None, lse=None)

    mlm_head.synchronizes = synchronizes
    return needs(*loss.needs)(mlm_head)


def cute() -> None:
    """Require torch's CuTe kernel of linear_cross_entropy, which torch uses if two packages are installed."""
    torch_has("torch._native.ops", "linear_cross_entropy")()
    from torch._native import cutedsl_utils

    if not cutedsl_utils.runtime_available():
        raise ImportError("nvidia-cutlass-dsl and apache-tvm-ffi are not installed")


in_torch = torch_has("torch.nn.functional", "linear_cross_entropy")


@needs(in_torch)
def linear_ce(x, table, bias, targets, **options):
    """torch's default, which holds all logits in memory at the same time; `options` select chunks."""
    chunks = torch.nn.LinearCrossEntropyOptions(**options) if options else None
    settings = {"linear_bias": bias, "ignore_index": IGNORED, "options": chunks}
    return F.linear_cross_entropy(x, table, targets, **settings)


@needs(in_torch, torch_has("torch.nn", "LinearCrossEntropyOptions"))
def linear_ce_chunked(x, table, bias, targets):
    """In the chunks of `draw`. torch's own chunks have 8 to 16 rows at 128 columns and are slower."""
    return linear_ce(x, table, bias, targets, batch_chunk_size=chunk(table))


@needs(*linear_ce_chunked.needs)
def linear_ce_one(x, table, bias, targets):
    """All rows in one chunk: the gradients are computed in the forward pass, by the fewest products."""
    return linear_ce(x, table, bias, targets, batch_chunk_size=len(x))


@needs(gpu, *linear_ce_chunked.needs, cute)
def linear_ce_cute(x, table, bias, targets):
    """One chunk in the dtypes for which torch has a CuTe kernel, with which it replaces its own."""
    dtypes = {"acc_policy": "compact", "acc_dtype": torch.float32}
    return linear_ce(x, table, bias, targets, batch_chunk_size=len(x), **dtypes)


@needs(gpu, package("liger_kernel"))
def liger(x, table, bias, targets):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)(table, x, targets, bias)


@needs(gpu, package("quack"))
def quack(x, table, bias, targets):
    """cuBLAS's logits and quack's loss, which overwrites them by their gradient; in chunks it has no bias."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    settings = {"ignore_index": IGNORED, "inplace_backward": True}
    return linear_cross_entropy_func(x, table, bias, targets, **settings)


@needs(gpu, package("cut_cross_entropy"))
def cce(x, table, bias, targets):
    """The variant that its authors recommend for pre-training, which does not filter the table's gradient."""
    from cut_cross_entropy import linear_cross_entropy

    if "bias" not in inspect.signature(linear_cross_entropy).parameters:
        raise ImportError("this cut_cross_entropy has no bias; the version in its repository has one")
    return linear_cross_entropy(x, table, targets, bias=bias, ignore_index=IGNORED, impl="cce_kahan_full_c")


LOSSES = (linear_ce_chunked, linear_ce_one, linear_ce, linear_ce_cute, quack)
RIVALS = {loss.__name__: with_a_draw(loss) for loss in LOSSES}
# Both wait for the number of labels that count.
RIVALS |= {loss.__name__: with_a_draw(loss, synchronizes=True) for loss in (liger, cce)}
