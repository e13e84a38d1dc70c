"""The options of a pre-training run: on the command line, and in the file recipe.json of its folder."""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from electra_fast import local
from electra_fast.config import ElectraConfig
from electra_fast.errors import must

# The values of the paper (Clark et al. 2020, appendix A). tiny is for minutes on a CPU. The norm of its
# gradient falls from 40 to 1 in 200 steps; with beta2 = 0.999 Adam needs 1000 steps to forget the first,
# clipped ones. At twice the rate the discriminator collapses within 1250 steps, in float32 and in bf16.
PAPER = {
    "tiny": {"seq": 128, "batch_tokens": 1024, "steps": 2000, "lr": 1e-3, "beta2": 0.98, "vocab": "4096"},
    "small": {"seq": 128, "batch_tokens": 128 * 128, "steps": 1_000_000, "lr": 5e-4},
    "base": {"seq": 512, "batch_tokens": 256 * 512, "steps": 766_000, "lr": 2e-4},
    "large": {"seq": 512, "batch_tokens": 2048 * 512, "steps": 400_000, "lr": 2e-4},
}
COMMON = {"vocab": "30522", "beta2": 0.999}
# The options that a resumed run may change. The text may be at another path: its hash must be the same.
CHANGEABLE = {"steps", "lr", "clip", "data", "held_out", "save_every", "eval_every", "log_every", "keep"}
CHANGEABLE |= {"text_column", "allow_unknown"}
NORMALIZATION = ("lowercase", "strip_accents", "max_word_chars")  # arguments of `load_tokenizer`
MOST_PIECES = 2**20  # of a trained vocabulary: without memory the trainer would end the process
MOST_LAYERS = 1000
MOST_LOGGED = 100_000  # steps per line of the log, each of which needs a row on the device


def _option(default: Any, help: str, off: tuple[str, str] | None = None) -> Any:
    return field(default=None, metadata={"help": help, "default": default, "off": off})


@dataclass(frozen=True)
class Recipe:
    """All options of a run. An option that is not given is None until `resolved` sets its default.

    So a given value can be distinguished from a default, even if both are equal.
    """

    preset: str = _option("small", f"sizes of the model: {', '.join(PAPER)}")
    set: tuple[str, ...] = _option((), "fields of ElectraConfig to change in the preset: dropout=0")
    init: tuple[str, ...] = _option((), "initial weights: Hugging Face folders, or the folder of another run")

    data: tuple[str, ...] = _option(
        (),
        "files and folders: text (a blank line ends a document), JSON, CSV, TSV, Parquet, Arrow, folders of "
        "datasets' save_to_disk; also compressed (gz, xz, bz2, zst, tar); default: the manual of Python",
    )
    text_column: str | None = _option(
        None, "name of the text in JSON and tables; default: text, or the only column of strings"
    )
    blanks_separate: bool = _option(
        True, "blank lines end a document of plain text; otherwise only the end of its file does"
    )
    held_out: tuple[str, ...] = _option((), "text to evaluate on; default: every 20th document of the data")
    vocab: str | None = _option(
        None, "vocab.txt, tokenizer.json or a Hugging Face folder; or a size, to train it on the data"
    )
    lowercase: bool | None = _option(
        None,
        "lower-case the text; default: the setting in the vocabulary's folder, else yes",
        off=("--cased", "keep the case of the text"),
    )
    strip_accents: bool | None = _option(
        None,
        "strip accents and decompose Korean; default: as --lowercase",
        off=("--keep-accents", "keep accents and Korean syllables"),
    )
    max_word_chars: int | None = _option(None, "a longer word is [UNK]; default: 100, as in BERT")
    allow_unknown: bool = _option(False, "train even if more than 5 percent of the text is [UNK]")

    seq: int | None = _option(None, "positions per sequence")
    batch_tokens: int | None = _option(None, "tokens per micro-batch, with padding")
    accumulate: int = _option(1, "micro-batches per step")
    packed: bool = _option(False, "pack sequences end to end, without padding")
    pairs: bool = _option(True, "segment pairs as in the paper; otherwise one segment per sequence")

    steps: int | None = _option(None, "total number of updates; the learning rate falls to 0 at the end")
    lr: float | None = _option(None, "peak of the learning rate")
    warmup: int | None = _option(
        None, "steps in which the rate rises; default: 10000, but at most a tenth of --steps"
    )
    weight_decay: float = _option(0.01, "weight decay of matrices and embeddings")
    beta2: float | None = _option(None, "decay of Adam's second moment")
    bias_correction: bool = _option(False, "Adam's bias correction, which the paper does not use")
    clip: float = _option(1.0, "largest global norm of the gradient")
    precision: str | None = _option(None, "bf16 (autocast) or float32; default: bf16 on a GPU")
    seed: int = _option(0, "seed of weights, batches, masks, samples and dropout")

    save_every: int = _option(1000, "steps between checkpoints")
    eval_every: int = _option(1000, "steps between evaluations; the last one is at the end")
    eval_batches: int = _option(20, "batches of held-out text per evaluation")
    log_every: int = _option(10, "steps per line of log.jsonl")
    keep: int = _option(3, "number of checkpoints to keep")

    def __post_init__(self) -> None:
        for name in ("data", "held_out", "init"):  # absolute: a run may be resumed in another folder
            if (given := getattr(self, name)) is not None:
                self._require(name, not isinstance(given, str), "be a tuple of files or folders")
                self._require(
                    name, "" not in given, "name files or folders"
                )  # Path("") is the current folder
                object.__setattr__(self, name, tuple(str(Path(path).resolve()) for path in given))

        self._require("vocab", self.vocab != "", "be a file, a folder or a size")

    def resolved(self) -> Self:
        """Return the complete recipe, with the preset's values for the options that were not given.

        Raises:
            ValueError: an option is wrong; the message names it.
        """
        defaults = {f.name: f.metadata["default"] for f in dataclasses.fields(self)}
        recipe = dataclasses.replace(self, **(defaults | self.given()))
        recipe._require("preset", recipe.preset in PAPER, f"be one of {', '.join(PAPER)}")
        values = defaults | COMMON | PAPER[recipe.preset] | self.given()
        recipe = dataclasses.replace(recipe, **values)
        if self.init and self.vocab is None:  # the vocabulary of the folders of --init
            recipe = dataclasses.replace(recipe, vocab=None)
        if recipe.warmup is None:
            recipe = dataclasses.replace(recipe, warmup=min(10_000, recipe.steps // 10))
        positive = ("steps", "accumulate", "save_every", "eval_every", "eval_batches", "log_every", "keep")
        for name in ("seq", "batch_tokens", *positive):
            recipe._require(name, getattr(recipe, name) >= 1, "be 1 or more")
        recipe._require("log_every", recipe.log_every <= MOST_LOGGED, f"be {MOST_LOGGED} or less")
        if recipe.max_word_chars is not None:
            recipe._require("max_word_chars", recipe.max_word_chars >= 1, "be 1 or more")
        if recipe.vocab is not None and recipe.vocab.isdecimal():
            fits = len(recipe.vocab) < 10 and 5 <= int(recipe.vocab) <= MOST_PIECES
            recipe._require("vocab", fits, f"be in [5, {MOST_PIECES}] if it is a size")
        for name in ("lr", "clip"):
            recipe._require(name, 0 < getattr(recipe, name) < float("inf"), "be positive and finite")
        recipe._require("warmup", 0 <= recipe.warmup <= recipe.steps, f"be in [0, {recipe.steps}], the steps")
        recipe._require("weight_decay", 0 <= recipe.weight_decay < 1, "be in [0, 1)")
        recipe._require("beta2", 0 < recipe.beta2 < 1, "be in (0, 1)")
        recipe._require("seed", 0 <= recipe.seed < 2**62, "be in [0, 2^62)")
        recipe._require("precision", recipe.precision in (None, "bf16", "float32"), "be bf16 or float32")
        least = 5 if recipe.pairs else 3
        recipe._require("seq", recipe.seq >= least, f"be {least} or more, with the special tokens")
        least = recipe.seq * (2 if recipe.packed else 1)
        recipe._require(
            "batch_tokens", recipe.batch_tokens >= least, f"be {least} or more for seq {recipe.seq}"
        )
        micro = recipe.steps * recipe.accumulate
        recipe._require("steps", micro < 2**32, "give less than 2^32 micro-batches")
        recipe.model(recipe.seq + 1000, {})  # to find a wrong --set before the data is read
        return recipe

    def model(self, vocab_size: int, special_ids: dict[str, int]) -> ElectraConfig:
        """Return the config of the model for a vocabulary."""
        preset = getattr(ElectraConfig, self.preset)()
        names = {"[PAD]": "pad_id", "[CLS]": "cls_id", "[SEP]": "sep_id", "[MASK]": "mask_id"}
        ours = {"vocab_size", *names.values()}  # determined by the vocabulary
        types = {
            f.name: type(getattr(preset, f.name)) for f in dataclasses.fields(preset) if f.name not in ours
        }
        changes: dict[str, Any] = {}
        for assignment in self.set:
            name, _, value = assignment.partition("=")
            self._require("set", name not in changes, f"give {name} once", value=self.set)
            self._require(
                "set", name in types, f"be FIELD=VALUE with one of {', '.join(types)}", value=assignment
            )
            try:
                changes[name] = (
                    {"True": True, "False": False}[value] if types[name] is bool else types[name](value)
                )
            except (KeyError, ValueError):
                self._require("set", False, f"have a value of type {types[name].__name__}", value=assignment)
        changes |= {names[piece]: i for piece, i in special_ids.items() if piece in names}
        config = dataclasses.replace(preset, vocab_size=vocab_size, **changes)
        for name in ("layers", "generator_layers"):  # building a million layers would take hours
            found = f"{name}={getattr(config, name)}"
            self._require(
                "set",
                getattr(config, name) <= MOST_LAYERS,
                f"have {name} of {MOST_LAYERS} or less",
                value=found,
            )
        rule = f"be at most max_positions ({config.max_positions})"
        remedy = f"or add --set max_positions={self.seq}"
        self._require("seq", self.seq <= config.max_positions, rule, remedy)
        return config

    def normalization(self) -> dict[str, Any]:
        """Return the arguments for `load_tokenizer` and `train_tokenizer`."""
        given = {name: getattr(self, name) for name in NORMALIZATION}
        return {name: value for name, value in given.items() if value is not None}

    def save(self, file: Path) -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        part.replace(file)  # atomic: a kill leaves the old file or the new one

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: it is not a regular file, or a field is unknown or of another type.
        """
        fields = local.json_object("pretrain", file)
        unknown = fields.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            rule = "have the fields of a recipe"
            raise ValueError(must(f"pretrain: {file}", rule, ", ".join(sorted(unknown))))
        hints = typing.get_type_hints(cls)
        for name, value in fields.items():
            if value is not None and not _is(value, hints[name]):
                type_ = getattr(hints[name], "__name__", hints[name])
                raise ValueError(must(f"pretrain: {name} in {file}", f"be of type {type_}", repr(value)))
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})

    def given(self) -> dict[str, Any]:
        """Return the options that were given."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    def changed(self, **given: Any) -> Self:
        """Return the recipe of a resumed run, with the changes `given`.

        Raises:
            ValueError: an option must not change in a resumed run; the message names it.
        """
        started = self.resolved()
        for name, value in given.items():
            old = getattr(started, name)
            same = old == value or (name == "precision" and old is None)  # recipes of older versions lack it
            rule = f"stay {'unchanged' if old is None else repr(old)} in a resumed run"
            remedy = "start another run with --init and the folder of this one"
            self._require(name, name in CHANGEABLE or same, rule, remedy, value)
        return dataclasses.replace(self, **given).resolved()

    def _require(self, name: str, satisfied: bool, rule: str, remedy: str = "", value: Any = None) -> None:
        if not satisfied:
            got = getattr(self, name) if value is None else value
            raise ValueError(must(f"pretrain: --{name.replace('_', '-')}", rule, repr(got), remedy))


def _is(value: Any, hint: Any) -> bool:
    """Return whether a JSON value has the type of a field."""
    if hint == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds += (int,) if float in kinds else ()
    return isinstance(value, kinds) and (isinstance(value, bool) == (bool in kinds))


def add_options(parser) -> None:
    """Add one option per field; the namespace has only the options that are given."""
    import argparse

    hints = typing.get_type_hints(Recipe)
    for f in dataclasses.fields(Recipe):
        options: dict[str, Any] = {"help": f.metadata["help"], "default": argparse.SUPPRESS, "dest": f.name}
        if off := f.metadata["off"]:
            options["action"] = "store_true"
            opposite = {"action": "store_false", "default": argparse.SUPPRESS, "dest": f.name}
            either = parser.add_mutually_exclusive_group()
            either.add_argument(off[0], **opposite, help=off[1])
        elif hints[f.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif hints[f.name] == tuple[str, ...]:
            options |= {"nargs": "+", "action": "extend"}  # `--set a=1 --set b=2` is `--set a=1 b=2`
            options["metavar"] = "FIELD=VALUE" if f.name == "set" else "PATH"
        else:
            kinds = (int, float, str)
            options |= {
                "type": next(t for t in kinds if t in (hints[f.name], *typing.get_args(hints[f.name])))
            }
        (either if off else parser).add_argument(f"--{f.name.replace('_', '-')}", **options)
