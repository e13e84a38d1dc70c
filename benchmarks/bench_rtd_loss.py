"""rtd_loss: the discriminator's loss and its four counts, on a padded batch."""

import torch

from benchmarks.harness.cases import BYTES, Call, cases


@cases(value=35)
def bench_rtd_loss(make):
    x, weights = make.normal(make.B, make.L), make.batch().key_mask.float()
    replaced = torch.rand(x.shape, generator=make.generator, device=x.device) < 0.1
    read = x.nbytes + replaced.nbytes + weights.nbytes
    return Call(
        {"logits": x, "replaced": replaced, "weights": weights},
        gradients=("logits",),
        unit=BYTES,
        forward=read,  # read all inputs; the results are a few scalars
        backward=read + x.nbytes,  # read all inputs again, write dx
    )
