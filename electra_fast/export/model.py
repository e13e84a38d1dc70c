"""What is exported: a discriminator with its head, as a model of transformers and as one of this package."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from electra_fast import __version__, data, local
from electra_fast.errors import must
from electra_fast.heads import (
    IntentClassifier,
    MultipleChoice,
    QuestionAnswerer,
    SequenceClassifier,
    TaskHead,
    TokenClassifier,
)
from electra_fast.model import Discriminator
from electra_fast.modules import Layout
from electra_fast.pretrained import PretrainedHalf
from electra_fast.tasks import TASKS
from electra_fast.tasks.task import Task
from electra_fast.train.fine_tuned import recipe_of
from electra_fast.train.run_folder import RECIPE, WITHOUT_MODEL, find_recipe
from electra_fast.train.task_data import set_max_len

MODEL = "export: --model"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # each int64 [B, L]
HEADS: dict[str, type[PretrainedHalf]] = {
    kind.hugging_face_class: kind
    for kind in (SequenceClassifier, TokenClassifier, QuestionAnswerer, MultipleChoice, Discriminator)
}
TASK_OF_HEAD = {TokenClassifier: "tag", QuestionAnswerer: "answer", MultipleChoice: "choose"}
TASK_OF_HEAD |= {IntentClassifier: "intent"}


class EncoderOnly(nn.Module):
    """A model of this package without its head, with the arguments of the model."""

    def __init__(self, half: PretrainedHalf):
        super().__init__()
        self.encoder, self.config = half.encoder, half.config

    def forward(self, ids: Tensor, *, type_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Return the encoder's output for a packed batch, ``[T, W]``."""
        return self.encoder(ids, Layout(None, cu_seqlens, max_seqlen), type_ids=type_ids)


class Output(NamedTuple):
    """An output of the exported model."""

    name: str
    per_token: bool  # [B, L] or [B, L, C] instead of [B, C]


OUTPUTS: dict[type[nn.Module], tuple[Output, ...]] = {
    SequenceClassifier: (Output("logits", False),),
    TokenClassifier: (Output("logits", True),),
    QuestionAnswerer: (Output("start_logits", True), Output("end_logits", True)),
    MultipleChoice: (Output("logits", False),),
    IntentClassifier: (Output("logits", False), Output("slot_logits", True)),
    Discriminator: (Output("logits", True),),
    EncoderOnly: (Output("last_hidden_state", True),),
}


class Source(NamedTuple):
    """A folder with a model to export."""

    folder: Path
    described: dict[str, Any]  # config.json
    head: PretrainedHalf | EncoderOnly  # the model of this package, float32, in eval mode
    tokenizer: Any  # tokenizers.Tokenizer
    task: Task | None  # None: a model of pre-training
    dev: tuple[str, ...]  # the files on which the run of the folder was evaluated

    @property
    def outputs(self) -> tuple[Output, ...]:
        return OUTPUTS[type(self.head)]

    @property
    def pad_id(self) -> int:
        return self.head.config.pad_id

    def metadata(self) -> dict[str, str]:
        """Return what a user of the exported file must know; lists are JSON."""
        head, known = self.head, {"architecture": self.described["architectures"][0]}
        known |= {"task": self.task.name if self.task else "detect"}
        if isinstance(head, TaskHead):
            known |= {"labels": json.dumps(head.labels, ensure_ascii=False)}
            known |= {"problem_type": head.problem} if head.problem else {}
        if isinstance(head, IntentClassifier):
            known |= {"slot_labels": json.dumps(head.slot_labels, ensure_ascii=False)}
        return known | {"max_length": str(head.config.max_positions), "electra_fast": __version__}


def read_source(model: str | Path, options: dict[str, Any]) -> Source:
    """Read a fine-tuned folder, a run of pre-training or a folder of transformers.

    Args:
        model: the folder.
        options: fields of `FineTuneRecipe` about files and lengths; the others are those of the folder's run.

    Raises:
        ValueError, OSError: it has no discriminator with a head, no tokenizer, or wrong weights; or `model`
            is a module instead of a folder.
    """
    if isinstance(model, nn.Module):
        raise ValueError(must(MODEL, "be a folder", f"a {type(model).__name__}", remedy_for(model)))
    folder = local.existing(MODEL, model)
    half = folder / "discriminator"  # of a run of pre-training
    folder = half if half.is_dir() else folder
    if (folder / "adapter_config.json").exists():
        remedy = "merge it first: model.merge_and_unload().save_pretrained(folder)"
        raise ValueError(must(f"{MODEL} {folder}", "be a whole model", "an adapter of PEFT", remedy))
    if not (folder / "config.json").exists() and find_recipe(folder) is not None:
        raise ValueError(must(f"{MODEL} {folder}", "have a model", "a run without one", WITHOUT_MODEL))
    described = local.json_object(MODEL, folder / "config.json")
    kind = head_class(folder, described)
    tokenizer = data.load_tokenizer(folder, special_ids=None)
    try:
        head = kind.from_pretrained(folder).float()
    except RuntimeError as error:  # tensors are missing, unknown or of another shape
        raise ValueError(str(error)) from None
    data.require_rows(f"{MODEL} {folder}", tokenizer, head.config.vocab_size)
    if kind is Discriminator:
        return Source(folder, described, head, tokenizer, None, ())
    recipe = recipe_of(folder, likely_task(described, kind), options)
    task = TASKS[recipe.task](recipe)
    if kind is not task.head_class:
        rule = f"have the head of {task.name}, the task in its {RECIPE}"
        raise ValueError(must(f"{MODEL} {folder}", rule, kind.__name__))
    task.use(described)
    set_max_len(task, recipe, head.config)
    dev = recipe.dev if (folder / RECIPE).exists() else ()
    return Source(folder, described, head, tokenizer, task, dev)


def remedy_for(model: nn.Module) -> str:
    """Return how to make a folder of a model in memory."""
    save = "save_pretrained(folder)"
    if any("electra_fast.hf." in kind.__module__ for m in model.modules() for kind in type(m).__mro__):
        return f"undo() the patch, then {save} and export the folder"
    if hasattr(model, "peft_config"):
        return f"merge the adapter first: model.merge_and_unload().{save}"
    return f"{save} first"


def head_class(folder: Path, described: dict[str, Any]) -> type[PretrainedHalf]:
    """Return the class of this package for a config.json.

    Raises:
        ValueError: it is not an ELECTRA, is a generator, has no head, or has a field of another type.
    """
    subject = f"{MODEL} {folder}"
    if (kind := described.get("model_type")) != "electra":
        raise ValueError(must(subject, "be an ELECTRA", f"model_type {kind!r} in config.json"))
    for field, type_ in (("problem_type", str), ("slot_labels", list)):
        if not isinstance(value := described.get(field), type_ | None):
            raise ValueError(must(f"{subject}: {field}", f"be of type {type_.__name__}", repr(value)))
    named = described.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else None
    if name == "ElectraForMaskedLM":
        remedy = "the discriminator is what pre-training makes for use"
        raise ValueError(must(subject, "be a discriminator", "a generator (ElectraForMaskedLM)", remedy))
    if name not in HEADS:
        rule = f"name one of {', '.join(HEADS)} as architectures in config.json"
        raise ValueError(must(subject, rule, repr(name)))
    if name == IntentClassifier.hugging_face_class and "slot_labels" in described:
        return IntentClassifier
    return HEADS[name]


def likely_task(described: dict[str, Any], kind: type[PretrainedHalf]) -> str:
    """Return the task of a model of transformers, which has no recipe."""
    score = len(described.get("id2label") or "01") == 1
    return TASK_OF_HEAD.get(kind, "regress" if score else "classify")


class Exported(nn.Module):
    """A model of transformers with three tensors as its arguments and a tuple of tensors as its result.

    `ElectraForMultipleChoice` gets one row per pair of prompt and option, and gives one score per row.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.one_option = type(model).__name__ == MultipleChoice.hugging_face_class

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        given = (input_ids, attention_mask, token_type_ids)
        given = [x[:, None] for x in given] if self.one_option else given
        return self.model(**dict(zip(INPUTS, given, strict=True)), return_dict=True).to_tuple()


class ExportedIntent(nn.Module):
    """The two halves of an `IntentClassifier` over one encoder: the scores of intents and of slots."""

    def __init__(self, intents: nn.Module, slots: nn.Module):
        super().__init__()
        self.electra, self.classifier, self.slots = intents.electra, intents.classifier, slots.classifier

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, ...]:
        given = dict(zip(INPUTS, (input_ids, attention_mask, token_type_ids), strict=True))
        x = self.electra(**given).last_hidden_state
        return self.classifier(x), self.slots(x)


def to_export(source: Source) -> nn.Module:
    """Return the model of transformers that is exported: `Exported` or `ExportedIntent`, in eval mode."""
    model = load(source.described["architectures"][0], source.folder)
    if isinstance(source.head, IntentClassifier):
        folder = local.existing(MODEL, source.folder / "slots", hub=False)
        slots = load(TokenClassifier.hugging_face_class, folder)
        return ExportedIntent(model, slots).eval()
    return Exported(model).eval()


def load(name: str, folder: Path, **options: Any) -> nn.Module:
    """Return a model of transformers, float32, without its messages; the self-check compares its results."""
    transformers = package("transformers")
    verbosity = transformers.logging.get_verbosity()
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **options)
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bar:
            transformers.utils.logging.enable_progress_bar()


def package(name: str) -> Any:
    """Import an optional package.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"export needs a package: pip install electra_fast[export] ({error})") from None
