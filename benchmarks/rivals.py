"""`mlm_head` out of what others offer: a loss over the vocabulary, and beside it a draw of one's own.

None of them draws, so their user makes the logits once more, a chunk of rows at a time. A rival that is
not installed raises ImportError, which drops it; `correct` and `lse` it cannot give.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import CUDA
from electra_fast.reference import MLMHead

IGNORED = -100
LOGITS = 2**25 if CUDA else 2**21  # a chunk's: enough for every core of a GPU, and what a CPU's cache holds


def chunk(table: Tensor) -> int:
    """Return how many rows of logits make a chunk."""
    return max(1, LOGITS // len(table))


@torch.no_grad()
def draw(x: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """Return a sample a row by the inverse CDF: on a CPU, a fifth of the Gumbel arg-max's time."""
    samples = []
    for rows in x.split(chunk(table)):
        cdf = F.linear(rows, table, bias).float().softmax(-1).cumsum(-1)
        u = torch.rand(len(rows), 1, device=x.device) * cdf[:, -1:]  # rounding may end a CDF below 1
        samples.append(torch.searchsorted(cdf, u)[:, 0])
    return torch.cat(samples)


def with_a_draw(loss: Callable[..., Tensor], synchronizes: bool = False) -> Callable[..., MLMHead]:
    """Return the op out of `loss(x, table, bias, targets)`, for weights of 0 and 1."""

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
    """The default, whose logits are all there at once."""
    loss = torch_has(F, "linear_cross_entropy")
    return loss(x, table, targets, linear_bias=bias, ignore_index=IGNORED, options=options)


def linear_ce_chunked(x, table, bias, targets):
    """In chunks like the draw's; those that it takes by itself have 8 rows at 128 columns, and are slower."""
    options = torch_has(torch.nn, "LinearCrossEntropyOptions")
    return linear_ce(x, table, bias, targets, options(batch_chunk_size=chunk(table)))


def liger(x, table, bias, targets):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)(table, x, targets, bias)


def cce(x, table, bias, targets):
    """The form that its authors advise for pre-training: no gradient is filtered from the table's."""
    from cut_cross_entropy import linear_cross_entropy

    if "bias" not in inspect.signature(linear_cross_entropy).parameters:
        raise ImportError("this cut_cross_entropy takes no bias; that of its repository does")
    return linear_cross_entropy(x, table, targets, bias=bias, ignore_index=IGNORED, impl="cce_kahan_full_c")


RIVALS = {"linear_ce_chunked": with_a_draw(linear_ce_chunked), "linear_ce": with_a_draw(linear_ce)}
if CUDA:  # both are Triton; both ask the device how many labels count
    RIVALS |= {
        "liger": with_a_draw(liger, synchronizes=True),
        "cce": with_a_draw(cce, synchronizes=True),
    }
