"""Means, differences and intervals, computed and formatted for LEARNING.md."""

import math
from collections.abc import Iterable, Sequence

import torch


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is NaN for one value."""
    x = torch.tensor(list(values), dtype=torch.float64)
    return x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else math.nan


def with_error(mean: float, error: float, digits: int = 3) -> str:
    """Return "mean ± error": the mean alone if the error is NaN, nothing if the mean is NaN."""
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" if math.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def interval(found: Sequence[float]) -> str:
    """Return "value [low, high]" from these three numbers."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def auc(point: dict[str, float]) -> str:
    """Return the AUC of an evaluation, with its 95 % interval."""
    return interval([point["auc"], point["auc_low"], point["auc_high"]])


def verb(change: float, noise: float) -> str:
    """Return the verb for a change, which is significant if it is larger than the noise."""
    return "rises" if change > noise else "falls" if change < -noise else "does not change significantly"


def difference(first: Iterable[float], second: Iterable[float]) -> str:
    """Return the difference of two means, and whether it is within two standard errors."""
    (a, a_error), (b, b_error) = mean_and_error(first), mean_and_error(second)
    noise = 2 * math.hypot(a_error, b_error)
    if math.isnan(noise):
        return f"{a - b:+.4f} (one seed has no standard error)"
    verdict = "within" if abs(a - b) <= noise else "outside"
    return f"{a - b:+.4f}, {verdict} two standard errors ({noise:.4f})"


def below_or_above(gap: float) -> str:
    """Return the size of a gap between a loss and a level, and on which side of the level the loss is."""
    return f"{abs(gap):.3f} nats {'below' if gap < 0 else 'above'}"
