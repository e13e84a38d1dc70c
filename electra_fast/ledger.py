"""What each step of pre-training measured: one row per step, on the device, read without stopping it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """What a step measured, summed over its micro-batches."""

    loss: float
    mlm_loss: float  # over all masked tokens
    mlm_correct: float
    masked: float
    rtd_loss: float
    true_positives: float
    false_positives: float
    false_negatives: float
    true_negatives: float
    gradient_norm: float
    skipped: float  # 1 where the gradient was not finite, and nothing changed

    @property
    def replaced(self) -> float:
        return self.true_positives + self.false_negatives

    @property
    def original(self) -> float:
        return self.false_positives + self.true_negatives

    @property
    def collapsed(self) -> bool:
        """Whether the generator replaces nothing or knows everything: there is nothing to find then."""
        return self.masked > 0 and (self.mlm_correct == self.masked or 0 == self.replaced < self.original)


class Ledger:
    """The rows of the steps since it was last begun anew."""

    def __init__(self, rows: int, device: torch.device):
        self.rows = torch.zeros(rows, len(Row._fields), dtype=torch.float32, device=device)

    def write(self, place: Tensor, values: list[Tensor]) -> None:
        """Set the row whose number is in `place`, int64 ``[1]``."""
        self.rows.index_copy_(0, place, torch.cat([x.reshape(-1).float() for x in values])[None])

    def read(self, count: int, *scalars: Tensor) -> Callable[[bool], tuple[list[Row], list[float]] | None]:
        """Start an asynchronous copy of the first `count` rows, and of some scalars, to the host.

        Called, the result returns both, or None while they have not arrived; called with True it waits.
        """
        width = len(Row._fields)
        values = torch.cat([self.rows[:count].flatten(), *(x.reshape(1).float() for x in scalars)])

        def parse(copy: Tensor) -> tuple[list[Row], list[float]]:
            numbers = copy.tolist()
            rows = [Row(*numbers[i : i + width]) for i in range(0, count * width, width)]
            return rows, numbers[count * width :]

        if values.device.type == "cpu":
            return lambda wait: parse(values)
        copy = torch.empty(values.shape, device="cpu", pin_memory=True)
        copy.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def result(wait: bool) -> tuple[list[Row], list[float]] | None:
            if wait:
                arrived.synchronize()
            return parse(copy) if arrived.query() else None

        return result


def total(rows: list[Row]) -> Row:
    return Row(*map(sum, zip(*rows, strict=True)))


def means(sums: Row, steps: int, micro_batches: int) -> dict[str, float]:
    """Return what a line of the log says of so many steps."""
    tp, guessed = sums.true_positives, sums.true_positives + sums.false_positives
    return {
        "loss": sums.loss / micro_batches,
        "mlm_loss": sums.mlm_loss / max(sums.masked, 1.0),
        "mlm_accuracy": sums.mlm_correct / max(sums.masked, 1.0),
        "rtd_loss": sums.rtd_loss / micro_batches,
        "replaced": sums.replaced / max(sums.replaced + sums.original, 1.0),
        "precision": tp / guessed if guessed else math.nan,
        "recall": tp / sums.replaced if sums.replaced else math.nan,
        "gradient_norm": sums.gradient_norm / steps,
    }
