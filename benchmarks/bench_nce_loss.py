"""nce_loss: the loss of Electric and its four counts, on a padded batch."""

import torch

from benchmarks.harness.cases import BYTES, Call, cases


@cases(value=15)
def bench_nce_loss(make):
    x, weights = make.normal(make.B, make.L), make.batch().key_mask.float()
    log_q = -make.normal(make.B, make.L).float().abs()
    noise = torch.rand(x.shape, generator=make.generator, device=x.device) < 0.15
    read = x.nbytes + log_q.nbytes + noise.nbytes + weights.nbytes
    return Call(
        {"energies": x, "log_q": log_q, "noise": noise, "weights": weights, "log_odds": -1.73},
        gradients=("energies",),
        unit=BYTES,
        forward=read,  # read all inputs; the results are a few scalars
        backward=read + x.nbytes,  # read all inputs again, write dx
    )
