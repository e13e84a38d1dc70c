"""Pre-training, from a folder of text to a discriminator.

    python -m electra_fast pretrain --preset small --data corpus/ --out runs/small
    python -m electra_fast pretrain --resume runs/small

    Pretraining(Recipe(preset="tiny", steps=300), "runs/demo").run()  # the same in Python

The run exports the halves as Hugging Face folders, discriminator/ and generator/; `Training` has the rest.
"""

import contextlib
import dataclasses
import itertools
import warnings
from pathlib import Path

import torch

from electra_fast import data, local
from electra_fast.distributed import World
from electra_fast.errors import must
from electra_fast.model import Electra
from electra_fast.ops import FUSED, Ops
from electra_fast.train import corpus, optimizer, warm_start
from electra_fast.train.divergence import Collapse, NotFinite, not_finite
from electra_fast.train.evaluation import evaluate, loss_without_context, summary, unigram_loss
from electra_fast.train.logger import Logger
from electra_fast.train.metrics import StepMetrics
from electra_fast.train.recipe import Recipe
from electra_fast.train.run_folder import RunFolder, find_recipe, require_new
from electra_fast.train.saver import State
from electra_fast.train.training import Training


class Pretraining(Training):
    """One run. Creating it reads the data and loads the last checkpoint or writes the first; `run` trains.

    Args:
        recipe: the options of the run. If `out` has a run already, that run is resumed, with the changes that
            `Recipe.changed` allows.
        out: the folder of the run.
        ops: the implementation; `REFERENCE` for comparisons.
        make_model: a function of (config, ops) that returns a module like `Electra`.
        device: None: a GPU if there is one.
        graph: on a GPU, replay the steps as a CUDA graph if they can be captured; False: launch each kernel.
        world: the processes; None: those of torchrun, or this one.
        verify: read the text or the tokens as a whole, even if no file has another size or time.

    Raises:
        ValueError: the recipe or the data cannot be used or differ from those of the run in `out` or of
            another process, the device cannot be used, or the number of processes does not divide the
            micro-batches of a step.
        OSError: `out` cannot be written, has too little space, or is in use by another run.
    """

    command, text_option = "pretrain", "--data"

    def __init__(
        self,
        recipe: Recipe,
        out: str | Path,
        *,
        ops: Ops = FUSED,
        make_model=Electra,
        device: str | torch.device | None = None,
        graph: bool = True,
        world: World | None = None,
        verify: bool = False,
    ):
        world = World.join("pretrain", device) if world is None else world
        self.default_precision = "bf16" if world.device.type == "cuda" else "float32"
        world.require_same({"the options": recipe.given()})
        recipe = world.from_first(lambda: self._recipe(recipe, Path(out), world))
        folder = world.together(lambda: RunFolder(out) if world.first else None)

        weights = world.together(lambda: warm_start.load(recipe.init))
        tokenizer = world.from_first(lambda: corpus.find_tokenizer(recipe, folder, weights))
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.config = weights.config(recipe.model(vocab_size, data.special_ids(tokenizer)))
        texts = world.together(lambda: corpus.tokenized(recipe, tokenizer, verify))
        world.require_same({"the text of --data": texts[0].text, "the text of --held-out": texts[1].text})
        self.train_text, self.held_out_text = texts
        loader, self.held_out_loader = (
            corpus.loader(recipe, text, self.config, world.device) for text in texts
        )

        torch.manual_seed(recipe.seed)
        model = make_model(self.config, ops)
        weights.copy_into(model)
        model.to(world.device).train()
        optim = optimizer.adamw(
            model,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
            bias_correction=recipe.bias_correction,
        )
        self.collapse = Collapse(recipe.warmup)
        data_and_model = (tokenizer, self.train_text.text, model, optim, loader)
        run = (world, recipe, Path(out), folder)
        super().__init__(*run, *data_and_model, StepMetrics, graph, self.collapse.warnings)

    def _recipe(self, recipe: Recipe, out: Path, world: World) -> Recipe:
        """Return the complete recipe: that of the run in `out` with the given changes, or a new one."""
        file = find_recipe(out)
        if file is None:
            require_new(out)
        recipe = Recipe.load(file).changed(**recipe.given()) if file else recipe.resolved(world.size)
        world.require_divides(recipe.accumulate)
        if file and recipe.precision is None:
            text = f"pretrain: {file} does not say the precision, so the run continues in"
            warnings.warn(f"{text} {self.default_precision}; --precision names another", stacklevel=3)
        for option, paths in (("--data", recipe.data), ("--held-out", recipe.held_out)):
            for path in paths:
                local.existing(f"pretrain: {option}", path, hub=False)
            if len({Path(path).resolve() for path in paths}) < len(paths):
                raise ValueError(must(f"pretrain: {option}", "name each path once", ", ".join(paths)))
        return dataclasses.replace(recipe, precision=recipe.precision or self.default_precision)

    def evaluate(self) -> dict[str, float]:
        """Return `evaluation.evaluate` on the held-out text."""
        count = min(self.recipe.eval_batches, max(1, self.held_out_loader.batches.num_batches))
        own = range(self.world.rank, count, self.world.size)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
        prefetch = self.held_out_loader.prefetch(own.start, own.step, stop=self._stopping)
        with autocast, contextlib.closing(prefetch) as batches:
            some = (batch for batch, _ in itertools.islice(batches, len(own)))
            return evaluate(self.model, some, self._stopping, self.world)

    def _evaluate_and_log(self, logger: Logger) -> dict[str, float]:
        metrics = super()._evaluate_and_log(logger)
        if not self.stopping:
            logger.warn(self.step, self.collapse.discriminator(self.step, metrics["logit_std"]))
        return metrics

    def summary(self, metrics: dict[str, float]) -> str:
        loss = "NCE" if self.config.objective == "electric" else "RTD"
        return f"on held-out text: {summary(metrics, loss)}"

    def check(self, metrics: dict[str, float], result: str) -> None:
        if not_finite(metrics):
            rule = "be finite"
            raise NotFinite(must("pretrain: the loss on held-out text", rule, result, "lower --lr"))

    def export(self, state: State) -> None:
        self.folder.export(state.model, self.tokenizer)

    def introduce(self, logger: Logger) -> None:
        texts = (self.train_text, self.held_out_text)
        unigram = unigram_loss(*(t.first_tokens() for t in texts), self.config.vocab_size)
        facts = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": self.config.vocab_size,
            "train_tokens": self.train_text.num_tokens,
            "held_out_tokens": self.held_out_text.num_tokens,
            "unknown": self.train_text.unknown.share,
            "sequences": self.loader.batches.num_sequences,
            "loss_without_context": loss_without_context(unigram, self.config),
        }
        if self.step == 0:
            logger.write("begin", 0, facts)
            if self.world.size > 1:
                options = f"--batch-tokens {self.recipe.batch_tokens} --accumulate {self.recipe.accumulate}"
                others = "any number of processes that divides the micro-batches trains the same model"
                logger.say(f"{self.world.size} processes; with {options}, {others}")
        logger.say(
            "{parameters:,} parameters, {vocabulary:,} pieces; {train_tokens:,} tokens to train on in "
            "{sequences:,} sequences, {held_out_tokens:,} held out: MLM loss without context "
            "{loss_without_context:.3f}".format(**facts)
        )
        if self.step > 0 and self.recipe.precision != self.default_precision:
            default = f"the default for a new run on {self.device} is {self.default_precision}"
            logger.say(f"{self.out} continues in {self.recipe.precision}, as it was started; {default}")
