"""Initial weights of a run: halves from Hugging Face folders, or both halves of another run."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from electra_fast import local
from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.model import Discriminator, Electra, Generator
from electra_fast.pretrained import TABLES, PretrainedHalf
from electra_fast.two_tower import TwoTowerGenerator

SIZES = ("layers", "hidden", "heads", "ffn")
# The halves that a file can have, each with the beginning of a name that only it has, and the next ones lack.
KINDS = (
    (TwoTowerGenerator, "electra.encoder.reversed_layer."),
    (Generator, "generator_predictions."),
    (Discriminator, "discriminator_predictions."),
)
COMMON = ("vocab_size", "embedding", "max_positions", "type_vocab", "eps")


class Weights(NamedTuple):
    """The halves that were found; both are None for a run with random weights."""

    discriminator: Discriminator | None = None
    generator: Generator | TwoTowerGenerator | None = None
    tokenizer: Path | None = None  # a folder with a tokenizer

    def config(self, config: ElectraConfig) -> ElectraConfig:
        """Return `config` with the sizes of the halves.

        Raises:
            ValueError: the vocabulary has more pieces than the halves have rows.
        """
        changes = {}
        for half, prefix in ((self.generator, "generator_"), (self.discriminator, "")):
            if half is not None:
                changes |= {prefix + name: getattr(half.config, name) for name in SIZES}
                changes |= {name: getattr(half.config, name) for name in COMMON}
        rows = changes.get("vocab_size", config.vocab_size)
        if rows < config.vocab_size:
            rule = f"have {config.vocab_size} rows, the size of the vocabulary"
            raise ValueError(must("pretrain: --init", rule, rows))
        return dataclasses.replace(config, **changes)

    def copy_into(self, model: Electra) -> None:
        """Copy the halves into a model.

        Raises:
            ValueError: the model shares tables that differ between the halves, or has another generator.
        """
        if self.generator is not None and self.discriminator is not None and model.config.sharing != "none":
            a, b = self.generator.state_dict(), self.discriminator.state_dict()
            if not all(torch.equal(a[name], b[name]) for name in TABLES):
                rule = f"have halves with equal tables for sharing={model.config.sharing!r}"
                remedy = "--set sharing=none keeps both"
                raise ValueError(must("pretrain: --init", rule, "different ones", remedy))
        if self.generator is not None:
            if type(model.generator) is not type(self.generator):
                rule = f"have a generator for generator={model.config.generator_kind!r}"
                remedy = "name the folder of its discriminator"
                got = type(self.generator).__name__
                raise ValueError(must("pretrain: --init", rule, got, remedy))
            model.generator.load_state_dict(self.generator.state_dict())
        if self.discriminator is not None:
            if model.config.sharing == "gdes":
                rule = "have no discriminator for sharing='gdes', whose tables are differences"
                raise ValueError(must("pretrain: --init", rule, "one"))
            model.discriminator.load_state_dict(self.discriminator.state_dict())


def load(folders: Iterable[str]) -> Weights:
    """Load the halves in some folders.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a folder has no half or one that cannot be read, or two folders have the same half.
    """
    weights = Weights()
    for folder in folders:
        folder = local.existing("pretrain: --init", folder)
        inner = [folder / name for name in ("discriminator", "generator")]
        for path in [p for p in inner if p.exists()] or [folder]:
            half = _half(path)
            field = "discriminator" if isinstance(half, Discriminator) else "generator"
            if getattr(weights, field) is not None:
                raise ValueError(must("pretrain: --init", f"name one {field}", f"a second one in {path}"))
            weights = weights._replace(**{field: half})
            if any((path / name).exists() for name in ("tokenizer.json", "vocab.txt")):
                weights = weights._replace(tokenizer=path)
    return weights


def _half(folder: Path) -> PretrainedHalf:
    from safetensors import SafetensorError, safe_open

    file = folder / "model.safetensors"
    if not file.is_file():
        rule = "be Hugging Face folders with model.safetensors"
        raise ValueError(must("pretrain: --init", rule, folder))
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
    except SafetensorError as error:
        raise ValueError(must("pretrain: --init", "have whole files", f"{file}: {error}")) from None
    for cls, prefix in KINDS:
        if any(name.startswith(prefix) for name in names):
            try:
                return cls.from_pretrained(folder)
            except RuntimeError as error:  # a list of tensors over several lines
                got = f"{folder}: {' '.join(str(error).split())}"
                raise ValueError(must("pretrain: --init", "fit its config.json", got)) from None
    found = ", ".join(sorted({name.split(".")[0] for name in names}))
    rule, got = "be ElectraForPreTraining or ElectraForMaskedLM", f"{folder} with {found}"
    raise ValueError(must("pretrain: --init", rule, got))
