"""`embed` with Liger's lookup in the table of words; atomic additions in Triton sum its gradient."""

import torch.nn.functional as F

from benchmarks.rivals import gpu, needs, package


@needs(gpu, package("liger_kernel"))
def liger(
    ids, type_ids, position_ids, word, position, type, norm_weight, norm_bias,
    *, eps, dropout=0.0, rng=None, stream=0,
):  # fmt: skip
    """The benchmark has no type ids and no position ids: type 0, and positions from 0 on."""
    from liger_kernel.ops import LigerEmbeddingFunction

    x = LigerEmbeddingFunction.apply(word, ids) + position[: ids.shape[1]] + type[0]
    return F.dropout(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), dropout)


RIVALS = {"liger": liger}
