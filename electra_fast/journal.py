"""What a run says while it trains: lines in log.jsonl, TensorBoard where it is installed, a bar."""

import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

SHOWN = (
    "tokens_per_second",
    "mlm_loss",
    "mlm_accuracy",
    "rtd_loss",
    "precision",
    "recall",
    "replaced",
    "auc",
)


class Journal:
    """Takes records: a name, a step, numbers. What cannot be written is told once; training goes on."""

    def __init__(self, folder: Path, step: int, steps: int):
        from tqdm import tqdm

        self.bar = tqdm(total=steps, initial=step, unit=" steps", dynamic_ncols=True)
        self.file = folder / "log.jsonl"
        self.start = time.monotonic()
        self.shown: dict[str, float] = {}
        self.told = False
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(folder / "tensorboard", purge_step=step)

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - self.start, 3)
        record = {"kind": kind, "step": step, "seconds": seconds, **numbers}
        try:
            with self.file.open("a") as file:
                file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
            if self.board is not None:
                for name, value in numbers.items():
                    if isinstance(value, int | float):
                        self.board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            if not self.told:
                warnings.warn(
                    f"pretrain: {self.file} cannot be written, {error}; going on without", stacklevel=2
                )
            self.told = True
        self.shown |= {k: v for k, v in numbers.items() if k in SHOWN and isinstance(v, int | float)}
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in self.shown.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that there is not."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
