"""embed: the lookup that both towers share, with real ids; its backward scatters into 30 522 rows."""

from benchmarks.cases import BYTES, Call, cases


@cases(value=50)
def bench_embed(make):
    ids, _ = make.batch()
    c, E = make.config, make.config.embedding
    tables = {
        "word": make.normal(c.vocab_size, E, scale=c.initializer),
        "position": make.normal(c.max_positions, E, scale=c.initializer),
        "type": make.normal(c.type_vocab, E, scale=c.initializer),
        "norm_weight": make.normal(E, scale=0.1, mean=1.0),
        "norm_bias": make.normal(E, scale=0.1),
    }
    rows = ids.numel() * E * tables["word"].element_size()
    return Call(
        {"ids": ids, "type_ids": None, "position_ids": None, **tables, "eps": c.eps, **make.site(2)},
        gradients=tuple(tables),
        unit=BYTES,
        forward=2 * rows,  # read a row of the table, write it normalised
        backward=2 * rows + tables["word"].nbytes,  # read a row and dy, write the table's gradient
    )
