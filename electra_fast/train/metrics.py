"""The metrics of each step: one row per step on the device, copied to the host asynchronously."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from electra_fast.distributed import World


class StepMetrics(NamedTuple):
    """The metrics of a step of pre-training, summed over its micro-batches."""

    loss: float
    mlm_loss: float  # summed over all masked tokens
    mlm_correct: float
    masked: float
    rtd_loss: float
    true_positives: float
    false_positives: float
    false_negatives: float
    true_negatives: float
    gradient_norm: float
    skipped: float  # 1 if the gradient was not finite, so that the step changed nothing

    @property
    def replaced(self) -> float:
        return self.true_positives + self.false_negatives

    @property
    def original(self) -> float:
        return self.false_positives + self.true_negatives

    @property
    def collapsed(self) -> bool:
        """Whether the generator replaces no token or predicts all, so the discriminator learns nothing."""
        return self.masked > 0 and (self.mlm_correct == self.masked or 0 == self.replaced < self.original)

    def means(self, steps: int, micro_batches: int) -> dict[str, float]:
        """Return the metrics of a line of the log, from the sums over its steps."""
        predicted = self.true_positives + self.false_positives
        return {
            "loss": self.loss / micro_batches,
            "mlm_loss": self.mlm_loss / max(self.masked, 1.0),
            "mlm_accuracy": self.mlm_correct / max(self.masked, 1.0),
            "rtd_loss": self.rtd_loss / micro_batches,
            "replaced": self.replaced / max(self.replaced + self.original, 1.0),
            "precision": self.true_positives / predicted if predicted else math.nan,
            "recall": self.true_positives / self.replaced if self.replaced else math.nan,
            "gradient_norm": self.gradient_norm / steps,
        }


class TaskMetrics(NamedTuple):
    """The metrics of a step of fine-tuning, summed over its micro-batches."""

    loss: float
    gradient_norm: float
    skipped: float  # as in `StepMetrics`

    def means(self, steps: int, micro_batches: int) -> dict[str, float]:
        """Return the metrics of a line of the log, from the sums over its steps."""
        return {"loss": self.loss / micro_batches, "gradient_norm": self.gradient_norm / steps}


SAME = ("gradient_norm", "skipped")  # the metrics that are the same in all processes

Read = tuple[list[Any], list[float]]  # the rows, and the scalars that were read with them


class MetricBuffer:
    """The metrics of the last steps, on the device; `kind` is the class of a row."""

    def __init__(self, rows: int, device: torch.device, kind: type[NamedTuple] = StepMetrics):
        self.kind = kind
        self.rows = torch.zeros(rows, len(kind._fields), dtype=torch.float64, device=device)

    def write(self, row: Tensor, values: list[Tensor]) -> None:
        """Set row number `row`, int64 ``[1]``."""
        self.rows.index_copy_(0, row, torch.cat([x.reshape(-1).double() for x in values])[None])

    def read(self, count: int, *scalars: Tensor, world: World | None = None) -> Callable[[bool], Read | None]:
        """Start an asynchronous copy of the first `count` rows, and of some scalars, to the host.

        The result is a function: called with False it returns both, or None until they have arrived; called
        with True it waits for them. With a `world` they are the sums over its processes, except `SAME`.
        """
        width, rows = len(self.kind._fields), self.rows[:count].clone()
        if world is not None and not world.first:
            rows[:, [self.kind._fields.index(name) for name in SAME]] = 0
        values = torch.cat([rows.flatten(), *(x.reshape(1).double() for x in scalars)])
        if world is not None:
            world.add(values)

        def parse(copy: Tensor) -> Read:
            numbers = copy.tolist()
            rows = [self.kind(*numbers[i : i + width]) for i in range(0, count * width, width)]
            return rows, numbers[count * width :]

        if values.device.type == "cpu":
            return lambda wait: parse(values)
        copy = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        copy.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def result(wait: bool) -> Read | None:
            if wait:
                arrived.synchronize()
            return parse(copy) if arrived.query() else None

        return result


def total(rows: list[Any]) -> Any:
    """Return the sums over several steps, a row of the same class."""
    return type(rows[0])(*map(sum, zip(*rows, strict=True)))
