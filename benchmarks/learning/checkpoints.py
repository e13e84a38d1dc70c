"""The models of a run of pre-training: its checkpoints, and its initial weights."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from electra_fast import data
from electra_fast.config import ElectraConfig
from electra_fast.model import Discriminator, Electra, Generator
from electra_fast.train.checkpoint import read, restore
from electra_fast.train.recipe import Recipe
from electra_fast.train.run_folder import find_recipe
from electra_fast.use import Pretrained


def kept(run: Path) -> list[Path]:
    """Return the folders of the checkpoints that a run has kept, the last one at the end."""
    return sorted((run / "checkpoints").glob("step-*"))


def model_of(checkpoint: Path, make_model: Callable = Electra) -> tuple[int, Any]:
    """Return the step and the model of a checkpoint."""
    run = checkpoint.parents[1]
    found, model = read(checkpoint), make_model(config_of(recipe_of(run), tokenizer_of(run)))
    restore("model", dict(model.named_parameters()), found.tensors["model"])
    return found.step, model.eval()


def final_model(run: Path, make_model: Callable = Electra) -> Any:
    """Return the model of the last checkpoint."""
    return model_of(kept(run)[-1], make_model)[1]


def initial_weights(run: Path, make_model: Callable) -> Discriminator | Generator:
    """Return the discriminator before its first step, or the generator of a model that has only this.

    It is made from the run's seed, as `Pretraining` does.
    """
    recipe = recipe_of(run)
    torch.manual_seed(recipe.seed)
    model = make_model(config_of(recipe, tokenizer_of(run)))
    return model.discriminator if hasattr(model, "discriminator") else model.generator


def discriminators(run: Path) -> Iterator[tuple[int, Pretrained]]:
    """Yield the step and the discriminator of the initial weights, and of each checkpoint after them."""
    tokenizer = tokenizer_of(run)
    yield 0, Pretrained(run, tokenizer, initial_weights(run, Electra).eval(), None)
    for step, model in map(model_of, kept(run)):
        if step:
            yield step, Pretrained(run, tokenizer, model.discriminator, None)


def recipe_of(run: Path) -> Recipe:
    return Recipe.load(find_recipe(run))


def tokenizer_of(run: Path) -> Any:
    return data.load_tokenizer(run / "tokenizer")


def config_of(recipe: Recipe, tokenizer: Any) -> ElectraConfig:
    """Return the configuration of a recipe's model, for the vocabulary of a tokenizer."""
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return recipe.model(vocab_size, data.special_ids(tokenizer))
