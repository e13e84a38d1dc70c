"""The data of a run: its tokenizer, its training and held-out text, and their loaders."""

from typing import Any

import torch

from electra_fast import data, local
from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.train.loader import Loader
from electra_fast.train.recipe import Recipe
from electra_fast.train.run_folder import RunFolder
from electra_fast.train.warm_start import Weights

HELD_OUT = 20  # every 20th document, unless --held-out names other text


def find_tokenizer(recipe: Recipe, folder: RunFolder, weights: Weights):
    """Return the tokenizer of the run in `folder`, or for a new run load or train it as `recipe` says.

    Raises:
        ValueError: there is no vocabulary.
    """
    if folder.tokenizer.exists():
        return data.load_tokenizer(folder.tokenizer)
    if any(folder.checkpoints.glob("step-*")):
        remedy = f"copy {folder.path}/discriminator to {folder.tokenizer}"
        rule = "be the tokenizer with which the run was started"
        raise ValueError(must(f"pretrain: {folder.tokenizer}", rule, "nothing there", remedy))
    vocab = weights.tokenizer if recipe.vocab is None else recipe.vocab
    if vocab is None:
        raise ValueError(
            must("pretrain: --vocab", "be given, as the folders of --init have no vocabulary", None)
        )
    options = recipe.normalization()
    if str(vocab).isdecimal():
        return data.train_tokenizer(_documents(recipe, recipe.data), int(vocab), **options)
    return data.load_tokenizer(local.existing("pretrain: --vocab", vocab), special_ids=None, **options)


def tokenized(recipe: Recipe, tokenizer) -> tuple[data.Encoded, data.Encoded]:
    """Return the training text and the held-out text as token ids.

    Raises:
        ValueError: the data has too few documents or too many unknown words.
    """
    text = _tokenize(recipe, "--data", recipe.data, tokenizer)
    if recipe.held_out:
        return text, _tokenize(recipe, "--held-out", recipe.held_out, tokenizer)
    if (count := len(text.offsets) - 1) < HELD_OUT:
        rule = f"have {HELD_OUT} documents or more, with blank lines between, of which one is held out"
        raise ValueError(must("pretrain: --data", rule, count, "or name other text with --held-out"))
    return data.held_out(text, HELD_OUT)


def loader(recipe: Recipe, text: data.Encoded, config: ElectraConfig, device: torch.device) -> Loader:
    """Return the loader of one text."""
    packed, padded = {"batch_tokens": recipe.batch_tokens}, {"batch_size": recipe.batch_tokens // recipe.seq}
    batches = data.Batches(
        text,
        seq_len=recipe.seq,
        pairs=recipe.pairs,
        seed=recipe.seed,
        pad_id=config.pad_id,
        cls_id=config.cls_id,
        sep_id=config.sep_id,
        **(packed if recipe.packed else padded),
    )
    make = batches.fixed_shape if recipe.packed else batches.padded
    return Loader(batches, lambda index: named(make(index)), device)


def named(batch: data.Packed | data.Padded) -> dict[str, Any]:
    """Return a batch as the keyword arguments of `Electra.forward`."""
    return {name: x for name, x in batch._asdict().items() if x is not None}


def _documents(recipe: Recipe, paths: tuple[str, ...]) -> data.Documents:
    options = {name: getattr(recipe, name) for name in ("text_column", "blanks_separate")}
    return data.documents(paths or None, **options)


def _tokenize(recipe: Recipe, option: str, paths: tuple[str, ...], tokenizer) -> data.Encoded:
    """Tokenize text; print the share of [UNK] and the files that were skipped; refuse too large a share."""
    documents = _documents(recipe, paths)
    text = data.tokenize(documents, tokenizer)
    print(f"{option}: {text.unknown}", *filter(None, [documents.note]), sep="; ", flush=True)
    if not recipe.allow_unknown:
        data.require_known(text.unknown, tokenizer, option)
    return text
