"""What a model under pre-training does on held-out text: losses, and how well it finds replaced tokens.

The masks and samples of an evaluation are functions of its own seed and of the batch: two evaluations differ
by the model alone.
"""

import contextlib
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from electra_fast.model import Electra

SEED = 2**62  # of the masks; a run's own seed is smaller


def evaluate(model: Electra, batches: Iterable[dict[str, Any]], stop=lambda: False) -> dict[str, float]:
    """Return the metrics of `model` on some batches, each the keyword arguments of its forward.

    Of the masked tokens: ``mlm_loss`` in nats, ``mlm_accuracy``. Of the real tokens: ``rtd_loss``;
    ``replaced``, the share of them that the generator changed; ``precision`` and ``recall`` of a
    discriminator that says replaced where its logit is positive (NaN where it never does); ``logit_std``, the
    standard deviation of its logits, 0 if it answers alike for every token; ``auc``, and ``auc_low`` and
    ``auc_high``, between which it lies with 95 % confidence. Under autocast too the logits are float32's.
    ``stop`` is asked after each batch.
    """
    was_training = model.training
    model.eval()
    totals, areas, spread = 0, [], 0
    with torch.no_grad(), recorded(model) as seen, _float32_logits(model):
        for index, batch in enumerate(batches):
            rng = torch.tensor([SEED, index], device=batch["ids"].device)
            out = model(**batch, rng=rng)
            counts = out.rtd_counts.double()
            sums = [out.mlm_loss * out.masked, out.mlm_correct, out.masked, out.rtd_loss * counts.sum()]
            totals = totals + torch.cat([torch.stack(sums).double(), counts])
            for logits, replaced, weights in seen:
                areas.append(area_under_curve(logits, replaced, weights))
                spread = spread + moments(logits, weights)
            seen.clear()
            if stop():
                break
    model.train(was_training)
    mlm, correct, masked, rtd, tp, fp, fn, tn = totals.tolist()
    tokens = tp + fp + fn + tn
    auc, low, high = interval([a for a in map(float, areas) if not math.isnan(a)])
    return {
        "mlm_loss": _ratio(mlm, masked),
        "mlm_accuracy": _ratio(correct, masked),
        "rtd_loss": _ratio(rtd, tokens),
        "replaced": _ratio(tp + fn, tokens),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "logit_std": standard_deviation(spread).item() if areas else math.nan,
        "auc": auc,
        "auc_low": low,
        "auc_high": high,
    }


def moments(logits: Tensor, weights: Tensor | None) -> Tensor:
    """Return float64 ``[3]``: the number, sum and sum of squares of the logits; padding does not count.

    Made on the device, and added up over batches: the host waits for nothing.
    """
    x = logits.detach().double()
    if weights is None:
        return torch.stack([x.new_tensor(float(x.numel())), x.sum(), x.square().sum()])
    real = weights > 0
    x = torch.where(real, x, 0.0)  # padding may hold anything
    return torch.stack([real.sum(dtype=torch.float64), x.sum(), x.square().sum()])


def standard_deviation(moments: Tensor) -> Tensor:
    """Return the standard deviation that `moments` give, float64 scalar."""
    n, total, squares = moments.unbind()
    return (squares / n - (total / n).square()).clamp(min=0).sqrt()


def area_under_curve(logits: Tensor, replaced: Tensor, weights: Tensor | None) -> Tensor:
    """Return P(a replaced token's logit > an original's) + P(equal) / 2, float64; padding does not count.

    By ranks (Mann and Whitney 1947): with n replaced and m original tokens it is (R - n (n + 1) / 2) / (n m),
    where R is the sum of the ranks of the replaced, equal logits sharing theirs.
    """
    real = slice(None) if weights is None else weights > 0
    x, y = logits[real].float().flatten(), replaced[real].flatten().double()
    _, level, size = x.unique(return_inverse=True, return_counts=True)
    rank = (size.cumsum(0) - (size - 1) / 2).double()[level]
    n, m = y.sum(), (1 - y).sum()
    return ((rank * y).sum() - n * (n + 1) / 2) / (n * m)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval by the values' own spread: each is one batch, so one sample.

    Tokens are no samples of their own: those of a text hang together. Fewer than six values have no interval:
    the expansion of Student's t in 1/f is right to 1 % from there on (Abramowitz and Stegun, 26.7.5).
    """
    n = len(values)
    mean = sum(values) / n if n else math.nan
    if n < 6:
        return mean, math.nan, math.nan
    z, f = 1.96, n - 1
    t = z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
    half = t * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def unigram_loss(train: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """Return the nats a token of `held_out` costs under the frequencies of `train`, each count one higher.

    What a generator knows that has looked at no context: the bar for its loss.
    """
    counts = torch.bincount(train.long(), minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out.long()].mean().item()


@contextlib.contextmanager
def recorded(model: Electra) -> Iterator[list[tuple[Tensor, Tensor, Tensor | None]]]:
    """Keep the arguments of each `rtd_loss`: the logits, which forward's result does not hold."""
    ops, seen = model.ops, []

    def rtd_loss(logits, replaced, weights=None):
        seen.append((logits, replaced, weights))
        return ops.rtd_loss(logits, replaced, weights)

    model.ops = ops._replace(rtd_loss=rtd_loss)
    try:
        yield seen
    finally:
        model.ops = ops


@contextlib.contextmanager
def _float32_logits(model: Electra) -> Iterator[None]:
    """Have the discriminator's last product computed in float32 under autocast too.

    In bfloat16 more than nine tenths of the logits tie with others, and an AUC is made of their order.
    """

    def exact(score: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        if logits.dtype not in (torch.bfloat16, torch.float16):
            return logits
        with torch.autocast(logits.device.type, enabled=False):
            return linear(inputs[0].float(), score.weight.float(), score.bias.float())

    discriminator = getattr(model, "discriminator", None)  # a masked language model has none
    if discriminator is None:
        yield
        return
    hook = discriminator.head.score.register_forward_hook(exact)
    try:
        yield
    finally:
        hook.remove()


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
