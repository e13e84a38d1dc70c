"""mlm_head: loss and samples over the vocabulary, at the masked positions of a real batch."""

from benchmarks.harness.cases import FLOPS, Call, cases
from benchmarks.harness.inputs import CUDA, REHEARSAL, Size, by_name
from benchmarks.rivals.mlm_head import RIVALS
from electra_fast.config import ElectraConfig

if REHEARSAL:
    LARGER = {}
elif CUDA:
    LARGER = by_name(
        Size("large 64x512", 64, 512, ElectraConfig.large),  # masks a quarter of the tokens
        Size("small 128x128 V=128100", 128, 128, ElectraConfig.small, 128_100),  # DeBERTa-v3's vocabulary
        Size("base 256x512 V=128100", 256, 512, ElectraConfig.base, 128_100),
    )
else:
    LARGER = by_name(Size("small 128x128", 128, 128, ElectraConfig.small))


@cases(value=80, sizes=LARGER, rivals=RIVALS)
def bench_mlm_head(make):
    masked = make.masked()
    M, V, E = len(masked.targets), make.config.vocab_size, make.config.embedding
    args = {"x": make.normal(M, E), "table": make.normal(V, E, scale=0.1), "bias": make.normal(V)}
    return Call(
        args | {"targets": masked.targets, "weights": masked.weights, "rng": make.rng},
        gradients=tuple(args),
        unit=FLOPS,
        forward=2 * M * V * E,  # x table^T
        backward=4 * M * V * E,  # the gradients of x and table
    )
