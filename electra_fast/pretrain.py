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

import collections
import contextlib
import json
import os
import shutil
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch

from electra_fast import data, initial, optimizer, snapshot
from electra_fast.evaluation import evaluate, unigram_loss
from electra_fast.feed import Feed
from electra_fast.journal import Journal
from electra_fast.ledger import Ledger, Row, means, total
from electra_fast.model import Electra
from electra_fast.ops import FUSED, Ops
from electra_fast.recipe import Recipe
from electra_fast.step import Step, cuda_graph

PATIENCE = 5  # steps in a row whose gradient is not finite, after which a run ends
FAILED_SAVES = 3  # checkpoints in a row that could not be written, likewise
HELD_OUT = 20  # every so manieth document is held out where no other text is named


class NotFinite(RuntimeError):
    """The gradient was not finite several times in a row; the message says how to see it again."""


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
        self.out = Path(out)
        begun = self.out / "config.json"
        recipe = Recipe.load(begun).changed(**recipe.given()) if begun.exists() else recipe.resolved()
        self.recipe = recipe
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.autocast = (recipe.precision or ("bf16" if self.device.type == "cuda" else "float32")) == "bf16"
        self.out.mkdir(parents=True, exist_ok=True)
        self._unlock = weakref.finalize(self, os.close, snapshot.lock(self.out))

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
        self._asked, self._told = collections.deque(), False
        self._failed_saves, self.stopping = 0, None
        self.checkpoints = self.out / "checkpoints"
        self._window()
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
        kept, vocab = self.out / "tokenizer", self.recipe.vocab
        if kept.exists():
            return data.load_tokenizer(kept)
        if vocab is None:
            vocab = weights.tokenizer
        if vocab is None:
            raise ValueError("pretrain: --vocab must be given, as the folders of --init have no vocabulary")
        how = self.recipe.normalization()
        if str(vocab).isdigit():
            return data.train_tokenizer(self._documents(self.recipe.data), int(vocab), **how)
        return data.load_tokenizer(vocab, special_ids=None, **how)

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
        """Take up the newest checkpoint, or write the first one: which shows that the disk takes it."""
        self._saved = None
        if any(self.checkpoints.glob("step-*")):
            found = snapshot.load(self.checkpoints)
            if found.facts["text"] != self.train_text.text:
                raise ValueError(
                    f"pretrain: --data must be the text that {self.out} was begun with, got another"
                )
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
            self.recipe.save(self.out / "config.json")
            return
        numbers = sum(p.numel() for p in self.model.parameters())
        needed, free = 4 * numbers * (3 * (self.recipe.keep + 1) + 2), shutil.disk_usage(self.out).free
        if needed > free:
            got = f"{needed / 1e9:.1f} GB free for {self.recipe.keep + 1} checkpoints, got {free / 1e9:.1f}"
            raise OSError(f"pretrain: --out must have {got}; lower --keep")
        self.recipe.save(self.out / "config.json")
        if not (self.out / "tokenizer").exists():
            data.save_tokenizer(self.tokenizer, self.out / "tokenizer.part")
            (self.out / "tokenizer.part").rename(self.out / "tokenizer")
        self._write()

    def close(self) -> None:
        """Let others train in the folder; the end of `run`, of this object and of the process do so too."""
        self._unlock()

    def run(self) -> dict[str, float]:
        """Train to the last step; return the last evaluation's metrics.

        Raises:
            NotFinite: see there.
            SystemExit: SIGTERM, SIGINT or SIGUSR1 came, and the state is saved; 128 + the signal's number.
        """
        recipe, metrics = self.recipe, {}
        journal = Journal(self.out, self.step, recipe.steps)
        try:
            with self._signals(), self._stream(), self.feed.ahead() as take:
                self._introduce(journal)
                self._since = time.monotonic()
                while self.step < recipe.steps and not self.stopping:
                    self._one_step(take)
                    last = self.step == recipe.steps
                    if self.step % recipe.log_every == 0 or last:
                        self._ask()
                    self._report(journal, wait=last)
                    if self.step % recipe.eval_every == 0 and not last:
                        self._held_out(journal)
                    if self.step % recipe.save_every == 0 and not last:
                        self._save(journal)
                if self.step != self._saved:
                    self._write()
                if not self.stopping:
                    metrics = self._held_out(journal)
                if self.stopping:
                    name = signal.Signals(self.stopping).name
                    journal.say(f"{name}: {self.out} is saved at step {self.step}; --resume goes on")
                    raise SystemExit(128 + self.stopping)
                journal.say(self._summary(metrics))
        finally:
            journal.close()
            self.close()
        return metrics

    def _one_step(self, take) -> None:
        recipe = self.recipe
        first = self.step * recipe.accumulate
        micros = range(first, first + recipe.accumulate)
        batches, tokens = zip(*map(take, micros), strict=True)
        rngs = torch.tensor([[recipe.seed, micro] for micro in micros], device="cpu")
        rate = optimizer.learning_rate(self.step, peak=recipe.lr, warmup=recipe.warmup, total=recipe.steps)
        self.take_step(batches, rngs, rate, self.step - self._from)
        self.step += 1
        self._tokens, self._rate = self._tokens + sum(tokens), rate

    def _window(self) -> None:
        """Begin the next line of the log, and the ledger anew."""
        self._from, self._tokens = self.step, 0

    def _ask(self) -> None:
        """End a line of the log: begin to read the ledger, which the device will come to in its time."""
        rows = self.ledger.read(self.step - self._from)
        self._asked.append((self._from, self.step, self._tokens, self._rate, rows))
        self._window()

    def _report(self, journal: Journal, wait: bool) -> None:
        """Write the lines whose numbers have arrived; with `wait`, all that were asked for."""
        if self.take_step.why_eager and not self._told:
            journal.say(f"step {self.step}: not a CUDA graph, {self.take_step.why_eager}")
            self._told = True
        while self._asked and (rows := self._asked[0][-1](wait)) is not None:
            self._line(journal, *self._asked.popleft()[:-1], rows)

    def _line(
        self, journal: Journal, first: int, last: int, tokens: int, rate: float, rows: list[Row]
    ) -> None:
        for step, row in enumerate(rows, first):
            self.skipped.add(step, row.skipped > 0)
        sums, now = total(rows), time.monotonic()
        facts = {
            "learning_rate": rate,
            "skipped": self.skipped.steps,
            "tokens": tokens,
            "tokens_per_second": tokens / (now - self._since),
        }
        journal.write("train", last, means(sums, len(rows), len(rows) * self.recipe.accumulate) | facts)
        self._since = now
        if sums.collapsed:
            journal.say(
                f"step {last}: has the generator collapsed? Of {sums.masked:.0f} masked tokens it knows "
                f"{sums.mlm_correct:.0f} and replaces {sums.replaced:.0f}"
            )
        if self.skipped.longest >= PATIENCE:
            self._give_up(self.skipped.first)

    def _give_up(self, where: int) -> None:
        n, last = self.recipe.accumulate, snapshot.load(self.checkpoints)
        record = {"step": where, "seed": self.recipe.seed, "micro_batches": [where * n, where * n + n - 1]}
        record |= {"checkpoint": str(last.folder)}
        (self.out / "not_finite.json").write_text(json.dumps(record, indent=1) + "\n")
        raise NotFinite(
            f"pretrain: the gradient was not finite {PATIENCE} times in a row, first at step {where}; "
            f"the weights are those before it, the last checkpoint is of step {last.step}. To see it again: "
            f"--resume {self.out}, or feed[{where * n}] with rng ({self.recipe.seed}, {where * n}); "
            "not_finite.json has the numbers"
        )

    def evaluate(self) -> dict[str, float]:
        """Return `evaluation.evaluate` on the held-out text."""
        number = min(self.recipe.eval_batches, max(1, self.held.batches.num_batches))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            batches = (self.held[index] for index in range(number))
            return evaluate(self.model, batches, stop=lambda: self.stopping)

    def _held_out(self, journal: Journal) -> dict[str, float]:
        self._report(journal, wait=True)
        with self._aside():
            metrics = self.evaluate()
        if not self.stopping:
            journal.write("held_out", self.step, metrics)
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

    def _summary(self, metrics: dict[str, float]) -> str:
        words = "step {step}, on held-out text: MLM loss {mlm_loss:.3f}, accuracy {mlm_accuracy:.3f}; "
        words += "RTD loss {rtd_loss:.4f}, AUC {auc:.3f} [{auc_low:.3f}, {auc_high:.3f}]"
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

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What is done meanwhile does not count in tokens a second."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def _save(self, journal: Journal) -> None:
        """Write a checkpoint; one that fails costs a warning, several in a row the run."""
        try:
            with self._aside():
                self._write()
            self._failed_saves = 0
        except OSError as error:
            self._failed_saves += 1
            if self._failed_saves == FAILED_SAVES:
                raise
            journal.say(f"step {self.step}: no checkpoint, {error}; the one before stands")

    def _write(self) -> None:
        tensors = {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "optimizer": optimizer.state(self.model, self.optimizer),
        }
        reads = [*(asked[-1] for asked in self._asked), self.ledger.read(self.step - self._from)]
        unread = sum(row.skipped > 0 for read in reads for row in read(True))
        facts = {"text": self.train_text.text, "skipped": self.skipped.steps + unread}
        snapshot.save(self.checkpoints, self.step, tensors, facts, self.recipe.keep)
        self._saved = self.step
        for name in ("discriminator", "generator"):
            if (half := getattr(self.model, name, None)) is not None:
                half.save_pretrained(self.out / name)
                data.save_tokenizer(self.tokenizer, self.out / name)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note the first signal that asks to end; the second ends at once."""

        def note(number, frame):
            self.stopping = number
            signal.signal(number, signal.SIG_DFL)

        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        try:
            before = {n: signal.signal(n, note) for n in numbers}
        except ValueError:  # not in the main thread: the signals are somebody else's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
