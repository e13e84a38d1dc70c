"""int8: every unit is really quantised, its loss is measured, and the bad ones stay in float."""

import json

import numpy as np
import pytest
import torch
from small_exports import detector, folder, scorer, sentences, table
from small_heads import small
from small_vocabulary import WORDS

from electra_fast.export import export, int8, model, onnx, texts
from electra_fast.heads import (
    IntentClassifier,
    MultipleChoice,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from electra_fast.model import Discriminator

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
onnx_package = pytest.importorskip("onnx")
pytest_plugins = ["small_tokenizer"]

UNITS = ["embeddings", "projection", "layer 0 attention", "layer 0 feed-forward"]
UNITS += ["layer 1 attention", "layer 1 feed-forward", "head"]
KINDS = {"tag": TokenClassifier, "answer": QuestionAnswerer, "choose": MultipleChoice}
KINDS |= {"intent": IntentClassifier, "detect": Discriminator}
KINDS |= {"regress": SequenceClassifier, "rank": SequenceClassifier}
BAD = "layer 1 feed-forward"


@pytest.fixture(autouse=True)
def manual(monkeypatch):
    monkeypatch.setattr(texts, "python_manual", lambda: " ".join(WORDS * 20))


def outlier(head):
    """Make one activation so large that the others in its tensor become 0 in int8."""
    network = head.encoder.layers[1].feed_forward
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.fill_(1) if "norm.weight" in name else parameter.mul_(4)
        network.dense_in.bias[0] = 1e4
        network.dense_out.weight[:, 0] = 1e-5


def own_labels(path, tmp_path, count=200):
    """Return a file in which the labels are the predictions of the model, so its accuracy is 1."""
    lines = sentences(count)
    source = model.read_source(path, {})
    file = table(tmp_path / "lines.csv", lines)
    found = texts.read_texts(source, [file], count)
    engine = onnx.engine(onnx.convert(source).SerializeToString())
    chosen = int8.Measure(source, found, engine).predictions
    sorted_lines = [item.text for item in texts.by_length(source, found).items]
    return table(tmp_path / "labelled.csv", sorted_lines, [each.labels[0] for each in chosen])


def in_int8(file):
    """Return the number of int8 weights, which are named after the float ones, and that of float matrices."""
    tensors = onnx_package.load(file).graph.initializer
    kinds = onnx_package.TensorProto
    matrices = [tensor for tensor in tensors if len(tensor.dims) == 2]
    kinds = [{kinds.INT8, kinds.UINT8}, {kinds.FLOAT}]  # tables are unsigned
    return [sum(x.data_type in kind for x in matrices) for kind in kinds]


def test_every_unit_is_quantised(tmp_path, tokenizer):
    path = folder(tmp_path / "model", tokenizer, IntentClassifier)
    proto = onnx.convert(model.read_source(path, {}))
    units = int8.units_of(proto)
    assert [unit.name for unit in units] == UNITS
    assert [len(unit.nodes) for unit in units] == [3, 1, 4, 2, 4, 2, 3]
    for unit in units:
        (tmp_path / "unit.onnx").write_bytes(int8.quantized(proto, [unit]))
        assert in_int8(tmp_path / "unit.onnx")[0] == len(unit.nodes), unit


def test_a_unit_that_loses_too_much_stays_in_float(tmp_path, tokenizer, capsys):
    path = folder(tmp_path / "model", tokenizer, change=outlier)
    file = own_labels(path, tmp_path)
    found = export(path, "onnx", tmp_path / "m.onnx", int8=True, data=file, limit=6).quantized
    assert found.in_float == [BAD]
    assert found.losses.keys() == set(UNITS)
    assert found.losses[BAD].points > 6 >= found.loss.points
    assert in_int8(tmp_path / "m.onnx") == [3 + 1 + 4 + 2 + 4 + 2, 2]
    out = capsys.readouterr().out
    assert "loss, points of accuracy" in out and f"int8: in float: {BAD}; loss" in out
    known = onnx_package.load(tmp_path / "m.onnx").metadata_props
    assert {"labels": model.read_source(path, {}).metadata()["labels"]}.items() <= {
        each.key: each.value for each in known
    }.items()


def test_what_cannot_be_quantised_is_not_written(tmp_path, tokenizer, monkeypatch):
    path = folder(tmp_path / "model", tokenizer)
    losses = iter(int8.Loss(9.0, change) for change in [3, 2, 1, 7, 6, 5, 4, *range(7)])
    monkeypatch.setattr(int8.Measure, "loss", lambda *_: next(losses))
    message = "must lose at most 0.5 % changed predictions, got 9.00 with layer 0 attention alone in int8; "
    message += "the largest changes are in layer 0 feed-forward, layer 1 attention, layer 1 feed-forward"
    with pytest.raises(ValueError, match=message):
        export(path, "onnx", tmp_path / "m.onnx", int8=True, items=64)
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("task", ["tag", "answer", "choose", "intent", "detect", "regress", "rank"])
def test_without_labels_changed_predictions_are_counted(task, tmp_path, tokenizer, monkeypatch):
    kind, make = KINDS[task], {"detect": detector, "regress": scorer, "rank": scorer}.get(task, small)
    path = folder(tmp_path / "model", tokenizer, kind, make)
    if task == "rank":
        paths = [str(tmp_path)]
        recipe = {"task": task, "model": str(path), "train": paths, "dev": paths}
        (path / "recipe.json").write_text(json.dumps(recipe))
    source = model.read_source(path, {"max_query": 16, "stride": 8})
    proto = onnx.convert(source)
    measure = int8.Measure(source, texts.manual_texts(source, 64), onnx.engine(proto.SerializeToString()))
    assert measure.unit == "% changed predictions"
    assert measure.loss(onnx.engine(proto.SerializeToString())) == int8.Loss(0.0, 0.0)
    loss = measure.loss(onnx.engine(int8.quantized(proto, int8.units_of(proto))))
    assert 0 <= loss.points <= 100 and 0 < loss.change
    everything = [
        np.ones_like(x) * np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) for x in measure.arrays
    ]
    monkeypatch.setattr(measure, "_run", lambda *_: everything)
    assert measure.loss(None).points > 0
