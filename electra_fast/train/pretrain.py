"""Pre-training, from a folder of text to a discriminator.

    python -m electra_fast pretrain --preset small --data corpus/ --out runs/small
    python -m electra_fast pretrain --resume runs/small

    Pretraining(Recipe(preset="tiny", steps=300), "runs/demo").run()  # the same in Python

The folder of a run contains recipe.json (the `Recipe`), tokenizer/, checkpoints/, log.jsonl, and the halves
as Hugging Face folders, discriminator/ and generator/.

The number of steps determines everything that follows: batches, masks, samples and dropout are functions of
(seed, micro-batch). So a run that was killed and resumed ends with the same weights, bit for bit, as an
uninterrupted one, on the same machine and with the same number of threads.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from electra_fast import data, local
from electra_fast.capture import capturable_stream, cuda_graph
from electra_fast.errors import must
from electra_fast.model import Electra
from electra_fast.ops import FUSED, Ops
from electra_fast.train import checkpoint, corpus, interruption, optimizer, warm_start
from electra_fast.train.divergence import MAX_SKIPPED, NotFinite, no_finite_gradient, not_finite
from electra_fast.train.evaluation import evaluate, summary, unigram_loss
from electra_fast.train.loader import Batch, NoBatch
from electra_fast.train.log_window import LogWindow
from electra_fast.train.logger import Logger
from electra_fast.train.metrics import MetricBuffer
from electra_fast.train.recipe import Recipe
from electra_fast.train.run_folder import RunFolder, find_recipe, require_new
from electra_fast.train.step import Step

FAILED_SAVES = 3  # consecutive checkpoints that could not be written, after which a run ends
FACTS = {"text": str, "skipped": int}  # facts about its run that a checkpoint must have, with their types

Batches = Iterator[tuple[Batch, int]]  # of `Loader.prefetch`


class Pretraining:
    """One run. Creating it reads the data and loads the last checkpoint or writes the first; `run` trains.

    Args:
        recipe: the options of the run. If `out` has a run already, that run is resumed, with the changes that
            `Recipe.changed` allows.
        out: the folder of the run.
        ops: the implementation; `REFERENCE` for comparisons.
        make_model: a function of (config, ops) that returns a module like `Electra`.
        device: None: a GPU if there is one.
        graph: on a GPU, replay the steps as a CUDA graph if they can be captured; False: launch each kernel.

    Raises:
        ValueError: the recipe or the data cannot be used or differ from those of the run in `out`, the device
            cannot be used, or the process is one of several.
        OSError: `out` cannot be written, has too little space, or is in use by another process.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        ops: Ops = FUSED,
        make_model=Electra,
        device: str | torch.device | None = None,
        graph: bool = True,
    ):
        if (world := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
            rule = "be 1, because pretrain trains in one process only"
            raise ValueError(must("pretrain: WORLD_SIZE", rule, world, "start it without torchrun"))
        self.out, self.device = Path(out), local.device("pretrain: --device", device)
        self.default_precision = "bf16" if self.device.type == "cuda" else "float32"
        self.recipe = recipe = self._recipe(recipe)
        self.autocast = recipe.precision == "bf16"
        self.folder = RunFolder(self.out)

        weights = warm_start.load(recipe.init)
        self.tokenizer = corpus.find_tokenizer(recipe, self.folder, weights)
        vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.config = weights.config(recipe.model(vocab_size, data.special_ids(self.tokenizer)))
        self.train_text, self.held_out_text = corpus.tokenized(recipe, self.tokenizer)
        self.loader, self.held_out_loader = (
            corpus.loader(recipe, text, self.config, self.device)
            for text in (self.train_text, self.held_out_text)
        )

        torch.manual_seed(recipe.seed)
        self.model = make_model(self.config, ops)
        weights.copy_into(self.model)
        self.model.to(self.device).train()
        self.optimizer = optimizer.adamw(
            self.model,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
            bias_correction=recipe.bias_correction,
        )
        self.metrics = MetricBuffer(recipe.log_every, self.device)
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

    def _recipe(self, recipe: Recipe) -> Recipe:
        """Return the complete recipe: that of the run in `out` with the given changes, or a new one."""
        file = find_recipe(self.out)
        if file is None:
            require_new(self.out)
        recipe = Recipe.load(file).changed(**recipe.given()) if file else recipe.resolved()
        if file and recipe.precision is None:
            text = f"pretrain: {file} does not say the precision, so the run continues in"
            warnings.warn(f"{text} {self.default_precision}; --precision names another", stacklevel=3)
        for option, paths in (("--data", recipe.data), ("--held-out", recipe.held_out)):
            for path in paths:
                local.existing(f"pretrain: {option}", path, hub=False)
            if len({Path(path).resolve() for path in paths}) < len(paths):
                raise ValueError(must(f"pretrain: {option}", "name each path once", ", ".join(paths)))
        return dataclasses.replace(recipe, precision=recipe.precision or self.default_precision)

    def _start(self, step: int, skipped: optimizer.Skipped) -> None:
        """Set the counters of a run that has taken `step` steps."""
        self.step, self.skipped = step, skipped
        recipe = self.recipe
        self.window = LogWindow(self.metrics, step, skipped, recipe.accumulate, recipe.warmup)

    def _load(self) -> None:
        """Load the newest checkpoint.

        Raises:
            ValueError: the data or the tokenizer is not that of the run, or --steps is too small.
        """
        loaded = checkpoint.load(self.folder.checkpoints, ("model", "optimizer"), FACTS)
        if loaded.facts["text"] != self.train_text.text:
            rule = f"be the text with which {self.out} was started"
            raise ValueError(must("pretrain: --data", rule, "another text"))
        tokenizer = self.folder.tokenizer_hash()
        if loaded.facts.get("tokenizer", tokenizer) != tokenizer:  # older checkpoints do not have it
            rule = "be the tokenizer with which the run was started"
            remedy = f"restore it, or start another run with --init {self.out}"
            raise ValueError(must(f"pretrain: {self.folder.tokenizer}", rule, "another one", remedy))
        optimizer.check(loaded.tensors["optimizer"])
        checkpoint.restore("model", dict(self.model.named_parameters()), loaded.tensors["model"])
        state = optimizer.state(self.model, self.optimizer)
        checkpoint.restore("optimizer", state, loaded.tensors["optimizer"])
        if loaded.step > self.recipe.steps:
            rule = f"be {loaded.step} or more, the steps taken"
            raise ValueError(must("pretrain: --steps", rule, self.recipe.steps))
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
        logger, metrics, hung = Logger(self.out, self.step, self.recipe.steps), {}, None
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
                saved = f"{self.out} is saved at step {self.step}; continue with --resume"
                if self.stopping:
                    logger.say(f"{signal.Signals(self.stopping).name}: {saved}")
                    raise SystemExit(128 + self.stopping)
                if hung is not None:
                    raise NoBatch(f"{hung}; {saved}") from hung
                result = f"{self.out}: step {self.step}, on held-out text: {summary(metrics)}"
                logger.say(result)
                if not_finite(metrics):
                    rule, remedy = "be finite", "lower --lr"
                    raise NotFinite(must("pretrain: the loss on held-out text", rule, result, remedy))
        finally:
            logger.close()
            self.close()
        return metrics

    def _train(self, logger: Logger, batches: Batches) -> dict[str, float]:
        recipe = self.recipe
        self._introduce(logger)
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
        elif not self.stopping:  # a run that was killed in its last save may lack the halves
            self.folder.export(self.model, self.tokenizer)
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
            raise no_finite_gradient(self.out, self.skipped.first, self.recipe.seed, self.recipe.accumulate)

    def evaluate(self) -> dict[str, float]:
        """Return `evaluation.evaluate` on the held-out text."""
        count = min(self.recipe.eval_batches, max(1, self.held_out_loader.batches.num_batches))
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        prefetch = self.held_out_loader.prefetch(stop=self._stopping)
        with autocast, contextlib.closing(prefetch) as batches:
            some = (batch for batch, _ in itertools.islice(batches, count))
            return evaluate(self.model, some, stop=self._stopping)

    def _evaluate_and_log(self, logger: Logger) -> dict[str, float]:
        self._report(logger, wait=True)
        with self.window.paused():
            metrics = self.evaluate()
        if not self.stopping:
            logger.write("held_out", self.step, metrics)
            logger.warn(self.step, self.window.collapse.discriminator(self.step, metrics["logit_std"]))
        return metrics

    def _introduce(self, logger: Logger) -> None:
        """Print and log the sizes of the model and of the data."""
        texts = (self.train_text, self.held_out_text)
        facts = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": self.config.vocab_size,
            "train_tokens": self.train_text.num_tokens,
            "held_out_tokens": self.held_out_text.num_tokens,
            "unknown": self.train_text.unknown.share,
            "sequences": self.loader.batches.num_sequences,
            "unigram_loss": unigram_loss(*(t.first_tokens() for t in texts), self.config.vocab_size),
        }
        if self.step == 0:
            logger.write("begin", 0, facts)
        logger.say(
            "{parameters:,} parameters, {vocabulary:,} pieces; {train_tokens:,} tokens to train on in "
            "{sequences:,} sequences, {held_out_tokens:,} held out: unigram loss {unigram_loss:.3f}".format(
                **facts
            )
        )
        if self.step > 0 and self.recipe.precision != self.default_precision:
            default = f"the default for a new run on {self.device} is {self.default_precision}"
            logger.say(f"{self.out} continues in {self.recipe.precision}, as it was started; {default}")

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
        """Write a checkpoint and the halves.

        Raises:
            OSError: something cannot be written.
        """
        self.folder.restore(self.recipe, self.tokenizer)
        tensors = {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "optimizer": optimizer.state(self.model, self.optimizer),
        }
        facts = {"text": self.train_text.text, "skipped": self.window.skipped_steps()}
        facts |= {"tokenizer": self.folder.tokenizer_hash()}
        checkpoint.save(self.folder.checkpoints, self.step, tensors, facts, self.recipe.keep)
        self._saved_step = self.step
        self.folder.export(self.model, self.tokenizer)

    def _stop(self, number: int) -> None:
        self.stopping = number

    def _stopping(self) -> int | None:
        return self.stopping
