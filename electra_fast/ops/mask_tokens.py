"""Choose the masked positions of each sequence and write [MASK] to them."""

import torch
from torch import Tensor

from electra_fast import reference
from electra_fast.errors import must
from electra_fast.ops import _check as check
from electra_fast.ops._operators import operator
from electra_fast.ops._public import Kernels, public
from electra_fast.reference import MaskedTokens

OP = "mask_tokens"


def _default(ids, candidates, rng, key_mask, cu_seqlens, max_seqlen, mask_id, mask_rate, keep_rate):
    return tuple(
        reference.mask_tokens(
            ids,
            candidates,
            rng,
            mask_id=mask_id,
            mask_prob=mask_rate / 2**32,  # exact, as a rate has at most 33 bits
            keep_prob=keep_rate / 2**32,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
    )


def _fake(ids, candidates, rng, key_mask, cu_seqlens, max_seqlen, mask_id, mask_rate, keep_rate):
    M = reference.slot_count(ids, mask_rate, cu_seqlens)
    weights = ids.new_empty(M, dtype=torch.float32)
    return torch.empty_like(ids), ids.new_empty(M), ids.new_empty(M), weights


_mask_tokens = operator(
    "mask_tokens(Tensor ids, Tensor candidates, Tensor rng, Tensor? key_mask, Tensor? cu_seqlens, "
    "SymInt max_seqlen, int mask_id, int mask_rate, int keep_rate) -> (Tensor, Tensor, Tensor, Tensor)",
    default=_default,
    fake=_fake,
    triton="mask_tokens:mask_tokens",
)


@public(_mask_tokens)
def mask_tokens(
    kernels: Kernels,
    ids: Tensor,
    candidates: Tensor,
    rng: Tensor,
    *,
    mask_id: int,
    mask_prob: float = 0.15,
    keep_prob: float = 0.15,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> MaskedTokens:
    """Mask k of the candidates of each sequence, uniformly without replacement (Clark et al. 2020, 2).

    With n real tokens and c candidates in a sequence, ``k = min(c, max(1, round(n * mask_prob)))``, in
    integer arithmetic. A masked position becomes ``mask_id``; a share ``keep_prob`` of them keeps its id and
    is predicted too.

    Args:
        ids: ``[B, L]`` padded or ``[T]`` packed, int32 or int64.
        candidates: bool, shape of ids; the tokens that may be masked: real and not special.
        rng: int64 ``[2]`` = (seed, step) on the device of ids. Equal rng give equal masks on every backend.
        mask_id: the id of [MASK].
        mask_prob: share of the real tokens that is masked, in (0, 1].
        keep_prob: share of the masked positions that keeps its id, in [0, 1].
        key_mask: bool ``[B, L]``, True = real; None: all are. Candidates that are not real are ignored.
        cu_seqlens: int32 or int64 ``[B + 1]``, from 0 to T, of a packed batch.
        max_seqlen: the longest sequence of a packed batch, or more.

    Returns:
        MaskedTokens(ids, positions ``[M]``, targets ``[M]``, weights ``[M]``). M depends on shapes only. The
        first k slots of a sequence have its masked positions in rising order, the others have weight 0.

    Raises:
        TypeError, ValueError: an argument breaks these rules; the message names it. The values of cu_seqlens
            are checked on the CPU only; on CUDA wrong ones make weights NaN and write nothing outside.
    """
    check.tensor(OP, "ids", ids, check.INTS)
    check.tensor(OP, "candidates", candidates, check.BOOL, ids.shape, ids)
    check.tensor(OP, "rng", rng, (torch.int64,), (2,), ids)
    limits = torch.iinfo(ids.dtype)
    if not isinstance(mask_id, int) or isinstance(mask_id, bool):
        raise TypeError(must("mask_tokens: mask_id", "be an int", repr(mask_id)))
    if not limits.min <= mask_id <= limits.max:
        rule = f"be a number of ids' dtype, {str(ids.dtype).removeprefix('torch.')}"
        raise ValueError(must("mask_tokens: mask_id", rule, mask_id))
    if not 0 < mask_prob <= 1:
        raise ValueError(must("mask_tokens: mask_prob", "be in (0, 1]", mask_prob))
    if not 0 <= keep_prob <= 1:
        raise ValueError(must("mask_tokens: keep_prob", "be in [0, 1]", keep_prob))
    if cu_seqlens is not None:
        check.packed(OP, ids, cu_seqlens, key_mask, max_seqlen)
    else:
        check.tensor(OP, "ids", ids, check.INTS, (None, None))
        check.optional(OP, "key_mask", key_mask, check.BOOL, ids.shape, ids)
        max_seqlen = ids.shape[1]
    rates = (reference.rate(mask_prob), round(keep_prob * 2**32))
    x = check.contiguous(ids, candidates, rng, key_mask, cu_seqlens)
    return MaskedTokens(*kernels.fwd(*x, max_seqlen, mask_id, *rates))
