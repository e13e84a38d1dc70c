"""replace_tokens: write the generator's samples over the masked tokens."""

import torch

from benchmarks.harness.cases import BYTES, Call, cases


@cases(value=20)
def bench_replace_tokens(make):
    ids, masked = make.batch().ids, make.masked()
    samples = torch.randint_like(masked.targets, make.config.vocab_size)
    slots = {"positions": masked.positions, "samples": samples, "weights": masked.weights}
    return Call(
        {"ids": ids, **slots},
        unit=BYTES,
        # read and write ids, write one flag per token; read position, sample and weight of each slot
        forward=2 * ids.nbytes + ids.numel() + sum(x.nbytes for x in slots.values()),
    )
