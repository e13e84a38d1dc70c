"""The loop of a training run: steps, the log, evaluations, checkpoints and signals.

`Pretraining` and `FineTuning` prepare the model and the data; everything that follows is common to both. The
folder of a run contains recipe.json, tokenizer/, checkpoints/, log.jsonl and the exported models.

The number of steps determines everything that follows: batches, masks, samples and dropout are functions of
(seed, micro-batch). So a run that was killed and resumed ends with the same weights, bit for bit, as an
uninterrupted one, on the same machine and with the same number of threads. Several processes divide the
micro-batches of a step (see `World`); rank 0 alone uses the folder.
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
from electra_fast.distributed import ProcessLost, World
from electra_fast.errors import must
from electra_fast.train import checkpoint, interruption, optimizer
from electra_fast.train.divergence import MAX_SKIPPED, NotFinite, no_finite_gradient
from electra_fast.train.gradients import GradientBuckets
from electra_fast.train.loader import Batch, Loader, NoBatch
from electra_fast.train.log_window import LogWindow, Warnings
from electra_fast.train.logger import SHOWN, Logger, NoLogger
from electra_fast.train.metrics import MetricBuffer
from electra_fast.train.run_folder import RunFolder
from electra_fast.train.saver import Saver, State
from electra_fast.train.step import Step

FAILED_SAVES = 3  # consecutive checkpoints that could not be written, after which a run ends
NOT_FINITE = 1000  # stops a run like the number of a signal, which is smaller
FACTS = {"text": str, "skipped": int}  # facts about its run that a checkpoint must have, with their types

Batches = Iterator[tuple[Batch, int]]  # of `Loader.prefetch`


def _no_warnings(sums: Any, step: int, logit_std: float) -> tuple[str | None, ...]:
    return ()


class Training:
    """A run that trains `model` on the batches of `loader`; `run` trains to the last step.

    Creating it loads the last checkpoint of the folder or writes the first one.

    Args:
        world: the processes of the run.
        recipe: the complete options of the run, a `Recipe` or a `FineTuneRecipe`.
        out: the path of the folder of the run.
        folder: the locked folder on rank 0, None on the others.
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
        world: World,
        recipe: Any,
        out: Path,
        folder: RunFolder | None,
        tokenizer: Any,
        text: str,
        model: nn.Module,
        optim: torch.optim.AdamW,
        loader: Loader,
        kind: type,
        graph: bool,
        warnings: Warnings = _no_warnings,
    ):
        self.world, self.recipe, self.folder, self.out = world, recipe, folder, out
        self.tokenizer, self.text, self.model, self.loader = tokenizer, text, model, loader
        self._warnings = warnings
        self.device, self.optimizer = loader.device, optim
        self.autocast = recipe.precision == "bf16"
        self.metrics = MetricBuffer(recipe.log_every, self.device, kind)
        self._signal = 0  # the number of a signal to this process, or NOT_FINITE
        self.stopping = 0  # that of any process: all stop at the same step
        self._saved_step: int | None = None  # of the last checkpoint that is completely on the disk
        self._failed_saves, self._eager_reported = 0, False
        self._start(0, 0)
        self._start(*world.from_first(self._load_or_create))
        state = optimizer.state(self.model, self.optimizer)
        world.send([*self.model.parameters(), *state.values()])
        self.saver = Saver(self._state())
        self.take_step = Step(
            self.model,
            self.optimizer,
            clip=recipe.clip,
            dtype=torch.bfloat16 if self.autocast else None,
            metrics=self.metrics,
            capture=cuda_graph if graph and self.device.type == "cuda" else None,
            buckets=GradientBuckets(self.model, world) if world.size > 1 else None,
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

    def export(self, state: State) -> None:
        """Write the trained models of a state into the folder."""
        raise NotImplementedError

    def check(self, metrics: dict[str, float], result: str) -> None:
        """Raise NotFinite if the last metrics show that training failed; `result` describes them."""

    def _start(self, step: int, skipped: int) -> None:
        """Set the counters of a run that has taken `step` steps, of which some were skipped."""
        self.step, self.skipped = step, optimizer.Skipped(skipped)
        accumulate = self.recipe.accumulate
        self.window = LogWindow(self.metrics, step, self.skipped, accumulate, self._warnings, self.world)

    def _load_or_create(self) -> tuple[int, int]:
        """Load the newest checkpoint or write the first one; return the steps and the skipped steps."""
        if any(self.folder.checkpoints.glob("step-*")):
            return self._load()
        self.folder.require_space(sum(p.numel() for p in self.model.parameters()), self.recipe.keep)
        self.folder.describe(self.recipe, self.tokenizer)
        self._write(self._state())  # now, so that an unwritable disk fails early
        return 0, 0

    def _load(self) -> tuple[int, int]:
        """Load the newest checkpoint; return its numbers of steps and of skipped steps.

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
        self._saved_step = loaded.step
        self.folder.save_recipe(self.recipe)
        return loaded.step, loaded.facts["skipped"]

    def close(self) -> None:
        """Release the lock of the folder. The ends of `run`, of this object and of the process do so too."""
        if self.folder is not None:
            self.folder.close()

    def run(self) -> dict[str, float]:
        """Train to the last step; return the metrics of the last evaluation.

        Raises:
            NotFinite: the gradient was not finite several times in a row, or the last loss is not finite.
            NoBatch: the thread that prepares batches hangs; the state is saved.
            ProcessLost: another process has ended or does not answer; on a CPU the state is saved.
            SystemExit: SIGTERM, SIGINT, SIGUSR1 or SIGHUP came, and the state is saved; the code is 128 + the
                number of the signal.
        """
        metrics, failed, first_batch = {}, None, self.step * self.recipe.accumulate + self.world.rank
        logger = (
            Logger(self.out, self.step, self.recipe.steps, self.shown) if self.world.first else NoLogger()
        )
        try:
            with (
                interruption.noted(self._stop),
                capturable_stream(self.device),
                contextlib.closing(
                    self.loader.prefetch(first_batch, self.world.size, stop=self._stopping)
                ) as batches,
            ):
                try:
                    metrics = self._train(logger, batches)
                except NoBatch as error:
                    failed = error
                except ProcessLost as error:
                    if self.device.type == "cuda":  # its queue waits for the lost process
                        raise
                    failed = error
                if self.world.first:
                    self._complete_save(logger)
                saved = f"{self.out} is saved at step {self.step}; continue with --resume {self.run_folder}"
                if failed is None:
                    self.world.wait()  # for rank 0, which torchrun would end if another process has ended
                if self.stopping:
                    logger.say(f"{signal.Signals(self.stopping).name}: {saved}")
                    raise SystemExit(128 + self.stopping)
                if failed is not None:
                    raise type(failed)(f"{failed}; {saved}" if self.world.first else str(failed)) from failed
                result = f"{self.out}: step {self.step}, {self.summary(metrics)}"
                logger.say(result)
                self.check(metrics, result)
        finally:
            with contextlib.closing(self), contextlib.closing(logger):
                self._wait_for_save(logger)
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
            if self.step % recipe.save_every == 0 and not last and self.world.first:
                self._save(logger)
        if self.world.size > 1:
            self.world.agree(self._signal)
            self.stopping = self.world.agreed()
        self.world.unwatch()
        if self.stopping == NOT_FINITE:
            raise self._not_finite(logger)
        # The others wait as long as rank 0 writes, and end if it cannot write.
        self.world.together(lambda: self._finish(logger) if self.world.first else None)
        return {} if self.stopping else self._evaluate_and_log(logger)

    def _finish(self, logger: Logger) -> None:
        if not self._complete_save(logger) and not self.stopping:
            self.export(self._state())  # a run that was killed in its last save may lack the exported models

    def _one_step(self, batches: Batches) -> None:
        recipe, world = self.recipe, self.world
        world.watch()
        first = self.step * recipe.accumulate
        numbers = range(first + world.rank, first + recipe.accumulate, world.size)
        micro_batches, tokens = zip(*itertools.islice(batches, len(numbers)), strict=True)
        rngs = [[recipe.seed, number] for number in numbers]
        rate = optimizer.learning_rate(self.step, peak=recipe.lr, warmup=recipe.warmup, total=recipe.steps)
        self.take_step(micro_batches, torch.tensor(rngs, device="cpu"), rate, self.window.steps)
        self.window.add(sum(tokens), rate)
        self.step += 1
        if world.size > 1:
            self.stopping = world.agree(self._signal)

    def _report(self, logger: Logger, wait: bool) -> None:
        """Write the lines of the log whose metrics have arrived; with `wait`, all lines.

        The run stops if several steps in a row were skipped.
        """
        if self.take_step.why_eager and not self._eager_reported:
            logger.say(f"step {self.step}: not a CUDA graph, {self.take_step.why_eager}")
            self._eager_reported = True
        self.window.write(logger, wait)
        if self.skipped.longest_run >= MAX_SKIPPED:
            self._stop(NOT_FINITE)

    def _not_finite(self, logger: Logger) -> NotFinite:
        if not self.world.first:
            return NotFinite(f"{self.command}: the gradient was not finite; process 0 says more")
        self._wait_for_save(logger)  # the message names the last checkpoint
        self.window.write(logger, wait=True)  # another process may have counted the skipped steps first
        first, seed, accumulate = self.skipped.first, self.recipe.seed, self.recipe.accumulate
        return no_finite_gradient(self.command, self.out, self.run_folder, first, seed, accumulate)

    def _evaluate_and_log(self, logger: Logger) -> dict[str, float]:
        self._report(logger, wait=True)
        self.world.unwatch()
        with self.window.paused():
            metrics = self.evaluate()
        if not self.stopping:
            logger.write(self.evaluation, self.step, metrics)
        return metrics

    def _save(self, logger: Logger) -> None:
        """Copy the state and begin to write it in a thread, after the end of the last write.

        Raises:
            OSError: the last `FAILED_SAVES` checkpoints could not be written.
        """
        with self.window.paused():
            error = self._wait_for_save(logger)
            if self._failed_saves == FAILED_SAVES:
                raise error
            self.saver.save(self._state(), self._write)

    def _wait_for_save(self, logger: Logger) -> OSError | None:
        """Wait until no thread writes; if its write failed, give a warning and return the error."""
        error = self.saver.wait()
        self._failed_saves = 0 if error is None else self._failed_saves + 1
        if error is not None:
            step, previous = self.saver.step, "the previous checkpoint is kept"
            state = "the checkpoint itself is complete" if self._saved_step == step else previous
            logger.say(f"step {step}: not all was saved, {error}; {state}")
        return error

    def _complete_save(self, logger: Logger) -> bool:
        """Write a checkpoint of this step if there is none; return whether it was written.

        Raises:
            OSError: something cannot be written.
        """
        self._wait_for_save(logger)
        if missing := self.step != self._saved_step:
            self._write(self._state())
        return missing

    def _state(self) -> State:
        """Return the state of the run, whose tensors the next step changes."""
        return State(
            self.step,
            self.window.skipped_steps(),
            self.model,
            optimizer.state(self.model, self.optimizer),
        )

    def _write(self, state: State) -> None:
        """Write a checkpoint and the exported models.

        Raises:
            OSError: something cannot be written.
        """
        self.folder.restore(self.recipe, self.tokenizer)
        facts = {"text": self.text, "skipped": state.skipped, "tokenizer": self.folder.tokenizer_hash()}
        checkpoint.save(self.folder.checkpoints, state.step, state.tensors(), facts, self.recipe.keep)
        self._saved_step = state.step
        self.export(state)

    def _stop(self, number: int) -> None:
        self._signal = number
        if self.world.size == 1:
            self.stopping = number

    def _stopping(self) -> int:
        return self.stopping
