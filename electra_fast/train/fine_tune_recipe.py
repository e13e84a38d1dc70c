"""The options of a fine-tuning run: on the command line, and in the file recipe.json of its folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from electra_fast.config import ElectraConfig
from electra_fast.distributed import divisors, one_of
from electra_fast.errors import must
from electra_fast.tasks import TASKS
from electra_fast.tasks.glue import GLUE
from electra_fast.train.options import Options, option
from electra_fast.train.recipe import MOST_LOGGED, PAPER, require_vocab

# The paper's rate and layer-wise decay by the width of the model (Clark et al. 2020, table 7). tiny is not in
# the paper. It is pre-trained for minutes only, so all its layers have much to learn.
BY_WIDTH = {
    128: {"lr": 5e-4, "layer_decay": 1.0, "epochs": 8.0},
    256: {"lr": 3e-4, "layer_decay": 0.8},
    768: {"lr": 1e-4, "layer_decay": 0.8},
    1024: {"lr": 5e-5, "layer_decay": 0.9},
}
GLUE_EPOCHS = {"RTE": 10.0, "STS-B": 10.0}  # the paper's, for small data; its other tasks have 3
# For a model without pre-training.
FROM_SCRATCH = {"lr": 3e-4, "layer_decay": 1.0, "epochs": 20.0}
# The options of `evaluate` too.
FILE_OPTIONS = ("glue", "text", "pair", "label", "columns", "separator", "repair", "max_len", "stride")
FILE_OPTIONS += ("max_query", "max_answer", "source", "target", "max_target", "beams", "precision")
# The options that a resumed run may change.
CHANGEABLE = frozenset({"save_every", "eval_every", "log_every", "keep", "seeds"})


@dataclass(frozen=True)
class FineTuneRecipe(Options):
    """All options of a run, None if not given; `resolved` and `for_model` set the defaults."""

    command: ClassVar[str] = "finetune"
    changeable: ClassVar[frozenset[str]] = CHANGEABLE

    task: str = option(None, None)
    model: str | None = option(None, "a run's discriminator/, or a Hugging Face folder of an ELECTRA")
    preset: str | None = option(
        None, f"instead of --model, a new model without pre-training: {', '.join(PAPER)}"
    )
    vocab: str | None = option(
        None, "with --preset: vocab.txt, tokenizer.json, a folder, or a size to train it on --train"
    )
    set: tuple[str, ...] = option((), "fields of ElectraConfig to change: dropout=0")
    init_head: str | None = option(
        None, "copy the head of this fine-tuned folder, with the rows of the labels that both have"
    )

    train: tuple[str, ...] = option(
        (), "files to train on: CSV, TSV, JSON, Parquet, CoNLL, SQuAD, …; also packed"
    )
    dev: tuple[str, ...] = option((), "files to evaluate on, during training and to compare seeds")
    test: tuple[str, ...] = option((), "files on which the best seed is evaluated at the end")
    glue: str | None = option(
        None,
        f"--train, or --data of evaluate, is the folder with the folder of a GLUE task: {', '.join(GLUE)}",
    )
    text: str | None = option(None, "column of the text; default: text, sentence, utterance, query, question")
    pair: str | None = option(None, "column of the second text of a pair")
    label: str | None = option(
        None, "column of the label; default: label, category, intent, labels, emotion; regress: score, label"
    )
    columns: tuple[str, ...] = option((), "names of the columns of tables without a header")
    separator: str | None = option(None, "several labels per text, separated by this in the column: ','")
    source: str | None = option(
        None, "write: column of the text to read; default: source, document, article, text"
    )
    target: str | None = option(
        None, "write: column of the text to write; default: target, summary, title, headline"
    )
    repair: bool = option(False, "tag, intent: read IOB1 too, whose entities may begin with I-")

    max_len: int | None = option(None, "longest sequence in tokens; default: 128, answer: 512")
    stride: int = option(128, "answer: tokens between the starts of two windows of a long context")
    max_query: int = option(64, "answer: tokens of a question")
    max_answer: int = option(30, "answer: tokens of an answer")
    max_target: int | None = option(None, "write: longest target in tokens; default: 64")
    beams: int = option(1, "write: hypotheses of the beam search that evaluates; 1: greedy")

    epochs: float | None = option(None, "passes over --train; default: by task, as in the paper")
    steps: int | None = option(None, "total number of updates; default: given by --epochs")
    batch: int = option(32, "texts per micro-batch on average, in packed batches of equal numbers of tokens")
    accumulate: int = option(1, "micro-batches per step; the number of processes must divide it")
    lr: float | None = option(None, "peak of the learning rate; default: by the width of the model")
    layer_decay: float | None = option(
        None, "factor of the rate per layer below the head; default: 0.8, large: 0.9, --preset: 1"
    )
    warmup: int | None = option(None, "steps in which the rate rises; default: a tenth of the steps")
    weight_decay: float = option(0.01, "weight decay of matrices and embeddings")
    beta2: float = option(0.999, "decay of Adam's second moment")
    bias_correction: bool = option(False, "Adam's bias correction, which the paper does not use")
    clip: float = option(1.0, "largest global norm of the gradient")
    precision: str | None = option(None, "bf16 (autocast) or float32; default: bf16 on a GPU")
    seed: int = option(0, "seed of the head, the batches and dropout; the first of several")
    seeds: int = option(1, "number of runs with consecutive seeds; the best one on --dev is kept")

    save_every: int = option(500, "steps between checkpoints")
    eval_every: int | None = option(None, "steps between evaluations; default: an epoch")
    log_every: int = option(10, "steps per line of log.jsonl")
    keep: int = option(1, "number of checkpoints to keep")

    def __post_init__(self) -> None:
        for name in ("train", "dev", "test"):  # absolute: a run may be resumed in another folder
            if (given := getattr(self, name)) is not None:
                self.require(name, not isinstance(given, str), "be a tuple of files")
                self.require(name, "" not in given, "name files")  # Path("") is the current folder
                object.__setattr__(self, name, tuple(str(Path(path).resolve()) for path in given))
        for name in ("model", "init_head"):
            if (given := getattr(self, name)) is not None:
                self.require(name, given != "", "be a folder")
                folder = Path(given).resolve()
                half = folder / "discriminator"  # of a run of pre-training
                object.__setattr__(self, name, str(half if half.exists() else folder))

    def resolved(self, processes: int = 1) -> Self:
        """Return the recipe with the defaults that do not depend on the model and the data.

        If neither --batch nor --accumulate is given, the `processes` divide the default batch.

        Raises:
            ValueError: an option is wrong; the message names it.
        """
        defaults = {f.name: f.metadata["default"] for f in dataclasses.fields(self)}
        recipe = dataclasses.replace(self, **(defaults | self.given()))
        if processes > 1 and self.batch is None and self.accumulate is None:
            recipe = recipe._divided(processes)
        require = recipe.require
        if recipe.task not in TASKS:
            raise ValueError(must("finetune: the task", f"be one of {', '.join(TASKS)}", repr(recipe.task)))
        for name in ("text", "pair", "label", "separator", "source", "target", "vocab"):
            require(name, getattr(recipe, name) != "", "not be empty")
        require("columns", len(set(recipe.columns)) == len(recipe.columns), "name each column once")
        if recipe.model is None:
            require("model", recipe.preset is not None, "be given, or --preset")
            require("preset", recipe.preset in PAPER, f"be one of {', '.join(PAPER)}")
            vocab = recipe.vocab or PAPER[recipe.preset].get("vocab", "30522")
            recipe = dataclasses.replace(recipe, vocab=vocab)
            require_vocab(recipe)
        else:
            require("preset", recipe.preset is None, "be left out with --model")
            require("vocab", recipe.vocab is None, "be left out with --model, which has one")
        require("glue", recipe.glue is None or recipe.glue in GLUE, f"be one of {', '.join(GLUE)}")
        require("train", bool(recipe.train), "name files")
        if recipe.glue:
            require(
                "task",
                recipe.task == GLUE[recipe.glue].kind,
                f"be {GLUE[recipe.glue].kind} for {recipe.glue}",
            )
            recipe = dataclasses.replace(recipe, dev=recipe.dev or recipe.train)
        require("dev", bool(recipe.dev), "name files")
        positive = ("batch", "accumulate", "seeds", "save_every", "log_every", "keep", "stride", "max_query")
        for name in (*positive, "max_answer", "beams", "steps", "eval_every"):
            value = getattr(recipe, name)
            recipe.require(name, value is None or value >= 1, "be 1 or more")
        require("log_every", recipe.log_every <= MOST_LOGGED, f"be {MOST_LOGGED} or less")
        require("max_len", recipe.max_len is None or recipe.max_len >= 8, "be 8 or more")
        require("max_target", recipe.max_target is None or recipe.max_target >= 3, "be 3 or more")
        if recipe.task == "write":
            require("init_head", recipe.init_head is None, "be left out for write")
        for name in ("lr", "clip", "epochs", "layer_decay"):
            value = getattr(recipe, name)
            recipe.require(name, value is None or 0 < value < float("inf"), "be positive and finite")
        require("layer_decay", recipe.layer_decay is None or recipe.layer_decay <= 1, "be at most 1")
        require("weight_decay", 0 <= recipe.weight_decay < 1, "be in [0, 1)")
        require("beta2", 0 < recipe.beta2 < 1, "be in (0, 1)")
        require("seed", 0 <= recipe.seed < 2**62, "be in [0, 2^62)")
        require("precision", recipe.precision in (None, "bf16", "float32"), "be bf16 or float32")
        return recipe

    def _divided(self, processes: int) -> Self:
        """Return the recipe with a micro-batch per process, and the same number of texts in a step."""
        if self.batch % processes:
            rule, texts = f"divide the {self.batch} texts of a step", divisors(self.batch)
            remedy = f"start {one_of(texts)}, or give --batch and --accumulate"
            raise ValueError(must("finetune: the number of processes", rule, processes, remedy))
        return dataclasses.replace(self, batch=self.batch // processes, accumulate=processes)

    def all_seeds(self) -> range:
        """Return the seeds of the runs."""
        return range(self.seed, self.seed + self.seeds)

    def for_model(self, config: ElectraConfig, steps_per_epoch: float) -> Self:
        """Return the complete recipe for a model and the number of batches per epoch.

        Raises:
            ValueError: an option does not fit the model.
        """
        width = min((w for w in BY_WIDTH if w >= config.hidden), default=1024)
        task = TASKS[self.task]
        defaults = {"epochs": GLUE_EPOCHS.get(self.glue, float(task.epochs))} | BY_WIDTH[width]
        if task.layer_decay is not None:
            defaults["layer_decay"] = task.layer_decay
        if self.model is None:
            defaults |= FROM_SCRATCH
        recipe = dataclasses.replace(self, **(defaults | self.given()))
        steps_per_epoch /= recipe.accumulate
        steps = recipe.steps or max(1, round(recipe.epochs * steps_per_epoch))
        recipe = dataclasses.replace(
            recipe,
            steps=steps,
            warmup=steps // 10 if recipe.warmup is None else recipe.warmup,
            eval_every=recipe.eval_every or max(1, round(steps_per_epoch)),
        )
        recipe.require("warmup", 0 <= recipe.warmup <= steps, f"be in [0, {steps}], the steps")
        recipe.require("steps", steps * recipe.accumulate < 2**32, "give less than 2^32 micro-batches")
        return recipe
