"""Pre-training, from a folder of text to a discriminator.

    python -m electra_fast pretrain --preset small --data corpus/ --out runs/small
    python -m electra_fast pretrain --resume runs/small

    Pretraining(Recipe(preset="tiny", steps=300), "runs/demo").run()  # the same in Python

A run's folder holds config.json (the `Recipe`), tokenizer/, checkpoints/, log.jsonl and, for everybody else,
discriminator/ and generator/ as Hugging Face has them.

Nothing but the number of steps taken decides what comes next: batches, masks, samples and dropout are
functions of (seed, micro-batch). So a run that was killed and resumed ends in the same weights, bit for bit,
as one that was not; on the same machine and with as many threads.
"""

import contextlib
import dataclasses
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from electra_fast import data, initial, interruption, local, optimizer, snapshot
from electra_fast.divergence import PATIENCE, NotFinite, no_finite_gradient, not_finite
from electra_fast.evaluation import evaluate, unigram_loss
from electra_fast.feed import Feed, NoBatch
from electra_fast.journal import Journal
from electra_fast.ledger import Ledger
from electra_fast.log_window import LogWindow
from electra_fast.model import Electra
from electra_fast.ops import FUSED, Ops
from electra_fast.recipe import Recipe
from electra_fast.run_folder import RunFolder
from electra_fast.step import Step, cuda_graph

FAILED_SAVES = 3  # consecutive checkpoints that could not be written, after which a run ends
HELD_OUT = 20  # every 20th document, unless --held-out names other text
FACTS = {"text": str, "skipped": int}  # what a checkpoint must say of its run


class Pretraining:
    """One run. Making it reads the data, writes the first checkpoint or takes up the last; `run` trains.

    Args:
        recipe: what to do. Where `out` has a run already it goes on, with what `Recipe.changed` lets change.
        out: the run's folder.
        ops: the implementation; `REFERENCE` to compare.
        make_model: config, ops -> a module with `Electra`'s forward and fields.
        device: None: a GPU if there is one.
        graph: on a GPU, replay the steps as one CUDA graph; else, and where that fails, launch each kernel.

    Raises:
        ValueError: the recipe or the data cannot be used, or are not those of the run in `out`.
            The device cannot be used, or the process is one of several.
        OSError: `out` cannot be written, is too full, or another process trains there.
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
            rule = "WORLD_SIZE must be 1, because pretrain trains in one process only"
            raise ValueError(f"pretrain: {rule}, got {world}; start it without torchrun")
        self.out, self.device = Path(out), local.device("pretrain: --device", device)
        begun = self.out / "config.json"
        recipe = Recipe.load(begun).changed(**recipe.given()) if begun.exists() else recipe.resolved()
        self.usual_precision = "bf16" if self.device.type == "cuda" else "float32"
        if begun.exists() and recipe.precision is None:
            without = f"pretrain: {begun} does not hold the precision, so the run goes on in"
            warnings.warn(f"{without} {self.usual_precision}; --precision names another", stacklevel=2)
        precision = recipe.precision or self.usual_precision
        self.recipe = recipe = dataclasses.replace(recipe, precision=precision)
        self.autocast = recipe.precision == "bf16"
        for option, paths in (("--data", recipe.data), ("--held-out", recipe.held_out)):
            for path in paths:
                local.existing(f"pretrain: {option}", path, hub=False)
            if len({Path(path).resolve() for path in paths}) < len(paths):
                raise ValueError(f"pretrain: {option} must name each path once, got {', '.join(paths)}")
        self.folder = RunFolder(self.out)

        weights = initial.read(recipe.init)
        self.tokenizer = self._tokenizer(weights)
        special = data.special_ids(self.tokenizer)
        vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.config = weights.config(recipe.model(vocab_size, special))
        self.train_text, self.held_text = self._texts()
        self.feed, self.held = self._feed(self.train_text), self._feed(self.held_text)

        torch.manual_seed(recipe.seed)
        self.model = make_model(self.config, ops)
        weights.into(self.model)
        self.model.to(self.device).train()
        self.optimizer = optimizer.adamw(
            self.model,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
            bias_correction=recipe.bias_correction,
        )
        self.step, self.skipped = 0, optimizer.Skipped()
        self.ledger = Ledger(recipe.log_every, self.device)
        self._said_eager, self._failed_saves, self.stopping = False, 0, None
        self._begin()
        self.take_step = Step(
            self.model,
            self.optimizer,
            clip=recipe.clip,
            dtype=torch.bfloat16 if self.autocast else None,
            ledger=self.ledger,
            capture=cuda_graph if graph and self.device.type == "cuda" else None,
        )

    def _tokenizer(self, weights: initial.Weights):
        kept, vocab = self.folder.tokenizer, self.recipe.vocab
        if kept.exists():
            return data.load_tokenizer(kept)
        if any(self.folder.checkpoints.glob("step-*")):
            rule = f"{kept} must be the tokenizer that the run was begun with"
            raise ValueError(f"pretrain: {rule}, got nothing there; copy {self.out}/discriminator to {kept}")
        if vocab is None:
            vocab = weights.tokenizer
        if vocab is None:
            raise ValueError("pretrain: --vocab must be given, as the folders of --init have no vocabulary")
        how = self.recipe.normalization()
        if str(vocab).isdecimal():
            return data.train_tokenizer(self._documents(self.recipe.data), int(vocab), **how)
        return data.load_tokenizer(local.existing("pretrain: --vocab", vocab), special_ids=None, **how)

    def _documents(self, paths: tuple[str, ...]) -> data.Documents:
        options = {name: getattr(self.recipe, name) for name in ("text_column", "blanks_separate")}
        return data.documents(paths or None, **options)

    def _text(self, option: str, paths: tuple[str, ...]) -> data.Encoded:
        """Tokenize text; print what was passed over and the share of [UNK], and refuse too large a share."""
        documents = self._documents(paths)
        text = data.tokenize(documents, self.tokenizer)
        print(f"{option}: {text.unknown}", *filter(None, [documents.note]), sep="; ", flush=True)
        if not self.recipe.allow_unknown:
            data.require_known(text.unknown, self.tokenizer, option)
        return text

    def _texts(self) -> tuple[data.Encoded, data.Encoded]:
        text = self._text("--data", self.recipe.data)
        if self.recipe.held_out:
            return text, self._text("--held-out", self.recipe.held_out)
        if (count := len(text.offsets) - 1) < HELD_OUT:
            rule = f"have {HELD_OUT} documents or more, with blank lines between, of which one is held out"
            raise ValueError(f"pretrain: --data must {rule}, got {count}; or name other text with --held-out")
        return data.held_out(text, HELD_OUT)

    def _feed(self, text: data.Encoded) -> Feed:
        recipe, config = self.recipe, self.config
        size = {"batch_tokens": recipe.batch_tokens} if recipe.packed else {}
        batches = data.Batches(
            text,
            seq_len=recipe.seq,
            pairs=recipe.pairs,
            seed=recipe.seed,
            pad_id=config.pad_id,
            cls_id=config.cls_id,
            sep_id=config.sep_id,
            **(size or {"batch_size": recipe.batch_tokens // recipe.seq}),
        )
        return Feed(batches, recipe.packed, self.device)

    def _begin(self) -> None:
        """Load the newest checkpoint, or write the first one now, so that an unwritable disk fails early."""
        self._saved = None
        self._window()
        if any(self.folder.checkpoints.glob("step-*")):
            found = snapshot.load(self.folder.checkpoints, ("model", "optimizer"), FACTS)
            if found.facts["text"] != self.train_text.text:
                raise ValueError(
                    f"pretrain: --data must be the text that {self.out} was begun with, got another"
                )
            tokenizer = self.folder.tokenizer_hash()
            if found.facts.get("tokenizer", tokenizer) != tokenizer:  # older checkpoints do not name it
                rule = f"{self.folder.tokenizer} must be the tokenizer that the run was begun with"
                remedy = f"restore it, or start another run with --init {self.out}"
                raise ValueError(f"pretrain: {rule}, got another; {remedy}")
            optimizer.check(found.tensors["optimizer"])
            snapshot.restore("model", dict(self.model.named_parameters()), found.tensors["model"])
            mine = optimizer.state(self.model, self.optimizer)
            snapshot.restore("optimizer", mine, found.tensors["optimizer"])
            self.step, self.skipped = found.step, optimizer.Skipped(found.facts["skipped"])
            self._window()
            self._saved = self.step
            if self.step > self.recipe.steps:
                raise ValueError(
                    f"pretrain: --steps must be {self.step} or more, those taken, got {self.recipe.steps}"
                )
            self.recipe.save(self.folder.config)
            return
        self.folder.require_space(sum(p.numel() for p in self.model.parameters()), self.recipe.keep)
        self.folder.describe(self.recipe, self.tokenizer)
        self._write()

    def _window(self) -> None:
        recipe = self.recipe
        self.window = LogWindow(self.ledger, self.step, self.skipped, recipe.accumulate, recipe.warmup)

    def close(self) -> None:
        """Let others train in the folder; the end of `run`, of this object and of the process do so too."""
        self.folder.close()

    def run(self) -> dict[str, float]:
        """Train to the last step; return the last evaluation's metrics.

        Raises:
            NotFinite: the gradient several times in a row, or the last evaluation's loss.
            NoBatch: the thread that makes the batches hangs; the state is saved.
            SystemExit: SIGTERM, SIGINT, SIGUSR1 or SIGHUP came, and the state is saved; 128 + the signal's
                number.
        """
        journal, metrics, late = Journal(self.out, self.step, self.recipe.steps), {}, None
        try:
            with (
                interruption.noted(self._stop),
                self._stream(),
                self.feed.ahead(lambda: self.stopping) as take,
            ):
                try:
                    metrics = self._train(journal, take)
                except NoBatch as error:
                    late = error
                if self.step != self._saved:
                    self._write()
                saved = f"{self.out} is saved at step {self.step}; --resume goes on"
                if self.stopping:
                    journal.say(f"{signal.Signals(self.stopping).name}: {saved}")
                    raise SystemExit(128 + self.stopping)
                if late is not None:
                    raise NoBatch(f"{late}; {saved}") from late
                journal.say(self._summary(metrics))
                if not_finite(metrics):
                    raise NotFinite(
                        f"pretrain: {self._summary(metrics)}: the loss must be finite; lower --lr"
                    )
        finally:
            journal.close()
            self.close()
        return metrics

    def _train(self, journal: Journal, take) -> dict[str, float]:
        recipe = self.recipe
        self._introduce(journal)
        self.window.since = time.monotonic()
        while self.step < recipe.steps and not self.stopping:
            self._one_step(take)
            last = self.step == recipe.steps
            if self.step % recipe.log_every == 0 or last:
                self.window.close(self.take_step.logit_std())
            self._report(journal, wait=last)
            if self.step % recipe.eval_every == 0 and not last:
                self._held_out(journal)
            if self.step % recipe.save_every == 0 and not last:
                self._save(journal)
        if self.step != self._saved:
            self._write()
        elif not self.stopping:  # a run that was killed in its last save may lack the halves
            self.folder.export(self.model, self.tokenizer)
        return {} if self.stopping else self._held_out(journal)

    def _one_step(self, take) -> None:
        recipe = self.recipe
        first = self.step * recipe.accumulate
        micros = range(first, first + recipe.accumulate)
        batches, tokens = zip(*map(take, micros), strict=True)
        rngs = torch.tensor([[recipe.seed, micro] for micro in micros], device="cpu")
        rate = optimizer.learning_rate(self.step, peak=recipe.lr, warmup=recipe.warmup, total=recipe.steps)
        self.take_step(batches, rngs, rate, self.window.steps)
        self.window.add(sum(tokens), rate)
        self.step += 1

    def _report(self, journal: Journal, wait: bool) -> None:
        """Write the lines of the log whose metrics have arrived; with `wait`, all.

        Raises:
            NotFinite: several steps in a row were skipped.
        """
        if self.take_step.why_eager and not self._said_eager:
            journal.say(f"step {self.step}: not a CUDA graph, {self.take_step.why_eager}")
            self._said_eager = True
        self.window.write(journal, wait)
        if self.skipped.longest >= PATIENCE:
            raise no_finite_gradient(self.out, self.skipped.first, self.recipe.seed, self.recipe.accumulate)

    def evaluate(self) -> dict[str, float]:
        """Return `evaluation.evaluate` on the held-out text."""
        number = min(self.recipe.eval_batches, max(1, self.held.batches.num_batches))
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        with autocast, self.held.ahead(lambda: self.stopping) as take:
            batches = (take(index)[0] for index in range(number))
            return evaluate(self.model, batches, stop=lambda: self.stopping)

    def _held_out(self, journal: Journal) -> dict[str, float]:
        self._report(journal, wait=True)
        with self.window.aside():
            metrics = self.evaluate()
        if not self.stopping:
            journal.write("held_out", self.step, metrics)
            warning = self.window.collapse.discriminator(self.step, metrics["logit_std"])
            journal.warn(self.step, warning)
        return metrics

    def _introduce(self, journal: Journal) -> None:
        """Say and write what one wants to know of a run before it begins."""
        texts = (self.train_text, self.held_text)
        facts = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": self.config.vocab_size,
            "train_tokens": self.train_text.num_tokens,
            "held_out_tokens": self.held_text.num_tokens,
            "unknown": self.train_text.unknown.share,
            "sequences": self.feed.batches.num_sequences,
            "unigram_loss": unigram_loss(*(t.first_tokens() for t in texts), self.config.vocab_size),
        }
        if self.step == 0:
            journal.write("begin", 0, facts)
        journal.say(
            "{parameters:,} parameters, {vocabulary:,} pieces; {train_tokens:,} tokens to train on in "
            "{sequences:,} sequences, {held_out_tokens:,} held out: unigram loss {unigram_loss:.3f}".format(
                **facts
            )
        )
        if self.step > 0 and self.recipe.precision != self.usual_precision:
            usual = f"a new run on {self.device} is in {self.usual_precision}"
            journal.say(f"{self.out} goes on in {self.recipe.precision}, as it was begun; {usual}")

    def _summary(self, metrics: dict[str, float]) -> str:
        words = "step {step}, on held-out text: MLM loss {mlm_loss:.3f}, accuracy {mlm_accuracy:.3f}; "
        words += "RTD loss {rtd_loss:.4f}, AUC {auc:.3f}"
        if not math.isnan(metrics["auc_low"]):  # one batch has no interval
            words += " [{auc_low:.3f}, {auc_high:.3f}]"
        return f"{self.out}: " + words.format(step=self.step, **metrics)

    @contextlib.contextmanager
    def _stream(self) -> Iterator[None]:
        """A stream that can be captured, as the default one cannot."""
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
            yield
            torch.cuda.synchronize(self.device)

    def _save(self, journal: Journal) -> None:
        """Write a checkpoint; one that fails costs a warning, several in a row the run."""
        try:
            with self.window.aside():
                self._write()
            self._failed_saves = 0
        except OSError as error:
            self._failed_saves += 1
            if self._failed_saves == FAILED_SAVES:
                raise
            stands = "the one before stands" if self._saved != self.step else "the checkpoint itself is whole"
            journal.say(f"step {self.step}: not all was saved, {error}; {stands}")

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
        snapshot.save(self.folder.checkpoints, self.step, tensors, facts, self.recipe.keep)
        self._saved = self.step
        self.folder.export(self.model, self.tokenizer)

    def _stop(self, number: int) -> None:
        self.stopping = number
