"""A pre-trained model to use: its discriminator, its generator, or both, and their tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from electra_fast import data, local
from electra_fast.errors import must
from electra_fast.model import Discriminator, Generator
from electra_fast.pretrained import TWO_TOWER, PretrainedHalf
from electra_fast.train.run_folder import WITHOUT_MODEL, find_recipe

PRECISIONS = ("float32", "bf16")


@dataclass(eq=False)
class Pretrained:
    """What `load` returns; the functions of this package take it instead of a folder."""

    folder: Path
    tokenizer: Any
    discriminator: Discriminator | None
    generator: Generator | None
    precision: str = "float32"

    @property
    def device(self) -> torch.device:
        return next((self.discriminator or self.generator).parameters()).device

    @property
    def electric(self) -> bool:
        """Whether the discriminator was trained with Electric's objective: its output is an energy."""
        return self.discriminator is not None and self.discriminator.config.objective == "electric"

    def require(self, call: str, half: str) -> Any:
        """Return a half of the model, "discriminator" or "generator".

        Raises:
            ValueError: the folder does not have it, or its generator does not read [MASK].
        """
        if (found := getattr(self, half)) is None:
            remedy = "name the folder of a run of pre-training, which has both halves"
            if half == "generator" and find_recipe(self.folder):
                half = "generator that predicts masked tokens"
                remedy = "pre-train with --set generator=masked"
            raise ValueError(must(f"{call}: model", f"have a {half}", str(self.folder), remedy))
        return found


def load(
    folder: str | Path | Pretrained,
    *,
    device: str | torch.device | None = None,
    precision: str = "float32",
    int8: bool = False,
    call: str = "load",
) -> Pretrained:
    """Load a pre-trained model.

    Args:
        folder: of a run of pre-training, which has both halves, or of a Hugging Face ElectraForPreTraining
            (the discriminator) or ElectraForMaskedLM (the generator). A result of `load` is returned
            unchanged.
        device: None: a GPU if there is one.
        precision: float32, or bf16 for autocast.
        int8: multiply in int8 in the layers, on a CPU.
        call: begins the errors.

    Raises:
        ValueError, OSError: the folder cannot be read, has a model of another kind or has no tokenizer.
    """
    if isinstance(folder, Pretrained):
        return folder
    require_precision(f"{call}: precision", precision)
    where = local.device(f"{call}: device", device)
    path = local.existing(f"{call}: model", folder)
    halves: list[Any] = [None, None]
    for i, kind in enumerate((Discriminator, Generator)):
        half = path / kind.__name__.lower()
        if half.is_dir() and not _has_two_towers(half):
            halves[i] = _half(call, kind, half)
        elif _has(path, kind):
            halves[i] = _half(call, kind, path)
    if halves == [None, None]:
        raise ValueError(_another_kind(call, path))
    tokenizer = data.load_tokenizer(_with_tokenizer(path), special_ids=None)
    for half in filter(None, halves):
        data.require_rows(f"{call}: {path}", tokenizer, half.config.vocab_size)
        half.to(where)
        half.encoder.int8 = int8
    return Pretrained(path, tokenizer, *halves, precision)


def most_tokens(half: PretrainedHalf) -> int:
    """Return how many tokens of a text fit between [CLS] and [SEP]."""
    return half.config.max_positions - 2


def require_precision(argument: str, precision: str) -> None:
    """Raise a ValueError if `precision` is unknown; `argument` begins the message."""
    if precision not in PRECISIONS:
        raise ValueError(must(argument, f"be one of {', '.join(PRECISIONS)}", repr(precision)))


def _half(call: str, kind: type[PretrainedHalf], folder: Path) -> PretrainedHalf:
    try:
        return kind.from_pretrained(folder)
    except RuntimeError as error:
        raise ValueError(must(f"{call}: model", f"have the weights of {kind.__name__}", error)) from None


def _has(folder: Path, kind: type[PretrainedHalf]) -> bool:
    file = folder / "config.json"
    if not file.is_file() or not (folder / "model.safetensors").is_file():
        return False
    return kind.hugging_face_class in local.json_object("load", file).get("architectures", [])


def _has_two_towers(folder: Path) -> bool:
    file = folder / "config.json"
    return file.is_file() and local.json_object("load", file).get("model_type") == TWO_TOWER


def _with_tokenizer(folder: Path) -> Path:
    """Return the folder with the tokenizer: of a run it is in a folder of its own."""
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def _another_kind(call: str, folder: Path) -> str:
    rule = "be the folder of a pre-trained ELECTRA, with its discriminator or its generator"
    got, remedy = str(folder), ""
    if (folder / "config.json").is_file():
        described = local.json_object(call, folder / "config.json")
        kinds = ", ".join(map(str, described.get("architectures") or [described.get("model_type")]))
        got = f"{folder} with {kinds}"
        if kinds.startswith("ElectraFor"):
            remedy = "a fine-tuned model is used by Classifier, Tagger, Answerer, rank or intent"
    elif find_recipe(folder) is not None:
        remedy = WITHOUT_MODEL
    return must(f"{call}: model", rule, got, remedy)
