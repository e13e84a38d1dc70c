"""Detect runs that no longer learn: a loss that is not finite, or a collapsed tower."""

import contextlib
import json
import math
from pathlib import Path

from electra_fast.train import checkpoint
from electra_fast.train.metrics import StepMetrics

MAX_SKIPPED = 5  # consecutive steps with a non-finite gradient, after which a run ends
# A discriminator whose logits have a smaller standard deviation gives the same answer for every token. The
# rounding of equal logits near -2 to bfloat16 gives 0.002 to 0.004; runs that learn have 0.5 and more.
LEAST_STD = 0.01


class NotFinite(ValueError):
    """The gradient or the loss was not finite; the message says how to reproduce it."""


class Collapse:
    """Detects a collapsed tower. It warns once, and again if the tower recovers and collapses again.

    Args:
        warmup: the discriminator is not checked in these first steps, because its first logits hardly differ.
    """

    def __init__(self, warmup: int):
        self.warmup = warmup
        self._warned: set[str] = set()

    def warnings(self, sums: StepMetrics, step: int, logit_std: float) -> tuple[str | None, str | None]:
        """Return the warnings for a line of the log."""
        return self.generator(sums), self.discriminator(step, logit_std)

    def generator(self, sums: StepMetrics) -> str | None:
        """Return a warning, or None, for the sums of a line of the log."""
        return self._once(
            "generator",
            sums.collapsed,
            f"has the generator collapsed? Of {sums.masked:.0f} masked tokens it predicts "
            f"{sums.mlm_correct:.0f} and replaces {sums.replaced:.0f}",
        )

    def discriminator(self, step: int, logit_std: float) -> str | None:
        """Return a warning, or None, for the standard deviation of the logits."""
        return self._once(
            "discriminator",
            step > self.warmup and logit_std < LEAST_STD,
            f"has the discriminator collapsed? The standard deviation of its logits is {logit_std:.5f}: it "
            "gives the same answer for every token, and will not recover. Start again with a lower --lr (a "
            "quarter), a longer --warmup, or a lower weight of its loss, --set rtd_weight=1",
        )

    def _once(self, tower: str, collapsed: bool, text: str) -> str | None:
        warned = tower in self._warned
        (self._warned.add if collapsed else self._warned.discard)(tower)
        return text if collapsed and not warned else None


def not_finite(metrics: dict[str, float]) -> bool:
    """Return whether a loss of an evaluation is not finite. A model without discriminator has one loss."""
    names = ["mlm_loss"] + ["rtd_loss"] * math.isfinite(metrics["replaced"])
    return not all(math.isfinite(metrics[name]) for name in names)


def no_finite_gradient(
    command: str, out: Path, run_folder: Path, step: int, seed: int, accumulate: int
) -> NotFinite:
    """Write not_finite.json; return the error of a run whose gradient was first not finite at `step`.

    `out` is the folder with the checkpoints, `run_folder` the one for --resume.
    """
    first = step * accumulate
    try:
        last = checkpoint.load(out / "checkpoints")
        state, folder = f"the last checkpoint is of step {last.step}", str(last.folder)
    except FileNotFoundError:
        state, folder = "there is no whole checkpoint", None
    record = {"step": step, "seed": seed, "micro_batches": [first, first + accumulate - 1]}
    record |= {"checkpoint": folder}
    with contextlib.suppress(OSError):  # a full disk must not hide the error
        (out / "not_finite.json").write_text(json.dumps(record, indent=1) + "\n")
    return NotFinite(
        f"{command}: the gradient was not finite {MAX_SKIPPED} times in a row, first at step {step}; "
        f"the weights are those before it, {state}. To reproduce it: --resume {run_folder}, or "
        f"loader[{first}] with rng ({seed}, {first}); not_finite.json has the numbers"
    )
