"""ONNX Runtime's dynamic quantisation, with the loss of each unit, and the units that are worth it.

Weights are int8 with one scale per output column, the embedding tables with one per table. Activations are
quantised in each call, with one scale per tensor. Weights have seven bits (`reduce_range`): on a CPU without
VNNI the sums of products of eight bits exceed int16 and are cut off, and the file may be run on such a CPU.

A unit is the embedding tables, their projection, the attention or the feed-forward network of a layer, or the
head. It is measured as the only one in int8.
"""

import contextlib
import logging
import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from electra_fast.errors import must
from electra_fast.export import onnx
from electra_fast.export.engine import Engine, as_logits, run
from electra_fast.export.model import Source, package
from electra_fast.export.texts import Texts, by_length
from electra_fast.tables import text_table

BATCH = 32  # sequences; a scale of activations is that of the whole batch, so larger batches lose more
TINY = np.finfo(np.float32).tiny
MOVED = 0.01  # of the range of all scores: a score of `regress` that differs more counts as changed


class Unit(NamedTuple):
    """Nodes of an ONNX graph that are quantised together."""

    name: str
    nodes: list[str]


class Loss(NamedTuple):
    """What int8 costs."""

    points: float  # of the metric, in hundredths; without labels, the percentage of changed predictions
    change: float  # mean absolute change of the logits, in percent of their standard deviation


class Quantized(NamedTuple):
    """What was quantised, and its loss."""

    in_float: list[str]  # names of the units that stay in float
    loss: Loss
    losses: dict[str, Loss]  # of each unit as the only one in int8


def units_of(proto: Any) -> list[Unit]:
    """Return the units of a graph of `onnx.convert`, in the order in which they run."""
    weights, found = {tensor.name for tensor in proto.graph.initializer}, {}
    for node in proto.graph.node:
        table = node.op_type == "Gather" and node.input[0] in weights
        if table or (node.op_type in ("MatMul", "Gemm") and node.input[1] in weights):
            # The quantiser first makes Gemm a MatMul with another name.
            name = node.name + "_MatMul" * (node.op_type == "Gemm")
            found.setdefault(unit_name(node.name), []).append(name)
    return [Unit(*each) for each in found.items()]


def unit_name(node: str) -> str:
    """Return the unit of a node, whose name is the path of its module in the model of transformers."""
    if layer := re.search(r"/layer\.(\d+)/(attention)?", node):
        return f"layer {layer[1]} " + ("attention" if layer[2] else "feed-forward")
    if "/embeddings_project/" in node:
        return "projection"
    return "embeddings" if "/embeddings/" in node else "head"


def quantized(proto: Any, units: Sequence[Unit]) -> bytes:
    """Return the model as an ONNX file in which the weights of `units` are int8."""
    quantization = package("onnxruntime.quantization")
    copy = type(proto)()  # the quantiser changes its argument
    copy.CopyFrom(proto)
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "model.onnx"
        quantization.quantize_dynamic(
            copy,
            file,
            nodes_to_quantize=[node for unit in units for node in unit.nodes],
            per_channel=True,
            reduce_range=True,
            weight_type=quantization.QuantType.QInt8,
        )
        return file.read_bytes()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the quantiser's advice to optimise the graph first, which ONNX Runtime does when it loads it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class Measure:
    """Compares the predictions of a quantised model with those of the float model.

    Args:
        source: the model.
        texts: with labels, or without; they are sorted by length, so that batches have little padding.
        float_engine: runs the float model.
    """

    def __init__(self, source: Source, texts: Texts, float_engine: Engine):
        self.source, self.texts = source, by_length(source, texts)
        task = source.task
        self.arrays = self._run(float_engine)
        self.predictions = self._predictions(self.arrays)
        unlabelled = task is None or task.unlabelled(self.texts.items)
        # A metric may be NaN, such as the correlation of constant scores.
        self.metric = math.nan if unlabelled else self._metric(self.predictions)
        self.labelled = not math.isnan(self.metric)

    @property
    def unit(self) -> str:
        """What `Loss.points` counts."""
        return f"points of {self.source.task.metric}" if self.labelled else "% changed predictions"

    def loss(self, engine: Engine, done: Callable[[int], Any] = lambda sequences: None) -> Loss:
        """Run a quantised model on all texts."""
        arrays = self._run(engine, done)
        predictions = self._predictions(arrays)
        pairs = zip(arrays, self.arrays, strict=True)
        changes = [np.abs(a - b).mean() / max(b.std(), TINY) for a, b in pairs]
        if self.labelled:
            points = 100 * (self.metric - self._metric(predictions))
        else:
            points = 100 * float(np.mean(self._changed(predictions)))
        return Loss(points, 100 * float(max(changes)))

    def _run(self, engine: Engine, done: Callable[[int], Any] = lambda sequences: None) -> list[np.ndarray]:
        source, examples = self.source, self.texts.examples
        return run(engine, source.outputs, examples, source.pad_id, (BATCH,), done)

    def _predictions(self, arrays: list[np.ndarray]) -> Any:
        task, logits = self.source.task, as_logits(self.source.head, arrays)
        return logits > 0 if task is None else task.predictions(logits, self.texts.examples, self.texts.items)

    def _metric(self, predictions: Any) -> float:
        return self.source.task.metrics(self.texts.items, predictions)[self.source.task.metric]

    def _changed(self, predictions: Any) -> Collection[bool]:
        """Return whether each prediction differs from that of the float model."""
        name = self.source.task.name if self.source.task else "detect"
        if name == "detect":
            return predictions != self.predictions
        if name == "regress":
            before = np.array(self.predictions)
            return np.abs(np.array(predictions) - before) > MOVED * np.ptp(before)
        pairs = zip(predictions, self.predictions, strict=True)
        return [decision(name, a) != decision(name, b) for a, b in pairs]


def decision(task: str, prediction: Any) -> Any:
    """Return what a prediction decides, without its scores."""
    attribute = {"classify": "labels", "answer": "answer", "choose": "option"}.get(task)
    if attribute:
        return getattr(prediction, attribute)
    return int(np.argmax(prediction)) if task == "rank" else prediction


def quantize(file: Path, measure: Measure, limit: float) -> Quantized:
    """Replace an ONNX file by one with int8 weights, except the units that must stay in float.

    While the loss is larger, the unit with the largest change of the logits stays in float. The loss of one
    unit is often that of a few texts, so it does not order them.

    Raises:
        ValueError: the loss is larger even with a single unit in int8.
    """
    from tqdm import tqdm

    proto = package("onnx").load(file)
    units, losses = units_of(proto), {}
    sequences = len(measure.texts.examples.offsets) - 1
    with tqdm(total=sequences * len(units), unit=" texts", desc="int8, each unit", leave=False) as bar:
        for unit in units:
            losses[unit.name] = measure.loss(onnx.engine(quantized(proto, [unit])), bar.update)
    print(loss_table(losses, measure.unit), flush=True)
    worst_first = sorted(units, key=lambda unit: losses[unit.name].change, reverse=True)
    for floats in range(len(units)):
        in_float = [unit.name for unit in worst_first[:floats]]
        model = quantized(proto, [unit for unit in units if unit.name not in in_float])
        loss = measure.loss(onnx.engine(model))
        if loss.points <= limit:
            file.write_bytes(model)
            print(report(in_float, loss, measure.unit), flush=True)
            return Quantized(in_float, loss, losses)
    worst = ", ".join(unit.name for unit in worst_first[:3])
    got = f"{loss.points:.2f} with {worst_first[-1].name} alone in int8"
    remedy = f"the largest changes are in {worst}; nothing was written; raise --limit, or leave out --int8"
    raise ValueError(must("export: --int8", f"lose at most {limit:g} {measure.unit}", got, remedy))


def report(in_float: list[str], loss: Loss, unit: str) -> str:
    """Return what was quantised in one line."""
    kept = f"in float: {', '.join(in_float)}" if in_float else "all units in int8"
    return f"int8: {kept}; loss {loss.points:+.2f} {unit}, change of logits {loss.change:.2f} %"


def loss_table(losses: dict[str, Loss], unit: str) -> str:
    """Return a table with the loss of each unit."""
    rows = [("only this in int8", f"loss, {unit}", "change of logits, %")]
    rows += [(name, f"{loss.points:+.2f}", f"{loss.change:.2f}") for name, loss in losses.items()]
    return text_table(rows, right=(1, 2))
