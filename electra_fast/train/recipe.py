"""The options of a pre-training run: on the command line, and in the file recipe.json of its folder."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from electra_fast.config import ElectraConfig
from electra_fast.data import is_tokens_folder
from electra_fast.distributed import divisors, one_of
from electra_fast.errors import must
from electra_fast.train.options import Options, option

# The values of the paper (Clark et al. 2020, appendix A). tiny is for minutes on a CPU. The norm of its
# gradient falls from 40 to 1 in 200 steps; with beta2 = 0.999 Adam needs 1000 steps to forget the first,
# clipped ones. With the paper's initial attention, dropout, weight and sequences of 128 it would need many
# times as many tokens to read its context (docs/pretraining.md).
TINY = ("initial_attention=local", "dropout=0", "rtd_weight=10")
PAPER = {
    "tiny": {
        "seq": 32,
        "batch_tokens": 1024,
        "steps": 4000,
        "lr": 1e-3,
        "beta2": 0.98,
        "vocab": "4096",
        "set": TINY,
    },
    "small": {"seq": 128, "batch_tokens": 128 * 128, "steps": 1_000_000, "lr": 5e-4},
    "base": {"seq": 512, "batch_tokens": 256 * 512, "steps": 766_000, "lr": 2e-4},
    "large": {"seq": 512, "batch_tokens": 2048 * 512, "steps": 400_000, "lr": 2e-4},
}
COMMON = {"vocab": "30522", "beta2": 0.999}
# The options that a resumed run may change. The text may be at another path: its hash must be the same.
CHANGEABLE = frozenset({"steps", "lr", "clip", "data", "held_out", "save_every", "eval_every", "log_every"})
CHANGEABLE |= {"keep", "text_column", "allow_unknown"}
NORMALIZATION = ("lowercase", "strip_accents", "max_word_chars")  # arguments of `load_tokenizer`
# The options of `tokenize` too: those that determine the tokens.
TOKENIZE_OPTIONS = ("data", "text_column", "blanks_separate", "vocab", *NORMALIZATION, "allow_unknown")
MOST_PIECES = 2**20  # of a trained vocabulary: without memory the trainer would end the process
MOST_LAYERS = 1000
MOST_LOGGED = 100_000  # steps per line of the log, each of which needs a row on the device


@dataclass(frozen=True)
class Recipe(Options):
    """All options of a run. An option that is not given is None until `resolved` sets its default.

    So a given value can be distinguished from a default, even if both are equal.
    """

    command: ClassVar[str] = "pretrain"
    changeable: ClassVar[frozenset[str]] = CHANGEABLE
    another: ClassVar[str] = "start another run with --init and the folder of this one"

    preset: str = option("small", f"sizes of the model: {', '.join(PAPER)}")
    set: tuple[str, ...] = option((), "fields of ElectraConfig to change in the preset: dropout=0")
    init: tuple[str, ...] = option((), "initial weights: Hugging Face folders, or the folder of another run")

    data: tuple[str, ...] = option(
        (),
        "files and folders: text (a blank line ends a document), JSON, CSV, TSV, Parquet, Arrow, folders of "
        "datasets' save_to_disk; also compressed (gz, xz, bz2, zst, tar); for pretrain also a folder that "
        "`tokenize` made; default: the manual of Python",
    )
    text_column: str | None = option(
        None, "name of the text in JSON and tables; default: text, or the only column of strings"
    )
    blanks_separate: bool = option(
        True, "blank lines end a document of plain text; otherwise only the end of its file does"
    )
    held_out: tuple[str, ...] = option((), "text to evaluate on; default: every 20th document of the data")
    vocab: str | None = option(
        None, "vocab.txt, tokenizer.json or a Hugging Face folder; or a size, to train it on the data"
    )
    lowercase: bool | None = option(
        None,
        "lower-case the text; default: the setting in the vocabulary's folder, else yes",
        off=("--cased", "keep the case of the text"),
    )
    strip_accents: bool | None = option(
        None,
        "strip accents and decompose Korean; default: as --lowercase",
        off=("--keep-accents", "keep accents and Korean syllables"),
    )
    max_word_chars: int | None = option(None, "a longer word is [UNK]; default: 100, as in BERT")
    allow_unknown: bool = option(False, "continue even if more than 5 percent of the text is [UNK]")

    seq: int | None = option(None, "positions per sequence")
    batch_tokens: int | None = option(
        None, "tokens per micro-batch, with padding; default: the preset's, which several processes divide"
    )
    accumulate: int = option(1, "micro-batches per step; the number of processes must divide it")
    packed: bool = option(False, "pack sequences end to end, without padding")
    pairs: bool = option(True, "segment pairs as in the paper; otherwise one segment per sequence")

    steps: int | None = option(None, "total number of updates; the learning rate falls to 0 at the end")
    lr: float | None = option(None, "peak of the learning rate")
    warmup: int | None = option(
        None, "steps in which the rate rises; default: 10000, but at most a tenth of --steps"
    )
    weight_decay: float = option(0.01, "weight decay of matrices and embeddings")
    beta2: float | None = option(None, "decay of Adam's second moment")
    bias_correction: bool = option(False, "Adam's bias correction, which the paper does not use")
    clip: float = option(1.0, "largest global norm of the gradient")
    precision: str | None = option(None, "bf16 (autocast) or float32; default: bf16 on a GPU")
    seed: int = option(0, "seed of weights, batches, masks, samples and dropout")

    save_every: int = option(1000, "steps between checkpoints")
    eval_every: int = option(1000, "steps between evaluations; the last one is at the end")
    eval_batches: int = option(20, "batches of held-out text per evaluation")
    log_every: int = option(10, "steps per line of log.jsonl")
    keep: int = option(3, "number of checkpoints to keep")

    def __post_init__(self) -> None:
        for name in ("data", "held_out", "init"):  # absolute: a run may be resumed in another folder
            if (given := getattr(self, name)) is not None:
                self.require(name, not isinstance(given, str), "be a tuple of files or folders")
                self.require(name, "" not in given, "name files or folders")  # Path("") is the current folder
                object.__setattr__(self, name, tuple(str(Path(path).resolve()) for path in given))

        self.require("vocab", self.vocab != "", "be a file, a folder or a size")

    def resolved(self, processes: int = 1) -> Self:
        """Return the complete recipe, with the preset's values for the options that were not given.

        If neither --batch-tokens nor --accumulate is given, the preset's batch is divided among the
        `processes`, so a step has the same number of sequences.

        Raises:
            ValueError: an option is wrong; the message names it.
        """
        defaults = {f.name: f.metadata["default"] for f in dataclasses.fields(self)}
        recipe = dataclasses.replace(self, **(defaults | self.given()))
        recipe.require("preset", recipe.preset in PAPER, f"be one of {', '.join(PAPER)}")
        values = defaults | COMMON | PAPER[recipe.preset] | self.given()
        values["set"] = with_fields(values["set"], PAPER[recipe.preset].get("set", ()))
        recipe = dataclasses.replace(recipe, **values)
        if processes > 1 and self.batch_tokens is None and self.accumulate is None:
            recipe = recipe._divided(processes)
        if self.vocab is None and (self.init or any(map(is_tokens_folder, self.data or ()))):
            # The vocabulary is that of the folders of --init or of the tokens.
            recipe = dataclasses.replace(recipe, vocab=None)
        if recipe.warmup is None:
            recipe = dataclasses.replace(recipe, warmup=min(10_000, recipe.steps // 10))
        positive = ("steps", "accumulate", "save_every", "eval_every", "eval_batches", "log_every", "keep")
        for name in ("seq", "batch_tokens", *positive):
            recipe.require(name, getattr(recipe, name) >= 1, "be 1 or more")
        recipe.require("log_every", recipe.log_every <= MOST_LOGGED, f"be {MOST_LOGGED} or less")
        if recipe.max_word_chars is not None:
            recipe.require("max_word_chars", recipe.max_word_chars >= 1, "be 1 or more")
        require_vocab(recipe)
        for name in ("lr", "clip"):
            recipe.require(name, 0 < getattr(recipe, name) < float("inf"), "be positive and finite")
        recipe.require("warmup", 0 <= recipe.warmup <= recipe.steps, f"be in [0, {recipe.steps}], the steps")
        recipe.require("weight_decay", 0 <= recipe.weight_decay < 1, "be in [0, 1)")
        recipe.require("beta2", 0 < recipe.beta2 < 1, "be in (0, 1)")
        recipe.require("seed", 0 <= recipe.seed < 2**62, "be in [0, 2^62)")
        recipe.require("precision", recipe.precision in (None, "bf16", "float32"), "be bf16 or float32")
        least = 5 if recipe.pairs else 3
        recipe.require("seq", recipe.seq >= least, f"be {least} or more, with the special tokens")
        least = recipe.seq * (2 if recipe.packed else 1)
        recipe.require(
            "batch_tokens", recipe.batch_tokens >= least, f"be {least} or more for seq {recipe.seq}"
        )
        micro = recipe.steps * recipe.accumulate
        recipe.require("steps", micro < 2**32, "give less than 2^32 micro-batches")
        recipe.model(recipe.seq + 1000, {})  # to find a wrong --set before the data is read
        return recipe

    @classmethod
    def load(cls, file: Path) -> Self:
        """Read a file that `save` wrote; errors as in `Options`.

        A file of an earlier version does not have the fields of its preset: its model had those of the sizes.
        """
        recipe = super().load(file)
        if recipe.preset not in PAPER:
            return recipe  # `resolved` says so
        config, names = getattr(ElectraConfig, recipe.preset)(), PAPER[recipe.preset].get("set", ())
        before = (f"{name}={getattr(config, name)}" for name in map(field_of, names))
        return dataclasses.replace(recipe, set=with_fields(recipe.set or (), before))

    def changed(self, **given: Any) -> Self:
        if "set" in given:
            given["set"] = with_fields(given["set"], self.set or ())
        return super().changed(**given)

    def _divided(self, processes: int) -> Self:
        """Return the recipe with a micro-batch per process, and the same number of sequences in a step.

        Raises:
            ValueError: the processes cannot divide them; the message has the numbers that can.
        """
        sequences = self.batch_tokens // max(1, self.seq)
        least = 2 if self.packed else 1  # sequences of a micro-batch
        possible = [n for n in divisors(sequences) if sequences // n >= least]
        if possible and processes not in possible:
            rule = f"divide the {sequences} sequences of a step, {least} or more for each process"
            remedy = f"start {one_of(possible)}, or give --batch-tokens and --accumulate"
            raise ValueError(must("pretrain: the number of processes", rule, processes, remedy))
        tokens = sequences // processes * self.seq
        return dataclasses.replace(self, batch_tokens=tokens, accumulate=processes)

    def model(self, vocab_size: int, special_ids: dict[str, int]) -> ElectraConfig:
        """Return the config of the model for a vocabulary."""
        preset = getattr(ElectraConfig, self.preset)()
        names = {"[PAD]": "pad_id", "[CLS]": "cls_id", "[SEP]": "sep_id", "[MASK]": "mask_id"}
        ours = ("vocab_size", *names.values())  # determined by the vocabulary
        changes = self.assignments(preset, ours)
        changes |= {names[piece]: i for piece, i in special_ids.items() if piece in names}
        config = dataclasses.replace(preset, vocab_size=vocab_size, **changes)
        for name in ("layers", "generator_layers"):  # building a million layers would take hours
            found = f"{name}={getattr(config, name)}"
            self.require(
                "set",
                getattr(config, name) <= MOST_LAYERS,
                f"have {name} of {MOST_LAYERS} or less",
                value=found,
            )
        rule = f"be at most max_positions ({config.max_positions})"
        remedy = f"or add --set max_positions={self.seq}"
        self.require("seq", self.seq <= config.max_positions, rule, remedy)
        return config

    def normalization(self) -> dict[str, Any]:
        """Return the arguments for `load_tokenizer` and `train_tokenizer`."""
        given = {name: getattr(self, name) for name in NORMALIZATION}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class TokenizeRecipe(Recipe):
    """The options of `tokenize`, which are `TOKENIZE_OPTIONS`."""

    command: ClassVar[str] = "tokenize"


def field_of(assignment: str) -> str:
    return assignment.partition("=")[0]


def with_fields(given: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Return the assignments FIELD=VALUE that are given, and of others those of other fields, sorted."""
    given = tuple(given)
    names = set(map(field_of, given))
    return tuple(sorted((*given, *(other for other in others if field_of(other) not in names))))


def require_vocab(recipe: Options) -> None:
    """Raise a ValueError if `vocab` is a size for which no vocabulary can be trained."""
    if recipe.vocab is not None and recipe.vocab.isdecimal():
        fits = len(recipe.vocab) < 10 and 5 <= int(recipe.vocab) <= MOST_PIECES
        recipe.require("vocab", fits, f"be in [5, {MOST_PIECES}] if it is a size")
