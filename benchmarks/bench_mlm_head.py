"""mlm_head: loss and samples over the vocabulary at the masked positions of a real batch."""

from benchmarks.cases import FLOPS, Call, cases


@cases(value=80)
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
