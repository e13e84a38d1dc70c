"""Fine-tuning: from a discriminator to a classifier, a tagger, an answerer or a writer.

    python -m electra_fast finetune classify --model DISCRIMINATOR --train a.csv --dev b.csv --out runs/c
    python -m electra_fast finetune --resume runs/c

    fine_tune(FineTuneRecipe(task="classify", model=…, train=…, dev=…), "runs/c")  # the same in Python

Each seed trains in its own folder, seed-0, seed-1, …, as a `Training`. The best one on --dev is saved in the
folder itself, which transformers loads, with metrics.json, predictions.jsonl and report.html.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from electra_fast import local
from electra_fast.distributed import World
from electra_fast.errors import must
from electra_fast.tasks.examples import TaskBatches
from electra_fast.tasks.task import TaskModel, evaluate
from electra_fast.train import optimizer, results
from electra_fast.train.divergence import NotFinite
from electra_fast.train.fine_tune_recipe import FineTuneRecipe
from electra_fast.train.loader import Loader
from electra_fast.train.logger import Logger
from electra_fast.train.metrics import TaskMetrics
from electra_fast.train.run_folder import RECIPE, RunFolder
from electra_fast.train.saver import State
from electra_fast.train.task_data import TaskData
from electra_fast.train.training import Training

DATA = "data.json"  # the hashes of the data of a run


class FineTuning(Training):
    """The run of one seed.

    Args:
        recipe: the result of `FineTuneRecipe.resolved`, with the seed.
        out: the folder of the seed. If it has a run already, that run is resumed.
        task_data: the data, the same for all seeds.
        device, world: as in `Pretraining`.
        graph: as in `Training`.

    Raises:
        ValueError, OSError: as in `Training`.
    """

    command, text_option, evaluation = "finetune", "--train", "dev"

    def __init__(
        self,
        recipe: FineTuneRecipe,
        out: Path,
        task_data: TaskData,
        device: torch.device | None = None,
        graph: bool = True,
        world: World | None = None,
    ):
        world = World.join(self.command, device) if world is None else world
        self.task_data, self.shown = task_data, ("tokens_per_second", "loss", task_data.task.metric)
        graph = graph and task_data.task.fixed_shapes
        examples, fixed = task_data.splits["train"].examples, graph and world.device.type == "cuda"
        batches = TaskBatches(examples, recipe.batch, recipe.seed, task_data.config.pad_id, fixed)
        recipe = recipe.for_model(task_data.config, batches.steps_per_epoch)
        model = TaskModel(task_data.head(recipe.seed), task_data.task).to(world.device).train()
        optim = optimizer.adamw(
            model,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
            bias_correction=recipe.bias_correction,
            layer_decay=recipe.layer_decay,
        )
        folder = world.together(lambda: RunFolder(out, self.command) if world.first else None)
        loader = Loader(batches, batches.make, world.device)
        super().__init__(
            world,
            recipe,
            out,
            folder,
            task_data.tokenizer,
            task_data.hashes["train"],
            model,
            optim,
            loader,
            TaskMetrics,
            graph,
        )

    @property
    def run_folder(self) -> Path:
        return self.out.parent

    def evaluate(self) -> dict[str, float]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            dev = self.task_data.evaluated(last=self.step == self.recipe.steps)
            return evaluate(self.task_data.task, self.model.head, *dev, world=self.world).metrics

    def summary(self, metrics: dict[str, float]) -> str:
        return f"on --dev: {results.one_line(metrics)}"

    def introduce(self, logger: Logger) -> None:
        if self.step == 0:
            parameters = sum(p.numel() for p in self.model.parameters())
            facts = {"parameters": parameters, "steps": self.recipe.steps, "seed": self.recipe.seed}
            logger.write("begin", 0, facts)

    def export(self, state: State) -> None:
        """Write the model after the last step; before that, only the checkpoints have its weights."""
        if state.step == self.recipe.steps:
            state.model.head.save_pretrained(self.out / "model")
            for config in (self.out / "model").rglob("config.json"):  # of an intent's slots too
                self.folder.save_tokenizer(self.tokenizer, config.parent)

    def run(self) -> dict[str, float]:
        """Train to the last step and write metrics.json."""
        metrics = super().run()
        if self.world.first:
            result = {"seed": self.recipe.seed, "failed": None, "dev": results.with_null(metrics)}
            local.write_json(results.of_seed(self.out), result)
        return metrics


def fine_tune(
    recipe: FineTuneRecipe,
    out: str | Path,
    *,
    device: str | torch.device | None = None,
    graph: bool = True,
    world: World | None = None,
) -> dict[str, Any]:
    """Train all seeds, evaluate the best one, write the results into `out`, and return them.

    Args:
        recipe: the options. If `out` has a run already, it is continued with the changes that
            `FineTuneRecipe.changed` allows; seeds that have ended are not trained again.
        out: the folder of the run.
        device, world: as in `Pretraining`.
        graph: as in `Training`.

    Returns:
        the content of metrics.json, see `results.of_run`.

    Raises:
        ValueError, OSError: as in `TaskData` and `Training`, or `out` is the folder of a seed.
        NotFinite: no seed has ended with finite weights.
        SystemExit: as in `Training.run`.
    """
    out, world = Path(out), World.join("finetune", device) if world is None else world
    world.require_same({"the options": recipe.given()})
    recipe = world.from_first(lambda: _recipe(recipe, out, world))
    task_data = world.together(lambda: TaskData(recipe))
    world.require_same({f"--{role}": digest for role, digest in task_data.hashes.items()})
    if world.first:
        task_data.introduce()
    folder = world.together(lambda: _folder(recipe, out, task_data) if world.first else None)
    try:
        for seed in recipe.all_seeds():
            of_seed = out / f"seed-{seed}"
            if not world.from_first(results.of_seed(of_seed).exists):
                _train(dataclasses.replace(recipe, seed=seed), of_seed, task_data, graph, world)
            if world.first:
                shutil.rmtree(of_seed / "checkpoints", ignore_errors=True)  # of a seed that has ended
        return world.from_first(lambda: results.of_run(recipe, out, task_data, world.device))
    finally:
        if folder is not None:
            folder.close()


def _recipe(recipe: FineTuneRecipe, out: Path, world: World) -> FineTuneRecipe:
    """Return the recipe of all seeds: that of the run in `out` with the given changes, or a new one."""
    if (out / "log.jsonl").exists():
        rule, got = "be the folder of a whole run", f"{out}, which is one seed"
        raise ValueError(must("finetune: --resume", rule, got, f"use {out.parent}"))
    if (file := out / RECIPE).exists():
        recipe = FineTuneRecipe.load(file).changed(**recipe.given())
    else:
        recipe = recipe.resolved(world.size)
    world.require_divides(recipe.accumulate)
    precision = recipe.precision or ("bf16" if world.device.type == "cuda" else "float32")
    return dataclasses.replace(recipe, precision=precision)


def _folder(recipe: FineTuneRecipe, out: Path, task_data: TaskData) -> RunFolder:
    """Lock the folder of a run; write the recipe and the hashes of the data, or compare these."""
    folder = RunFolder(out, "finetune")
    try:
        recipe.save(out / RECIPE)
        task_data.require_same(out / DATA)
    except BaseException:
        folder.close()
        raise
    return folder


def _train(recipe: FineTuneRecipe, folder: Path, task_data: TaskData, graph: bool, world: World) -> None:
    """Train one seed. A run that diverges is a result too, unless it is the only one."""
    try:
        FineTuning(recipe, folder, task_data, graph=graph, world=world).run()
    except NotFinite as error:
        if recipe.seeds == 1:
            raise
        if world.first:
            print(error, flush=True)
            result = {"seed": recipe.seed, "failed": str(error), "dev": None}
            local.write_json(results.of_seed(folder), result)
