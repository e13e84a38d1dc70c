"""The log of a run: lines in log.jsonl, TensorBoard if it is installed, and a progress bar."""

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
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
    "logit_std",
    "auc",
)


class Logger:
    """Writes records, each with a kind, a step and numbers.

    A file or a terminal that cannot be written causes one warning; training continues.
    """

    def __init__(self, folder: Path, step: int, steps: int, shown: tuple[str, ...] = SHOWN):
        from tqdm import tqdm

        options = {"total": steps, "initial": step, "unit": " steps", "dynamic_ncols": True}
        try:
            self.bar = tqdm(**options)
        except OSError:  # the terminal was closed
            self.bar = tqdm(**options, disable=True)
        self.file = folder / "log.jsonl"
        self.start = time.monotonic()
        self.names, self.shown = shown, {}
        self.warned = False
        self.board = None
        with self._warn_once():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self.board = SummaryWriter(folder / "tensorboard", purge_step=step)

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - self.start, 3)
        record = {"kind": kind, "step": step, "seconds": seconds, **numbers}
        with self._warn_once():
            _append(self.file, json.dumps({k: _json_value(v) for k, v in record.items()}))
            if self.board is not None:
                for name, value in numbers.items():
                    if isinstance(value, int | float):
                        self.board.add_scalar(f"{kind}/{name}", value, step)
        self.shown |= {k: v for k, v in numbers.items() if k in self.names and isinstance(v, int | float)}
        with contextlib.suppress(OSError):  # the terminal was closed, or the reader of a pipe has ended
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in self.shown.items()}, refresh=False)
            self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        with contextlib.suppress(OSError):
            self.bar.write(text)

    def warn(self, step: int, warning: str | None) -> None:
        """Print a warning with its step, if there is one."""
        if warning is not None:
            self.say(f"step {step}: {warning}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()
        if self.board is not None:
            with self._warn_once():
                self.board.close()

    @contextlib.contextmanager
    def _warn_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.warned:
                warnings.warn(
                    f"{self.file} cannot be written, {error}; training continues without it",
                    stacklevel=4,
                )
            self.warned = True


class NoLogger(Logger):
    """The logger of a process that writes nothing, because rank 0 does."""

    def __init__(self):
        pass

    def write(self, kind: str, step: int, numbers: dict[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _append(file: Path, line: str) -> None:
    """Append a line, on a new line even if a full disk or a kill has cut off the last one."""
    with file.open("ab+") as stream:
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else f"\n{line}"
        stream.write(f"{line}\n".encode())


def _json_value(value: Any) -> Any:
    """Return null for a number that is not finite, which JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
