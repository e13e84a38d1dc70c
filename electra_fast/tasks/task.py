"""What all tasks have in common: from the items of files to examples, a head, a loss and metrics."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from electra_fast.config import ElectraConfig
from electra_fast.distributed import ALONE, World
from electra_fast.errors import must
from electra_fast.heads import TaskHead, labels_of, on_encoder
from electra_fast.modules import Layout
from electra_fast.pretrained import PretrainedHalf
from electra_fast.tasks.details import Section
from electra_fast.tasks.examples import Examples


class TaskOutput(NamedTuple):
    loss: Tensor  # [] float32, the mean over the items or tokens with a target

    def numbers(self) -> Tensor:
        """Return the metrics of a micro-batch, float32 ``[1]``, in the order of `TaskMetrics`."""
        return self.loss[None]


class Task:
    """A task; an object has the options of a run and, after `learn`, the labels.

    `options` has the fields of `FineTuneRecipe` that concern files and lengths.
    """

    name: ClassVar[str]
    metric: ClassVar[str]  # the metric by which models are compared; larger is better
    epochs: ClassVar[int] = 3  # of the paper
    max_len: ClassVar[int] = 128
    max_target: ClassVar[int] = 64  # of a target that is a text
    head_class: ClassVar[type[PretrainedHalf]]  # a `TaskHead`, or an `EncoderDecoder`
    problem: ClassVar[str | None] = None  # transformers' problem_type
    one_output: ClassVar[bool] = False  # whether the head has a single score
    layer_decay: ClassVar[float | None] = (
        None  # the default of --layer-decay; None: by the width of the model
    )
    dev_items: ClassVar[int | None] = None  # of --dev in an evaluation during training; None: all
    fixed_shapes: ClassVar[bool] = True  # whether batches can be filled up to one shape, for a CUDA graph
    baseline: ClassVar[str] = "the best constant prediction"  # what `majority` returns the metrics of

    def __init__(self, options: Any):
        self.options = options
        self.labels: tuple[str, ...] = ()

    def read(self, paths: Sequence[str], role: str) -> list[Any]:
        """Return the items of files; `role` is "train", "dev" or "test".

        Raises:
            ValueError, OSError: a file is wrong; the message has its name and the line.
        """
        raise NotImplementedError

    def learn(self, items: Sequence[Any]) -> None:
        """Set `labels` to those of the training items."""

    def use(self, described: dict[str, Any]) -> None:
        """Set `labels` to those of a fine-tuned model, whose config.json is `described`.

        Raises:
            ValueError: the task has one output, and the model has several.
        """
        self.labels = labels_of(described)
        if self.one_output and len(self.labels) != 1:
            raise ValueError(
                must(f"{self.name}: the model", f"have one output for {self.name}", len(self.labels))
            )

    def outputs(self) -> list[tuple[str, ...]]:
        """Return the labels of each output layer."""
        return [self.labels]

    def unlabelled(self, items: Sequence[Any]) -> str | None:
        """Return an error about the first item without a label, None if all have one."""
        raise NotImplementedError

    def texts(self, items: Sequence[Any]) -> Iterator[str]:
        """Yield the texts of items, to train a vocabulary."""
        raise NotImplementedError

    def check(self, items: Sequence[Any]) -> None:
        """Raise ValueError if items have labels that the training items do not have."""

    def head(self, config: ElectraConfig) -> TaskHead:
        """Return a model with a new head."""
        return self.head_class(config, self.labels, self.problem)

    def started(self, folder: str | Path, **changes: Any) -> PretrainedHalf:
        """Return a model that starts from a discriminator; arguments and errors as in `on_encoder`."""
        return on_encoder(folder, self.head, **changes)

    @property
    def longest(self) -> str:
        """Where sequences are cut off, for messages."""
        return f"{self.max_len} tokens"

    def examples(self, items: Sequence[Any], tokenizer: Any) -> Examples:
        """Encode items."""
        raise NotImplementedError

    def loss_of(
        self,
        head: PretrainedHalf,
        *,
        ids: Tensor,
        type_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng: Tensor | None = None,
        **targets: Tensor,
    ) -> Tensor:
        """Return the mean loss, float32, of a packed batch of `Examples`."""
        layout = Layout(None, cu_seqlens, max_seqlen)
        logits = head(ids, type_ids=type_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, rng=rng)
        return self.loss(logits, layout, **targets)

    def loss(self, logits: Any, layout: Layout, **targets: Tensor) -> Tensor:
        """Return the mean loss, float32, of a packed batch; `targets` are those of `Examples`."""
        raise NotImplementedError

    def predict(
        self,
        head: PretrainedHalf,
        examples: Examples,
        items: Sequence[Any],
        progress: bool = False,
        world: World = ALONE,
    ) -> list[Any]:
        """Return one prediction per item; arguments as in the function `predict`."""
        tokens = EVALUATION_TOKENS[next(head.parameters()).device.type]
        return self.predictions(predict(head, examples, tokens, progress, world), examples, items)

    def predictions(self, logits: Any, examples: Examples, items: Sequence[Any]) -> list[Any]:
        """Return one prediction per item from the logits of all sequences, an array or a tuple of arrays."""
        raise NotImplementedError

    def metrics(self, items: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
        """Return the metrics, with the one called `metric`."""
        raise NotImplementedError

    def record(self, item: Any, prediction: Any) -> dict[str, Any]:
        """Return the line of predictions.jsonl about an item."""
        raise NotImplementedError

    def majority(self, items: Sequence[Any], train: Sequence[Any]) -> dict[str, float] | None:
        """Return the metrics of `baseline`, such as the best constant prediction; None without one."""
        return None

    def details(self, items: Sequence[Any], predictions: Sequence[Any]) -> list[Section]:
        """Return tables about the predictions for the page of the run; all items have labels."""
        return []

    def error(self, item: Any, prediction: Any) -> float:
        """Return how wrong a prediction is, 0 if it is right: 1 - the metric of the item alone."""
        return 1 - self.metrics([item], [prediction])[self.metric]

    def shown(self, item: Any, prediction: Any) -> dict[str, Any]:
        """Return what the page shows of a wrong prediction: names with texts, numbers or lists."""
        return self.record(item, prediction)


class TaskModel(nn.Module):
    """A head and the loss of its task, with the forward that `Step` calls."""

    def __init__(self, head: PretrainedHalf, task: Task):
        super().__init__()
        self.head, self.task = head, task

    def forward(self, **batch: Any) -> TaskOutput:
        """Return the loss of a packed batch; arguments as in `Task.loss_of`."""
        return TaskOutput(self.task.loss_of(self.head, **batch))


INPUTS = ("ids", "type_ids", "cu_seqlens", "max_seqlen")
EVALUATION_TOKENS = {"cpu": 4096, "cuda": 65536}  # per batch


def predict(
    head: PretrainedHalf,
    examples: Examples,
    tokens: int,
    progress: bool = False,
    world: World = ALONE,
    desc: str = "evaluation",
) -> Any:
    """Return the logits of all sequences or tokens, in order: a float32 array, or a tuple of them.

    Several processes divide the batches, and all get the result.

    Args:
        head: a `TaskHead` or a `Discriminator`, on the device that computes.
        examples: the data.
        tokens: about how many tokens are computed together.
        progress: show a progress bar on a terminal, after a second.
        world: the processes.
        desc: begins the progress bar.
    """
    from tqdm import tqdm

    device, was_training, found = next(head.parameters()).device, head.training, {}
    if was_training:  # each of these calls visits all modules, which takes longer than a short text
        head.eval()
    shown = {"unit": " items", "desc": desc, "leave": False, "delay": 1.0}
    bar = tqdm(total=len(examples), disable=None if progress else True, **shown)
    with bar, torch.inference_mode():
        for number, (items, batch) in enumerate(examples.in_order(tokens)):
            if number % world.size != world.rank:
                continue
            inputs = {
                n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items() if n in INPUTS
            }
            logits = head(**inputs)
            # Copied now, because the logits of a large data set may not fit next to the model.
            parts = logits if isinstance(logits, tuple) else (logits,)
            arrays = [x.float().cpu().numpy() for x in parts]
            found[number] = type(logits)(*arrays) if isinstance(logits, tuple) else arrays[0]
            bar.update(items.stop - items.start)
    if was_training:
        head.train()
    batches = world.merged(found)
    if isinstance(batches[0], tuple):
        return type(batches[0])(*map(np.concatenate, zip(*batches, strict=True)))
    return np.concatenate(batches)


class Evaluation(NamedTuple):
    predictions: list[Any]  # one per item
    metrics: dict[str, float]


def evaluate(
    task: Task,
    head: PretrainedHalf,
    items: Sequence[Any],
    examples: Examples,
    progress: bool = False,
    world: World = ALONE,
) -> Evaluation:
    """Return the predictions of a model for some items, and their metrics, none if an item has no label."""
    predictions = task.predict(head, examples, items, progress, world)
    return Evaluation(predictions, {} if task.unlabelled(items) else task.metrics(items, predictions))
