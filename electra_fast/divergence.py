"""Runs that no longer learn: a loss that is not finite, or a tower that has collapsed."""

import contextlib
import json
import math
from pathlib import Path

from electra_fast import snapshot
from electra_fast.ledger import Row

PATIENCE = 5  # consecutive steps whose gradient is not finite, after which a run ends
# Standard deviation of logits below which a discriminator answers alike for every token. bfloat16's rounding
# of equal logits near -2 alone gives 0.002 to 0.004; runs that learn have 0.5 and more (DESIGN.md).
LEAST_SPREAD = 0.01


class NotFinite(RuntimeError):
    """The gradient or the loss was not finite; the message says how to see it again."""


class Collapse:
    """Finds a collapsed tower and says so once, and once more if it recovers and collapses again.

    Args:
        warmup: steps in which the discriminator is not judged. It begins with logits that hardly differ.
    """

    def __init__(self, warmup: int):
        self.warmup = warmup
        self._said: set[str] = set()

    def generator(self, sums: Row) -> str | None:
        """Return the warning, if there is one to give, of the sums over a line of the log."""
        return self._once(
            "generator",
            sums.collapsed,
            f"has the generator collapsed? Of {sums.masked:.0f} masked tokens it knows "
            f"{sums.mlm_correct:.0f} and replaces {sums.replaced:.0f}",
        )

    def discriminator(self, step: int, logit_std: float) -> str | None:
        """Return the warning, if there is one to give, of the standard deviation of the logits."""
        return self._once(
            "discriminator",
            step > self.warmup and logit_std < LEAST_SPREAD,
            f"has the discriminator collapsed? The standard deviation of its logits is {logit_std:.5f}: it "
            "answers alike for every token, and does not recover. Start again with a lower --lr (a quarter), "
            "or with --beta2 0.999, half of --lr and a longer --warmup",
        )

    def _once(self, tower: str, collapsed: bool, text: str) -> str | None:
        said = tower in self._said
        (self._said.add if collapsed else self._said.discard)(tower)
        return text if collapsed and not said else None


def not_finite(metrics: dict[str, float]) -> bool:
    """Return whether a loss of an evaluation is not finite; a model without a discriminator has one loss."""
    names = ["mlm_loss"] + ["rtd_loss"] * math.isfinite(metrics["replaced"])
    return not all(math.isfinite(metrics[name]) for name in names)


def no_finite_gradient(out: Path, step: int, seed: int, accumulate: int) -> NotFinite:
    """Return the error of a run in `out` whose gradient was first not finite at `step`; write its numbers."""
    first = step * accumulate
    try:
        last = snapshot.load(out / "checkpoints")
        checkpoint, where = f"the last checkpoint is of step {last.step}", str(last.folder)
    except FileNotFoundError:
        checkpoint, where = "there is no whole checkpoint", None
    record = {"step": step, "seed": seed, "micro_batches": [first, first + accumulate - 1]}
    record |= {"checkpoint": where}
    with contextlib.suppress(OSError):  # a full disk does not hide the error
        (out / "not_finite.json").write_text(json.dumps(record, indent=1) + "\n")
    return NotFinite(
        f"pretrain: the gradient was not finite {PATIENCE} times in a row, first at step {step}; "
        f"the weights are those before it, {checkpoint}. To see it again: --resume {out}, or feed[{first}] "
        f"with rng ({seed}, {first}); not_finite.json has the numbers"
    )
