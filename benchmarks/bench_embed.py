"""embed: the lookup that both towers share; its backward sums the gradients of equal ids."""

import torch

from benchmarks.harness.cases import BYTES, Call, cases
from benchmarks.harness.inputs import CUDA, Size, by_name
from benchmarks.rivals.embed import RIVALS
from electra_fast.config import ElectraConfig

small, base = ElectraConfig.small, ElectraConfig.base
if CUDA:
    OTHERS = by_name(
        Size("small 128x128 uniform", 128, 128, small, uniform=True),
        Size("base 256x512 uniform", 256, 512, base, uniform=True),
        Size("small 128x128 V=128100", 128, 128, small, 128_100),  # DeBERTa-v3's vocabulary
        Size("base 256x512 V=128100", 256, 512, base, 128_100),
    )
else:
    OTHERS = by_name(
        Size("base 16x128", 16, 128, base),
        Size("small 16x128 uniform", 16, 128, small, uniform=True),
        Size("small 16x128 V=128100", 16, 128, small, 128_100),
    )


@cases(value=50, sizes=OTHERS, rivals=RIVALS)
def bench_embed(make):
    c, E = make.config, make.config.embedding
    ids = make.batch().ids
    if make.size.uniform:
        ids = torch.randint(c.vocab_size, ids.shape, generator=make.generator, device=make.device)
    tables = {
        "word": make.normal(c.vocab_size, E, scale=c.initializer),
        "position": make.normal(c.max_positions, E, scale=c.initializer),
        "type": make.normal(c.type_vocab, E, scale=c.initializer),
        "norm_weight": make.normal(E, scale=0.1, mean=1.0),
        "norm_bias": make.normal(E, scale=0.1),
    }
    rows = ids.numel() * E * tables["word"].element_size()
    return Call(
        {"ids": ids, "type_ids": None, "position_ids": None, **tables, "eps": c.eps, **make.dropout(2)},
        gradients=tuple(tables),
        unit=BYTES,
        forward=2 * rows,  # read a row of the table, write the normalised row
        backward=2 * rows + tables["word"].nbytes,  # read a row and dy, write the table's gradient
    )
