"""Write the generator's samples to the masked positions and mark the tokens that changed."""

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.reference import ReplacedTokens

OP = "replace_tokens"

_replace_tokens = operator(
    "replace_tokens(Tensor ids, Tensor positions, Tensor samples, Tensor weights) -> (Tensor, Tensor)",
    default=lambda *args: tuple(reference.replace_tokens(*args)),
    fake=lambda ids, positions, samples, weights: (
        torch.empty_like(ids),
        torch.empty_like(ids, dtype=torch.bool),
    ),
    triton="replace_tokens:replace_tokens",
)


@public(_replace_tokens)
def replace_tokens(
    kernels: Kernels, ids: Tensor, positions: Tensor, samples: Tensor, weights: Tensor
) -> ReplacedTokens:
    """Return the discriminator's input and its labels (Clark et al. 2020, section 2).

    A sample that equals the original token is not a replacement.

    Args:
        ids: the original ids, ``[B, L]`` or ``[T]``, int32 or int64.
        positions: ``[M]`` distinct flat indices into ids, dtype of ids, as `mask_tokens` returns them.
        samples: ``[M]`` dtype of ids, as `mlm_head` returns them.
        weights: ``[M]`` float32; a slot of weight 0 is not written.

    Returns:
        ReplacedTokens(ids, replaced): ids with the samples in place; a bool mask of the ids that changed.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it.
        IndexError: a position is outside ids (CPU only; on CUDA such a slot is not written).
    """
    check.tensor(OP, "ids", ids, check.INTS)
    M = positions.shape if isinstance(positions, Tensor) else ()
    check.tensor(OP, "positions", positions, (ids.dtype,), (None,), ids)
    check.tensor(OP, "samples", samples, (ids.dtype,), M, ids)
    check.tensor(OP, "weights", weights, check.FLOAT32, M, ids)
    return ReplacedTokens(*kernels.fwd(*check.contiguous(ids, positions, samples, weights)))
