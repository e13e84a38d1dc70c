"""The loop of a training run: steps, the log, evaluations, checkpoints and signals.

`Pretraining` and `FineTuning` prepare the model and the data; everything that follows is common to both. The
folder of a run contains recipe.json, tokenizer/, checkpoints/, log.jsonl and the exported models.

The number of steps determines everything that follows: batches, masks, samples and dropout are functions of
(seed, micro-batch). So a run that was killed and resumed ends with the same weights, bit for bit, as an
uninterrupted one, on the same machine and with the same number of threads.
"""

import contextlib
import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from electra_fast.capture import capturable_stream, cuda_graph
from electra_fast.errors import must
from electra_fast.train import checkpoint, interruption, optimizer
from electra_fast.train.divergence import MAX_SKIPPED, no_finite_gradient
from electra_fast.train.loader import Batch, Loader, NoBatch
from electra_fast.train.log_window import LogWindow, Warnings
from electra_fast.train.logger import SHOWN, Logger
from electra_fast.train.metrics import MetricBuffer
from electra_fast.train.run_folder import RunFolder
from electra_fast.train.step import Step

FAILED_SAVES = 3  # consecutive checkpoints that could not be written, after which a run ends
FACTS = {"text": str, "skipped": int}  # facts about its run that a checkpoint must have, with their types

Batches = Iterator[tuple[Batch, int]]  # of `Loader.prefetch`


def _no_warnings(sums: Any, step: int, logit_std: float) -> tuple[str | None, ...]:
    return ()


class Training:
    """A run that trains `model` on the batches of `loader`; `run` trains to the last step.

    Creating it loads the last checkpoint of the folder or writes the first one.

    Args:
        recipe: the complete options of the run, a `Recipe` or a `FineTuneRecipe`.
        folder: the locked folder of the run.
        tokenizer: it is saved in the folder.
        text: identifies the data; a resumed run must have the same.
        model: see `Step`.
        optim: the result of `optimizer.adamw`.
        loader: the batches.
        kind: the class of a row of metrics.
        graph: on a GPU, replay the steps as a CUDA graph if they can be captured; False: launch each kernel.
        warnings: see `LogWindow`.

    Raises:
        ValueError: the data or the tokenizer differs from that of the run in the folder.
        OSError: the folder cannot be written or has too little space.
    """

    command: ClassVar[str]  # its name on the command line, and the option with the data, for messages
    text_option: ClassVar[str]
    evaluation: ClassVar[str] = "held_out"  # the kind of its lines in the log
    shown: tuple[str, ...] = SHOWN  # the numbers next to the progress bar

    def __init__(
        self,
        recipe: Any,
        folder: RunFolder,
        tokenizer: Any,
        text: str,
        model: nn.Module,
        optim: torch.optim.AdamW,
        loader: Loader,
        kind: type,
        graph: bool,
        warnings: Warnings = _no_warnings,
    ):
        self.recipe, self.folder, self.out = recipe, folder, folder.path
        self.tokenizer, self.text, self.model, self.loader = tokenizer, text, model, loader
        self._warnings = warnings
        self.device, self.optimizer = loader.device, optim
        self.autocast = recipe.precision == "bf16"
        self.metrics = MetricBuffer(recipe.log_every, self.device, kind)
        self.stopping: int | None = None  # the signal that asked the run to stop
        self._saved_step: int | None = None  # of the last checkpoint
        self._failed_saves, self._eager_reported = 0, False
        self._start(0, optimizer.Skipped())
        if any(self.folder.checkpoints.glob("step-*")):
            self._load()
        else:  # write the first checkpoint now, so that an unwritable disk fails early
            self.folder.require_space(sum(p.numel() for p in self.model.parameters()), recipe.keep)
            self.folder.describe(recipe, self.tokenizer)
            self._write()
        self.take_step = Step(
            self.model,
            self.optimizer,
            clip=recipe.clip,
            dtype=torch.bfloat16 if self.autocast else None,
            metrics=self.metrics,
            capture=cuda_graph if graph and self.device.type == "cuda" else None,
        )

    @property
    def run_folder(self) -> Path:
        """The folder for --resume."""
        return self.out

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the model on the evaluation data."""
        raise NotImplementedError

    def summary(self, metrics: dict[str, float]) -> str:
        """Return the metrics of `evaluate` in one line."""
        raise NotImplementedError

    def introduce(self, logger: Logger) -> None:
        """Print and log the sizes of the model and of the data."""
        raise NotImplementedError

    def export(self) -> None:
        """Write the trained models into the folder."""
        raise NotImplementedError

    def check(self, metrics: dict[str, float], result: str) -> None:
        """Raise NotFinite if the last metrics show that training failed; `result` describes them."""

    def _start(self, step: int, skipped: optimizer.Skipped) -> None:
        """Set the counters of a run that has taken `step` steps."""
        self.step, self.skipped = step, skipped
        self.window = LogWindow(self.metrics, step, skipped, self.recipe.accumulate, self._warnings)

    def _load(self) -> None:
        """Load the newest checkpoint.

        Raises:
            ValueError: the data or the tokenizer is not that of the run, or --steps is too small.
        """
        loaded = checkpoint.load(self.folder.checkpoints, ("model", "optimizer"), FACTS)
        if loaded.facts["text"] != self.text:
            rule = f"be the text with which {self.out} was started"
            raise ValueError(must(f"{self.command}: {self.text_option}", rule, "another text"))
        tokenizer = self.folder.tokenizer_hash()
        if loaded.facts.get("tokenizer", tokenizer) != tokenizer:  # older checkpoints do not have it
            rule = "be the tokenizer with which the run was started"
            remedy = f"restore it, or {self.recipe.another}"
            raise ValueError(must(f"{self.command}: {self.folder.tokenizer}", rule, "another one", remedy))
        optimizer.check(loaded.tensors["optimizer"])
        checkpoint.restore("model", dict(self.model.named_parameters()), loaded.tensors["model"])
        state = optimizer.state(self.model, self.optimizer)
        checkpoint.restore("optimizer", state, loaded.tensors["optimizer"])
        if loaded.step > self.recipe.steps:
            rule = f"be {loaded.step} or more, the steps taken"
            raise ValueError(must(f"{self.command}: --steps", rule, self.recipe.steps))
        self._start(loaded.step, optimizer.Skipped(loaded.facts["skipped"]))
        self._saved_step = self.step
        self.folder.save_recipe(self.recipe)

    def close(self) -> None:
        """Release the lock of the folder. The ends of `run`, of this object and of the process do so too."""
        self.folder.close()

    def run(self) -> dict[str, float]:
        """Train to the last step; return the metrics of the last evaluation.

        Raises:
            NotFinite: the gradient was not finite several times in a row, or the last loss is not finite.
            NoBatch: the thread that prepares batches hangs; the state is saved.
            SystemExit: SIGTERM, SIGINT, SIGUSR1 or SIGHUP came, and the state is saved; the code is 128 + the
                number of the signal.
        """
        logger, metrics, hung = Logger(self.out, self.step, self.recipe.steps, self.shown), {}, None
        first_batch = self.step * self.recipe.accumulate
        try:
            with (
                interruption.noted(self._stop),
                capturable_stream(self.device),
                contextlib.closing(self.loader.prefetch(first_batch, self._stopping)) as batches,
            ):
                try:
                    metrics = self._train(logger, batches)
                except NoBatch as error:
                    hung = error
                if self.step != self._saved_step:
                    self._write()
                saved = f"{self.out} is saved at step {self.step}; continue with --resume {self.run_folder}"
                if self.stopping:
                    logger.say(f"{signal.Signals(self.stopping).name}: {saved}")
                    raise SystemExit(128 + self.stopping)
                if hung is not None:
                    raise NoBatch(f"{hung}; {saved}") from hung
                result = f"{self.out}: step {self.step}, {self.summary(metrics)}"
                logger.say(result)
                self.check(metrics, result)
        finally:
            logger.close()
            self.close()
        return metrics

    def _train(self, logger: Logger, batches: Batches) -> dict[str, float]:
        recipe = self.recipe
        self.introduce(logger)
        self.window.since = time.monotonic()
        while self.step < recipe.steps and not self.stopping:
            self._one_step(batches)
            last = self.step == recipe.steps
            if self.step % recipe.log_every == 0 or last:
                self.window.close(self.take_step.logit_std())
            self._report(logger, wait=last)
            if self.step % recipe.eval_every == 0 and not last:
                self._evaluate_and_log(logger)
            if self.step % recipe.save_every == 0 and not last:
                self._save(logger)
        if self.step != self._saved_step:
            self._write()
        elif not self.stopping:  # a run that was killed in its last save may lack the exported models
            self.export()
        return {} if self.stopping else self._evaluate_and_log(logger)

    def _one_step(self, batches: Batches) -> None:
        recipe = self.recipe
        first = self.step * recipe.accumulate
        micro_batches, tokens = zip(*itertools.islice(batches, recipe.accumulate), strict=True)
        rngs = [[recipe.seed, index] for index in range(first, first + recipe.accumulate)]
        rate = optimizer.learning_rate(self.step, peak=recipe.lr, warmup=recipe.warmup, total=recipe.steps)
        self.take_step(micro_batches, torch.tensor(rngs, device="cpu"), rate, self.window.steps)
        self.window.add(sum(tokens), rate)
        self.step += 1

    def _report(self, logger: Logger, wait: bool) -> None:
        """Write the lines of the log whose metrics have arrived; with `wait`, all lines.

        Raises:
            NotFinite: several steps in a row were skipped.
        """
        if self.take_step.why_eager and not self._eager_reported:
            logger.say(f"step {self.step}: not a CUDA graph, {self.take_step.why_eager}")
            self._eager_reported = True
        self.window.write(logger, wait)
        if self.skipped.longest_run >= MAX_SKIPPED:
            first = self.skipped.first
            seed, accumulate = self.recipe.seed, self.recipe.accumulate
            raise no_finite_gradient(self.command, self.out, self.run_folder, first, seed, accumulate)

    def _evaluate_and_log(self, logger: Logger) -> dict[str, float]:
        self._report(logger, wait=True)
        with self.window.paused():
            metrics = self.evaluate()
        if not self.stopping:
            logger.write(self.evaluation, self.step, metrics)
        return metrics

    def _save(self, logger: Logger) -> None:
        """Write a checkpoint. A failure causes a warning, several failures in a row end the run."""
        try:
            with self.window.paused():
                self._write()
            self._failed_saves = 0
        except OSError as error:
            self._failed_saves += 1
            if self._failed_saves == FAILED_SAVES:
                raise
            previous = "the previous checkpoint is kept"
            state = "the checkpoint itself is complete" if self._saved_step == self.step else previous
            logger.say(f"step {self.step}: not all was saved, {error}; {state}")

    def _write(self) -> None:
        """Write a checkpoint and the exported models.

        Raises:
            OSError: something cannot be written.
        """
        self.folder.restore(self.recipe, self.tokenizer)
        tensors = {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "optimizer": optimizer.state(self.model, self.optimizer),
        }
        facts = {"text": self.text, "skipped": self.window.skipped_steps()}
        facts |= {"tokenizer": self.folder.tokenizer_hash()}
        checkpoint.save(self.folder.checkpoints, self.step, tensors, facts, self.recipe.keep)
        self._saved_step = self.step
        self.export()

    def _stop(self, number: int) -> None:
        self.stopping = number

    def _stopping(self) -> int | None:
        return self.stopping
