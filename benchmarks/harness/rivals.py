"""`mlm_head` built from other libraries: their loss over the vocabulary, plus a separate sampling step.

These losses do not sample, so their user computes the logits a second time, one chunk of rows after another.
They return neither `correct` nor `lse`. A rival that is not installed raises ImportError and is dropped.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.inputs import CUDA
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
    return mlm_head


def torch_has(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        raise ImportError(f"torch {torch.__version__} has no {module.__name__}.{name}")
    return getattr(module, name)


def linear_ce(x, table, bias, targets, options=None):
    """torch's default, which holds all logits in memory at the same time."""
    loss = torch_has(F, "linear_cross_entropy")
    return loss(x, table, targets, linear_bias=bias, ignore_index=IGNORED, options=options)


def linear_ce_chunked(x, table, bias, targets):
    """In the chunks of `draw`. torch's own chunks have 8 rows at 128 columns and are slower."""
    options = torch_has(torch.nn, "LinearCrossEntropyOptions")
    return linear_ce(x, table, bias, targets, options(batch_chunk_size=chunk(table)))


def liger(x, table, bias, targets):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)(table, x, targets, bias)


def cce(x, table, bias, targets):
    """The variant that its authors recommend for pre-training, which does not filter the table's gradient."""
    from cut_cross_entropy import linear_cross_entropy

    if "bias" not in inspect.signature(linear_cross_entropy).parameters:
        raise ImportError("this cut_cross_entropy has no bias; the version in its repository has one")
    return linear_cross_entropy(x, table, targets, bias=bias, ignore_index=IGNORED, impl="cce_kahan_full_c")


RIVALS = {"linear_ce_chunked": with_a_draw(linear_ce_chunked), "linear_ce": with_a_draw(linear_ce)}
if CUDA:  # both are Triton kernels, and both wait for the number of labels that count
    RIVALS |= {"liger": with_a_draw(liger, synchronizes=True), "cce": with_a_draw(cce, synchronizes=True)}
