"""Evaluate a model in pre-training on held-out text: losses, and how well it finds replaced tokens.

Masks and samples are functions of a fixed seed and the batch, so two evaluations differ only by the model.
"""

import contextlib
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from electra_fast.config import ElectraConfig
from electra_fast.distributed import ALONE, World
from electra_fast.model import Electra, ElectraOutput

SEED = 2**62  # of the masks; the seeds of runs are smaller


class Judged(NamedTuple):
    """What the discriminator says about the tokens of a micro-batch."""

    output: Tensor  # its output: a logit, of Electric the energy
    replaced: Tensor  # bool: the token was replaced, of Electric: it is noise
    weights: Tensor | None  # 0 for a token that does not count
    log_q: Tensor | None = None  # of Electric
    log_odds: float = 0.0  # of Electric

    def logits(self) -> Tensor:
        """Return logits of `replaced`; they are computed in evaluation only, not in each step."""
        return self.output if self.log_q is None else self.output + self.log_q + self.log_odds


def evaluate(
    model: Electra, batches: Iterable[dict[str, Any]], stop=lambda: False, world: World = ALONE
) -> dict[str, float]:
    """Return the metrics of `model` on some batches, each the keyword arguments of its forward.

    Process r of W has the batches r, r + W, …; the result is the same in all, for any W.

    Over the masked tokens: ``mlm_loss`` in nats, and ``mlm_accuracy``. Over the real tokens: ``rtd_loss``;
    ``replaced``, the share that the generator changed; ``precision`` and ``recall`` of the prediction
    "replaced" for positive logits (NaN without such a prediction); ``logit_std``, the standard deviation of
    the logits; ``auc``, with its 95 % interval from ``auc_low`` to ``auc_high``. The logits are float32 under
    autocast too. The evaluation ends early if ``stop()`` is true after a batch.

    Of Electric, all these are about noise instead of replaced tokens: ``rtd_loss`` is the NCE loss over the
    tokens that count in it, and ``logit_std`` the standard deviation of the energies.
    """
    was_training = model.training
    model.eval()
    rows: dict[int, Tensor] = {}  # by number of the batch
    with torch.no_grad(), recorded(model) as seen, _float32_logits(model):
        for index, batch in zip(itertools.count(world.rank, world.size), batches):
            rng = torch.tensor([SEED, index], device=batch["ids"].device)
            rows[index] = _row(model(**batch, rng=rng), seen)
            seen.clear()
            if stop():
                break
    model.train(was_training)
    found = world.merged({index: row.tolist() for index, row in rows.items()})
    table = torch.tensor(found, dtype=torch.float64, device="cpu")
    mlm, correct, masked, rtd, tp, fp, fn, tn = table[:, :8].sum(0).tolist()
    tokens = tp + fp + fn + tn
    auc, low, high = interval([a for a in table[:, 8].tolist() if not math.isnan(a)])
    return {
        "mlm_loss": _ratio(mlm, masked),
        "mlm_accuracy": _ratio(correct, masked),
        "rtd_loss": _ratio(rtd, tokens),
        "replaced": _ratio(tp + fn, tokens),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "logit_std": standard_deviation(table[:, 9:].sum(0)).item(),
        "auc": auc,
        "auc_low": low,
        "auc_high": high,
    }


def _row(out: ElectraOutput, seen: list[Judged]) -> Tensor:
    """Return the numbers of a batch, float64 ``[12]`` on its device: 4 sums, 4 counts, the AUC, `moments`."""
    counts = out.rtd_counts.double()
    sums = [out.mlm_loss * out.masked, out.mlm_correct, out.masked, out.rtd_loss * counts.sum()]
    logits = [counts.new_full((4,), torch.nan)]  # of a model without a discriminator
    for each in seen:
        area = area_under_curve(each.logits(), each.replaced, each.weights)
        logits = [area.reshape(1), moments(each.output, each.weights)]
    return torch.cat([torch.stack(sums).double(), counts, *logits])


def summary(metrics: dict[str, float], loss: str = "RTD") -> str:
    """Return the metrics of `evaluate` in one line; `loss` is the name of the discriminator's."""
    words = "MLM loss {mlm_loss:.3f}, accuracy {mlm_accuracy:.3f}; {loss} loss {rtd_loss:.4f}, AUC {auc:.3f}"
    if not math.isnan(metrics["auc_low"]):  # fewer than six batches have no interval
        words += " [{auc_low:.3f}, {auc_high:.3f}]"
    return words.format(loss=loss, **metrics)


def moments(logits: Tensor, weights: Tensor | None) -> Tensor:
    """Return float64 ``[3]``: number, sum and sum of squares of the logits, without padding.

    It is computed on the device and can be added over batches, so the host does not synchronize.
    """
    x = logits.detach().double()
    if weights is None:
        return torch.stack([x.new_tensor(float(x.numel())), x.sum(), x.square().sum()])
    real = weights > 0
    x = torch.where(real, x, 0.0)  # padding may contain anything
    return torch.stack([real.sum(dtype=torch.float64), x.sum(), x.square().sum()])


def standard_deviation(moments: Tensor) -> Tensor:
    """Return the standard deviation, a float64 scalar, from `moments`."""
    n, total, squares = moments.unbind()
    return (squares / n - (total / n).square()).clamp(min=0).sqrt()


def area_under_curve(logits: Tensor, replaced: Tensor, weights: Tensor | None) -> Tensor:
    """Return P(logit of a replaced token > of an original one) + P(equal) / 2, float64, without padding.

    By ranks (Mann and Whitney 1947): with n replaced and m original tokens it is (R - n (n + 1) / 2) / (n m),
    where R is the sum of the ranks of the replaced tokens; equal logits share their mean rank.
    """
    real = slice(None) if weights is None else weights > 0
    x, y = logits[real].float().flatten(), replaced[real].flatten().double()
    _, level, size = x.unique(return_inverse=True, return_counts=True)
    rank = (size.cumsum(0) - (size - 1) / 2).double()[level]
    n, m = y.sum(), (1 - y).sum()
    return ((rank * y).sum() - n * (n + 1) / 2) / (n * m)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean of values and its 95 % interval; each value is one batch.

    The tokens of one text are correlated, so the batch is the sampling unit. The interval needs six values:
    from there on the expansion of Student's t in 1/f is exact to 1 % (Abramowitz and Stegun, 26.7.5).
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
    """Return the nats per token of `held_out` under the frequencies of `train`, with 1 added to each count.

    It is the entropy of a generator that uses no context; see `loss_without_context`.
    """
    counts = torch.bincount(train.long(), minlength=vocab_size).double() + 1
    return -(counts / counts.sum()).log()[held_out.long()].mean().item()


def loss_without_context(unigram: float, config: ElectraConfig) -> float:
    """Return the loss of a generator that knows the frequencies of the tokens, and no context.

    A masked position keeps its token with probability `keep_prob`; there it can be copied.
    """
    if config.generator_kind == "uniform":
        return math.log(config.vocab_size)
    copied = config.generator_kind == "masked" and config.objective == "electra"
    return unigram * (1 - config.keep_prob * copied)


@contextlib.contextmanager
def recorded(model: Electra) -> Iterator[list[Judged]]:
    """Record the arguments of each call of `rtd_loss` or `nce_loss`: forward does not return the logits.

    A model for another task, without `ops`, has no such call.
    """
    seen: list[Judged] = []
    if (ops := getattr(model, "ops", None)) is None:
        yield seen
        return

    def rtd_loss(logits, replaced, weights=None):
        seen.append(Judged(logits, replaced, weights))
        return ops.rtd_loss(logits, replaced, weights)

    def nce_loss(energies, log_q, noise, weights=None, *, log_odds=0.0):
        seen.append(Judged(energies, noise, weights, log_q, log_odds))
        return ops.nce_loss(energies, log_q, noise, weights, log_odds=log_odds)

    model.ops = ops._replace(rtd_loss=rtd_loss, nce_loss=nce_loss)
    try:
        yield seen
    finally:
        model.ops = ops


@contextlib.contextmanager
def _float32_logits(model: Electra) -> Iterator[None]:
    """Compute the last product of the discriminator in float32 under autocast too.

    In bfloat16 more than 90 % of the logits are equal to others, and an AUC depends on their order.
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
