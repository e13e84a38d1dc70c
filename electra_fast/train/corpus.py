"""The data of a run: its tokenizer, its training and held-out text, and their loaders."""

from pathlib import Path
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
    if recipe.vocab is not None:
        return new_tokenizer(recipe)
    if weights.tokenizer is not None:
        return data.load_tokenizer(weights.tokenizer, special_ids=None, **recipe.normalization())
    if (tokens := _tokens_folder("--data", recipe.data)) is not None:
        return data.tokenizer_of(tokens, **recipe.normalization())
    raise ValueError(must("pretrain: --vocab", "be given, as the folders of --init have no vocabulary", None))


def new_tokenizer(recipe: Recipe):
    """Return the tokenizer that `--vocab` names, or one that is trained on the data."""
    options, subject = recipe.normalization(), f"{recipe.command}: --vocab"
    if not recipe.vocab.isdecimal():
        return data.load_tokenizer(local.existing(subject, recipe.vocab), special_ids=None, **options)
    if _tokens_folder("--data", recipe.data) is not None:
        raise ValueError(must(subject, "be left out, because the data is tokens", recipe.vocab))
    return data.train_tokenizer(documents(recipe, recipe.data), int(recipe.vocab), **options)


def tokenized(recipe: Recipe, tokenizer, verify: bool = False) -> tuple[data.Encoded, data.Encoded]:
    """Return the training text and the held-out text as token ids; `verify` reads all files again.

    Raises:
        ValueError: the data has too few documents or too many unknown words, or is damaged.
    """
    text = _tokenize(recipe, "--data", recipe.data, tokenizer, verify)
    if recipe.held_out:
        return text, _tokenize(recipe, "--held-out", recipe.held_out, tokenizer, verify)
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
    return Loader(batches, lambda index: named(make(index)), device, batches.announce)


def named(batch: data.Packed | data.Padded) -> dict[str, Any]:
    """Return a batch as the keyword arguments of `Electra.forward`."""
    return {name: x for name, x in batch._asdict().items() if x is not None}


def documents(recipe: Recipe, paths: tuple[str, ...]) -> data.Documents:
    """Return the documents of some files and folders."""
    options = {name: getattr(recipe, name) for name in ("text_column", "blanks_separate")}
    return data.documents(paths or None, **options)


def _tokens_folder(option: str, paths: tuple[str, ...]) -> Path | None:
    """Return the folder of tokens that an option names, None for text.

    Raises:
        ValueError: it names other paths too.
    """
    found = [path for path in paths if data.is_tokens_folder(path)]
    if found and len(paths) > 1:
        rule, got = "name one folder of tokens, or only text", f"{found[0]} and {len(paths) - 1} more"
        raise ValueError(must(f"pretrain: {option}", rule, got, "tokenize all text into one folder"))
    return Path(found[0]) if found else None


def _tokenize(recipe: Recipe, option: str, paths: tuple[str, ...], tokenizer, verify: bool) -> data.Encoded:
    """Tokenize text, or open tokens; print the share of [UNK] and what was skipped; refuse too many."""
    if (tokens := _tokens_folder(option, paths)) is not None:
        text, note = data.open_tokens(tokens, tokenizer, verify), None
    else:
        texts = documents(recipe, paths)
        text = data.tokenize(texts, tokenizer, verify=verify)
        note = texts.note
    if verify:
        data.forget_index(text)
    print(f"{option}: {text.unknown}", *filter(None, [note]), sep="; ", flush=True)
    if not recipe.allow_unknown:
        data.require_known(text.unknown, tokenizer, option)
    return text
