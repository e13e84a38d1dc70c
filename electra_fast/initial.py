"""Weights to start from: halves in Hugging Face folders, or both of a run's folder."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from electra_fast import local
from electra_fast.checkpoint import TABLES, PretrainedHalf
from electra_fast.config import ElectraConfig
from electra_fast.model import Discriminator, Electra, Generator

SIZES = ("layers", "hidden", "heads", "ffn")
COMMON = ("vocab_size", "embedding", "max_positions", "type_vocab", "eps")


class Weights(NamedTuple):
    """The halves that were found; either may be None, as both are for a run from scratch."""

    discriminator: Discriminator | None = None
    generator: Generator | None = None
    tokenizer: Path | None = None  # a folder that has one

    def config(self, config: ElectraConfig) -> ElectraConfig:
        """Return `config` with the sizes of the halves.

        Raises:
            ValueError: the vocabulary has more pieces than they have rows.
        """
        changes = {}
        for half, prefix in ((self.generator, "generator_"), (self.discriminator, "")):
            if half is not None:
                changes |= {prefix + name: getattr(half.tower, name) for name in SIZES}
                changes |= {name: getattr(half.tower, name) for name in COMMON}
        rows = changes.get("vocab_size", config.vocab_size)
        if rows < config.vocab_size:
            raise ValueError(
                f"pretrain: --init must have {config.vocab_size} rows, the vocabulary, got {rows}"
            )
        return dataclasses.replace(config, **changes)

    def into(self, model: Electra) -> None:
        """Copy them.

        Raises:
            ValueError: the model shares tables that differ between the halves.
        """
        if self.generator is not None and self.discriminator is not None and model.config.sharing != "none":
            one, other = self.generator.state_dict(), self.discriminator.state_dict()
            if not all(torch.equal(one[name], other[name]) for name in TABLES):
                raise ValueError(
                    f"pretrain: --init must have halves with equal tables for "
                    f"sharing={model.config.sharing!r}, got others; --set sharing=none keeps both"
                )
        if self.generator is not None:
            model.generator.load_state_dict(self.generator.state_dict())
        if self.discriminator is not None:
            if model.config.sharing == "gdes":
                raise ValueError(
                    "pretrain: --init must have no discriminator for sharing='gdes', whose tables are "
                    "a difference; got one"
                )
            model.discriminator.load_state_dict(self.discriminator.state_dict())


def read(folders: Iterable[str]) -> Weights:
    """Read the halves that are in some folders.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a folder has neither half, or one that cannot be read; or two have the same half.
    """
    weights = Weights()
    for folder in folders:
        folder = local.existing("pretrain: --init", folder)
        inner = [folder / name for name in ("discriminator", "generator")]
        for place in [p for p in inner if p.exists()] or [folder]:
            half = _half(place)
            field = "generator" if isinstance(half, Generator) else "discriminator"
            if getattr(weights, field) is not None:
                raise ValueError(f"pretrain: --init must name one {field}, got a second one in {place}")
            weights = weights._replace(**{field: half})
            if any((place / name).exists() for name in ("tokenizer.json", "vocab.txt")):
                weights = weights._replace(tokenizer=place)
    return weights


def _half(folder: Path) -> PretrainedHalf:
    from safetensors import SafetensorError, safe_open

    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(
            f"pretrain: --init must be Hugging Face folders with model.safetensors, got {folder}"
        )
    try:
        with safe_open(file, "pt") as opened:
            heads = {name.split(".")[0] for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"pretrain: --init must have whole files, got {file}: {error}") from None
    for cls, head in ((Generator, "generator_predictions"), (Discriminator, "discriminator_predictions")):
        if head in heads:
            try:
                return cls.from_pretrained(folder)
            except RuntimeError as error:  # a list of tensors over several lines
                listed = " ".join(str(error).split())
                raise ValueError(
                    f"pretrain: --init must fit its config.json, got {folder}: {listed}"
                ) from None
    raise ValueError(
        f"pretrain: --init must be ElectraForPreTraining or ElectraForMaskedLM, got {folder} with "
        f"{', '.join(sorted(heads))}"
    )
