"""The folder of a fine-tuned model, opened: its task with its options, its head and its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch

from electra_fast import data, local
from electra_fast.errors import must
from electra_fast.pretrained import PretrainedHalf, read_folder
from electra_fast.tasks import TASKS
from electra_fast.tasks.task import Task
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.train.run_folder import RECIPE
from electra_fast.train.task_data import set_max_len


class FineTuned(NamedTuple):
    task: Task  # with the labels of the model
    head: PretrainedHalf  # on its device, in eval mode
    tokenizer: Any
    recipe: FineTuneRecipe  # that of the run, with the given changes


def open_fine_tuned(call: str, task: str, folder: Path, device: torch.device, **options: Any) -> FineTuned:
    """Open the folder that `fine_tune` or transformers wrote.

    Args:
        call: begins the errors: "evaluate".
        task: one of `TASKS`.
        folder: of the model.
        device: the device of the head.
        options: fields of `FineTuneRecipe` about files and lengths; the others are those of the folder's run.

    Raises:
        ValueError, OSError: the folder has no model for this task, or no tokenizer.
    """
    if task not in TASKS:
        raise ValueError(must(f"{call}: the task", f"be one of {', '.join(TASKS)}", repr(task)))
    recipe = recipe_of(folder, task, options)
    if recipe.task != task:
        raise ValueError(must(f"{call}: {folder}", f"be a model of finetune {task}", recipe.task))
    of_task = TASKS[task](recipe)
    described = local.json_object(call, folder / "config.json")
    if (found := described.get("architectures")) and found != [of_task.head_class.hugging_face_class]:
        rule = f"have the head of {task} ({of_task.head_class.hugging_face_class})"
        remedy = f"finetune {task} makes one of a pre-trained model"
        raise ValueError(must(f"{call}: {folder}", rule, ", ".join(map(str, found)), remedy))
    config = read_folder(folder, of_task.head_class.model_type).config
    of_task.use(described)
    set_max_len(of_task, recipe, config)
    tokenizer = data.load_tokenizer(folder, special_ids=None)
    data.require_rows(f"{call}: {folder}", tokenizer, config.vocab_size)
    return FineTuned(of_task, load_head(of_task, folder, device), tokenizer, recipe)


def load_head(task: Task, folder: Path, device: torch.device) -> PretrainedHalf:
    """Return the model of a folder; raise ValueError if it has the head of another task."""
    try:
        return task.head_class.from_pretrained(folder).to(device)
    except RuntimeError as error:
        raise ValueError(must(str(folder), f"have the head of {task.name}", "other weights")) from error


def recipe_of(folder: Path, task: str, options: dict[str, Any]) -> FineTuneRecipe:
    """Return the recipe of a folder's run with the changes `options`.

    A model of transformers has no recipe: the result has `task` and these options.
    """
    file, paths = folder / RECIPE, (str(folder),)
    if file.exists():
        recipe = FineTuneRecipe.load(file)
    else:
        recipe = FineTuneRecipe(task=task, model=str(folder), train=paths, dev=paths)
    return dataclasses.replace(recipe, **options).resolved()
