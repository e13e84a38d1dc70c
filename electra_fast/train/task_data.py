"""The data of fine-tuning: the task with its labels, the tokenizer, the items, the sizes of the model."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_fast import data, local
from electra_fast.config import ElectraConfig
from electra_fast.errors import must
from electra_fast.pretrained import PretrainedHalf, read_folder
from electra_fast.tasks import TASKS
from electra_fast.tasks.examples import Examples
from electra_fast.tasks.glue import GLUE
from electra_fast.tasks.task import Task
from electra_fast.train.fine_tune_recipe import FineTuneRecipe

# Fields that --set cannot change: those that only pre-training reads, those of the vocabulary, and with
# --model the sizes of its weights.
OF_PRETRAINING = ("generator_layers", "generator_hidden", "generator_heads", "generator_ffn", "mask_prob")
OF_PRETRAINING += ("keep_prob", "temperature", "disallow_correct", "mlm_weight", "rtd_weight", "sharing")
FIXED_BY_VOCABULARY = (*OF_PRETRAINING, "vocab_size", "pad_id", "cls_id", "sep_id", "mask_id")
FIXED_BY_MODEL = (
    *FIXED_BY_VOCABULARY,
    "embedding",
    "layers",
    "hidden",
    "heads",
    "ffn",
    "max_positions",
    "type_vocab",
)


class Split(NamedTuple):
    """The items of --train, --dev or --test, and their sequences."""

    items: list[Any]
    examples: Examples


def set_max_len(task: Task, recipe: FineTuneRecipe, config: ElectraConfig) -> None:
    """Set the lengths at which a task cuts off sequences.

    Raises:
        ValueError: --max-len or --max-target is longer than the model.
    """
    longest = config.max_positions
    for name in ("max_len", "max_target"):
        given = getattr(recipe, name)
        recipe.require(name, given is None or given <= longest, f"be at most {longest}, for this model")
        setattr(task, name, given or min(getattr(task, name), longest))


class TaskData:
    """All data of a run; the seeds of the run share it.

    `splits` has "train", "dev", with --test "test", and for MNLI "dev_mm", the mismatched one. `hashes` has a
    hash of the labels, the sequences and the targets of "train" and "dev".

    Args:
        recipe: the result of `FineTuneRecipe.resolved`.

    Raises:
        ValueError, OSError: a file cannot be used, --dev has a label that --train does not have, or a split
            is empty; the message names the file and the line.
    """

    def __init__(self, recipe: FineTuneRecipe):
        self.recipe, self.task = recipe, TASKS[recipe.task](recipe)
        items = {role: self._read(role) for role in ("train", "dev", "test") if getattr(recipe, role)}
        if recipe.glue and "dev_mm" in GLUE[recipe.glue].files:
            items["dev_mm"] = self.task.read(recipe.dev, "dev_mm")
        for role in ("train", "dev"):
            if error := self.task.unlabelled(items[role]):
                raise ValueError(error)
        self.task.learn(items["train"])
        for split in items.values():
            self.task.check(split)
        self.tokenizer = self._tokenizer(items["train"])
        self.config = self._config()
        set_max_len(self.task, recipe, self.config)
        self.splits = {role: Split(i, self.task.examples(i, self.tokenizer)) for role, i in items.items()}
        self.hashes = {role: self._hash(self.splits[role].examples) for role in ("train", "dev")}

    def head(self, seed: int) -> PretrainedHalf:
        """Return the model with which the run of a seed begins."""
        torch.manual_seed(seed)
        if self.recipe.model is None:
            head = self.task.head(self.config)
        else:
            head = self.task.started(self.recipe.model, **self._changes(FIXED_BY_MODEL))
        if self.recipe.init_head is not None:
            copied = head.copy_head(local.existing("finetune: --init-head", self.recipe.init_head))
            print(f"--init-head: copied, with the rows of {copied} of {len(head.labels)} labels", flush=True)
        return head

    def evaluated(self, last: bool) -> Split:
        """Return what is evaluated of --dev: all at the end, and `Task.dev_items` of it during training."""
        dev, some = self.splits["dev"], self.task.dev_items
        if last or some is None or len(dev.items) <= some:
            return dev
        return Split(dev.items[:some], self.task.examples(dev.items[:some], self.tokenizer))

    def require_same(self, file: Path) -> None:
        """Check that the data is that of the first call, which writes its hashes into `file`.

        Raises:
            ValueError: --train or --dev differs.
        """
        if not file.exists():
            local.write_json(file, self.hashes)
        found = local.json_object("finetune", file)
        for role, digest in self.hashes.items():
            if found.get(role) != digest:
                rule = f"be the data with which {file.parent} was started"
                raise ValueError(must(f"finetune: --{role}", rule, "other data", self.recipe.another))

    def introduce(self) -> None:
        """Print the sizes of the data."""
        for role, (items, examples) in self.splits.items():
            sequences = f" in {len(examples):,} sequences" * (len(examples) != len(items))
            mean = f"{examples.lengths.mean():.1f} tokens on average"
            text = f"--{role}: {len(items):,} items{sequences}, {mean}"
            cut = [f"{examples.truncated:,} cut off at {self.task.longest}"] * (examples.truncated > 0)
            print(text, *cut, sep="; ", flush=True)

    def _read(self, role: str) -> list[Any]:
        paths = getattr(self.recipe, role)
        for path in paths:
            local.existing(f"finetune: --{role}", path, hub=False)
        items = self.task.read(paths, role)
        if not items:
            got = f"none in {', '.join(paths)}"
            raise ValueError(must(f"finetune: --{role}", "have at least one item", got))
        return items

    def _tokenizer(self, train: list[Any]) -> Any:
        recipe = self.recipe
        if recipe.model is not None:
            return data.load_tokenizer(local.existing("finetune: --model", recipe.model), special_ids=None)
        if recipe.vocab.isdecimal():
            return data.train_tokenizer(list(self.task.texts(train)), int(recipe.vocab))
        return data.load_tokenizer(local.existing("finetune: --vocab", recipe.vocab), special_ids=None)

    def _config(self) -> ElectraConfig:
        if self.recipe.model is not None:
            config = dataclasses.replace(
                read_folder(self.recipe.model).config, **self._changes(FIXED_BY_MODEL)
            )
            data.require_rows(f"finetune: --model {self.recipe.model}", self.tokenizer, config.vocab_size)
            return config
        size = max(self.tokenizer.get_vocab().values()) + 1
        special = data.special_ids(self.tokenizer)
        ids = {f"{name.strip('[]').lower()}_id": i for name, i in special.items() if name != "[UNK]"}
        preset = getattr(ElectraConfig, self.recipe.preset)()
        return dataclasses.replace(preset, vocab_size=size, **ids, **self._changes(FIXED_BY_VOCABULARY))

    def _changes(self, fixed: tuple[str, ...]) -> dict[str, Any]:
        return self.recipe.assignments(ElectraConfig(), fixed)

    def _hash(self, examples: Examples) -> str:
        digest = hashlib.sha256(json.dumps(self.task.outputs()).encode())
        for array in examples.arrays():
            digest.update(array.tobytes())
        return digest.hexdigest()
