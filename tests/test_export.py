"""`export`: every head in every format, the self-check, and what is refused before any work."""

import errno
import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_exports import SIZES, folder, sentences, table
from small_heads import LABELS, SLOTS, edit
from small_vocabulary import PIECES, WORDS, more_pieces

from electra_fast import __main__, data
from electra_fast.export import as_bert, engine, export, exporting, model, texts
from electra_fast.heads import (
    IntentClassifier,
    MultipleChoice,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
)
from electra_fast.model import Discriminator, Generator

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest_plugins = ["small_tokenizer"]

NAMES = {
    SequenceClassifier: ["logits"],
    TokenClassifier: ["logits"],
    QuestionAnswerer: ["start_logits", "end_logits"],
    MultipleChoice: ["logits"],
    IntentClassifier: ["logits", "slot_logits"],
}
TASK_OF = dict(zip(NAMES, ("classify", "tag", "answer", "choose", "intent"), strict=True))
SHORT = {"max_query": 16, "stride": 8}  # for `answer`, in 48 positions


@pytest.fixture(autouse=True)
def manual(monkeypatch):
    """A manual of words that the small tokenizer has."""
    monkeypatch.setattr(texts, "python_manual", lambda: " ".join(WORDS * 20))


@pytest.fixture
def classifier(tmp_path, tokenizer):
    return folder(tmp_path / "model", tokenizer)


def session(file):
    import onnxruntime

    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", NAMES)
def test_every_head_as_onnx(kind, tmp_path, tokenizer):
    found = export(folder(tmp_path / "model", tokenizer, kind), "onnx", tmp_path / "m.onnx", **SHORT)
    assert 0 < found.difference.error <= found.difference.allowed < 1e-3 < found.difference.largest
    exported = session(tmp_path / "m.onnx")
    assert [output.name for output in exported.get_outputs()] == NAMES[kind]
    assert all(axis.shape == ["batch", "length"] for axis in exported.get_inputs())
    known = exported.get_modelmeta().custom_metadata_map
    assert known["task"] == TASK_OF[kind] and known["max_length"] == "48"
    assert tuple(json.loads(known["labels"])) == LABELS[kind]
    assert tuple(json.loads(known.get("slot_labels", "[]"))) == SLOTS * (kind is IntentClassifier)


def test_the_tokenizer_file_makes_the_inputs(classifier, tmp_path):
    import tokenizers

    files = export(classifier, "onnx", tmp_path / "m.onnx").files
    assert [file.name for file in files] == ["m.onnx", "m.tokenizer.json"]
    encode = tokenizers.Tokenizer.from_file(str(files[1])).encode_batch
    found = encode([("red cat", "the dog"), ("rain", "play")])
    given = [np.array([getattr(x, name) for x in found]) for name in ("ids", "attention_mask", "type_ids")]
    (logits,) = session(files[0]).run(None, dict(zip(model.INPUTS, given, strict=True)))
    theirs = transformers.ElectraForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        wanted = theirs(**dict(zip(model.INPUTS, map(torch.tensor, given), strict=True))).logits
    torch.testing.assert_close(torch.tensor(logits), wanted)
    assert given[1].sum(1).tolist() == [7, 5]
    assert len(encode(["rain " * 99])[0].ids) == 48


def test_torch_export(tmp_path, tokenizer):
    file, kind = tmp_path / "m.pt2", IntentClassifier
    export(folder(tmp_path / "model", tokenizer, kind), "torch", file)
    known = {"labels": "", "task": ""}
    torch.export.load(file, extra_files=known)
    assert (known["task"], tuple(json.loads(known["labels"]))) == ("intent", LABELS[kind])


def test_openvino(tmp_path, tokenizer, monkeypatch):
    core = pytest.importorskip("openvino").Core()
    sent = Mock()
    monkeypatch.setattr(pytest.importorskip("openvino_telemetry").Telemetry, "send_event", sent)
    source = folder(tmp_path / "model", tokenizer, TokenClassifier)
    files = export(source, "openvino", tmp_path / "m.xml").files
    assert [file.suffixes[-1] for file in files] == [".xml", ".bin", ".json"]
    read = core.read_model(files[0])
    assert [output.any_name for output in read.outputs] == ["logits"]
    assert read.get_rt_info(["electra_fast", "task"]).astype(str) == "tag"
    sent.assert_not_called()


def test_a_run_of_pretraining_exports_its_discriminator(tmp_path, tokenizer):
    for kind, name in ((Discriminator, "discriminator"), (Generator, "generator")):
        half = kind(SIZES)
        half.save_pretrained(tmp_path / "run" / name)
        data.save_tokenizer(tokenizer, tmp_path / "run" / name)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(sentences(80)))
    export(tmp_path / "run", "onnx", tmp_path / "m.onnx", data=lines)
    known = session(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert (known["task"], known["architecture"]) == ("detect", "ElectraForPreTraining")
    with pytest.raises(ValueError, match="must be a discriminator, got a generator"):
        export(tmp_path / "run" / "generator", "onnx", tmp_path / "g.onnx")


def test_bert(tmp_path, tokenizer):
    square = folder(tmp_path / "square", tokenizer, embedding=SIZES.hidden, change=no_project)
    export(square, "bert", tmp_path / "bert")
    assert json.loads((tmp_path / "bert/config.json").read_text())["architectures"] == ["BertModel"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names(tmp_path / "bert")
    with pytest.raises(ValueError, match="must have an embedding_size equal to its hidden_size"):
        export(folder(tmp_path / "model", tokenizer), "bert", tmp_path / "other")


def no_project(head):
    assert head.encoder.project is None


def test_bert_with_other_weights_is_refused(tmp_path, tokenizer, monkeypatch):
    square = folder(tmp_path / "square", tokenizer, embedding=SIZES.hidden)
    monkeypatch.setattr(as_bert, "load", changed(as_bert.load, "embeddings.LayerNorm.bias"))
    with pytest.raises(ValueError, match="must have the logits of this package's model"):
        export(square, "bert", tmp_path / "bert")


def names(path):
    return {file.name for file in path.iterdir()}


def changed(load, name):
    """Return `load` with one element of a parameter changed by a thousandth."""

    def wrong(*args, **options):
        loaded = load(*args, **options)
        with torch.no_grad():
            loaded.get_parameter(name).view(-1)[0] += 1e-3
        return loaded

    return wrong


def test_one_wrong_weight_is_refused_and_nothing_is_written(classifier, tmp_path, monkeypatch):
    name = "electra.encoder.layer.1.output.dense.weight"
    monkeypatch.setattr(model, "load", changed(model.load, name))
    with pytest.raises(
        ValueError, match=r"must have the logits .* up to an error of .*; nothing was written"
    ):
        export(classifier, "onnx", tmp_path / "m.onnx")
    assert names(tmp_path) == {"model"}


def test_batches_have_different_shapes_and_contain_every_token_once(classifier):
    source = model.read_source(classifier, {})
    examples = texts.encode(source, texts.manual_texts(source, 64).items)
    shapes, tokens = [], []
    for ids, mask, types in engine.batches(examples, source.pad_id, engine.SIZES):
        shapes.append(ids.shape)
        tokens.append(np.stack([ids, types])[:, mask.astype(bool)])
    ids, types = np.concatenate(tokens, axis=1)
    assert np.array_equal(ids, examples.ids)
    assert np.array_equal(np.flatnonzero(np.diff(types) == 1) + 1, examples.offsets[:-1] + examples.first)
    assert {rows for rows, _ in shapes} >= set(engine.SIZES) and len({length for _, length in shapes}) > 2


def test_data_is_read_as_the_task_reads_it_and_errors_name_the_file(classifier, tmp_path, capsys):
    file = table(tmp_path / "dev.csv", sentences(300))
    export(classifier, "onnx", tmp_path / "m.onnx", data=file)
    assert f"{exporting.CHECKED} texts of {file}" in capsys.readouterr().out
    wrong = table(tmp_path / "wrong.csv", ["red cat"], ["hot"])
    with pytest.raises(ValueError, match=r"wrong.csv, line 2: the label must be one of"):
        export(classifier, "onnx", tmp_path / "n.onnx", data=[wrong])
    with pytest.raises(ValueError, match=r"none.csv must contain a record"):
        export(classifier, "onnx", tmp_path / "n.onnx", data=[table(tmp_path / "none.csv", [])])


def test_the_files_of_the_run_are_read_if_they_still_exist(classifier, tmp_path, capsys):
    file = table(tmp_path / "dev.csv", sentences(3), ["positive", "neutral", "positive"])
    recipe = {"task": "classify", "model": "", "train": [str(file)], "dev": [str(file)]}
    (classifier / "recipe.json").write_text(json.dumps(recipe | {"model": str(tmp_path)}))
    export(classifier, "onnx", tmp_path / "m.onnx")
    out = capsys.readouterr().out
    assert f"3 texts of {file}" in out and f"on {3 + exporting.CHECKED} sequences" in out
    file.unlink()
    export(classifier, "onnx", tmp_path / "n.onnx")
    assert "of Python's manual" in capsys.readouterr().out


def test_what_exists_is_not_overwritten(classifier, tmp_path, tokenizer):
    export(classifier, "onnx", tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=r"must be new, got .*m.onnx, which exists; remove it"):
        export(classifier, "onnx", tmp_path / "m.onnx")
    (tmp_path / "x.tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must be new, got .*, that of another model"):
        export(classifier, "onnx", tmp_path / "x.onnx")


def test_the_file_gets_its_name_after_the_others(tmp_path, monkeypatch):
    moved, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: moved.append(to.name) or replace(path, to))
    with exporting.new_files(tmp_path / "m.xml", exporting.FORMATS["openvino"]) as part:
        for name in ("m.xml", "m.bin", "m.tokenizer.json"):
            (part / name).touch()
    assert sorted(moved) == sorted(names(tmp_path)) and moved[-1] == "m.xml"


def test_a_full_disk_is_named_and_nothing_is_written(classifier, tmp_path, monkeypatch):
    out, full = tmp_path / "out", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for name in ("export", "save"):  # slow; `save` to the file would end the process
            patch.setattr(torch.export, name, Mock())
        for to, name in (("onnx", "m.onnx"), ("torch", "m.pt2")):
            with pytest.raises(OSError, match=r"--out must be on a disk with space .*: No space left"):
                export(classifier, to, out / name)
    monkeypatch.setattr(pytest.importorskip("openvino"), "save_model", Mock(side_effect=RuntimeError("ios")))
    with pytest.raises(OSError, match="--out must be a file that OpenVINO can write, got ios"):
        export(classifier, "openvino", out / "m.xml")
    assert not list(out.iterdir())


def damaged(name):
    def write(path):
        tensors = load_file(path / "model.safetensors")
        if name == "NaN":
            tensors["classifier.dense.bias"][0] = float("nan")
        else:
            tensors["classifier.base_layer.bias"] = tensors.pop("classifier.dense.bias")
        save_file(tensors, path / "model.safetensors")

    return write


FOLDERS = {
    "no tokenizer": (
        lambda path: [(path / n).unlink() for n in ("vocab.txt", "tokenizer.json")],
        "contain tok",
    ),
    "BERT": (lambda path: edit(path, model_type="bert"), "must be an ELECTRA, got model_type 'bert'"),
    "no head": (lambda path: edit(path, architectures=["ElectraModel"]), "must name one of ElectraFor"),
    "no name": (lambda path: edit(path, architectures=None), "must name one of ElectraFor"),
    "slots": (lambda path: edit(path, slot_labels=5), "slot_labels must be of type list, got 5"),
    "an adapter": (lambda path: (path / "adapter_config.json").touch(), "merge it first"),
    "NaN": (damaged("NaN"), "must have finite weights, got NaN"),
    "LoRA": (damaged("LoRA"), "must fit config.json"),
    "another head": (lambda path: recipe_of_tags(path), "must have the head of tag, the task in its recipe"),
    "a run in progress": (
        lambda path: running(path),
        "must have a model, got a run without one; pretr",
    ),
    "few rows": (lambda path: more_pieces(path, len(PIECES)), "must have .* rows in its word table"),
}


def recipe_of_tags(path):
    (path / "recipe.json").write_text(
        json.dumps({"task": "tag", "model": str(path), "train": [str(path)], "dev": [str(path)]})
    )


def running(path):
    (path / "config.json").unlink()
    (path / "recipe.json").write_text("{}")


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_refused(name, classifier, tmp_path):
    change, message = FOLDERS[name]
    change(classifier)
    with pytest.raises((ValueError, OSError), match=message):
        export(classifier, "onnx", tmp_path / "m.onnx")
    assert names(tmp_path) == {"model"}


CALLS = {
    "an unknown format": ({"to": "gguf"}, "--to must be one of onnx, openvino, torch, bert, got 'gguf'"),
    "another ending": ({"out": "m.pt2"}, "--out must end in .onnx"),
    "no name": ({"out": ""}, "--out must end in .onnx"),
    "a file as the folder": ({"out": "file/m.onnx"}, "--out must be a folder that can be created"),
    "int8 for torch": ({"to": "torch", "out": "m.pt2", "int8": True}, r"hf.patch\(model, int8=True\)"),
    "int8 for OpenVINO": ({"to": "openvino", "out": "m.xml", "int8": True}, "use --to onnx"),
    "a limit": ({"limit": float("nan")}, "--limit must be in"),
    "an unknown option": ({"max_length": 5}, "options must be of glue, .*, got max_length"),
    "no items": ({"items": 0}, "--items must be 1 or more"),
    "no data": ({"data": "absent.csv"}, "--data must be on this machine"),
    "no model": ({"model": "absent"}, "--model must be on this machine"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_refused(name, classifier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    given, message = CALLS[name]
    with pytest.raises((ValueError, OSError, TypeError), match=message):
        export(**({"model": classifier, "to": "onnx", "out": "m.onnx"} | given))
    assert names(tmp_path) == {"model", "file"}


def test_a_model_in_memory_is_refused_with_its_remedy(classifier, tmp_path):
    from electra_fast import hf

    loaded = transformers.ElectraForSequenceClassification.from_pretrained(classifier)
    with pytest.raises(ValueError, match=r"must be a folder, got .*; save_pretrained"):
        export(loaded, "onnx", tmp_path / "m.onnx")
    patched = hf.patch(loaded)
    with pytest.raises(ValueError, match=r"undo\(\) the patch, then save_pretrained"):
        export(loaded, "onnx", tmp_path / "m.onnx")
    patched.undo()
    loaded.peft_config = {}
    with pytest.raises(ValueError, match="merge the adapter first"):
        export(loaded, "onnx", tmp_path / "m.onnx")


def test_a_missing_package_is_named(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install electra_fast\[export\]"):
        export(classifier, "onnx", tmp_path / "m.onnx")


def test_the_code_of_the_page_runs(classifier, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    export(classifier, "onnx", tmp_path / "runs" / "banking.onnx")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert set(names["classify"](["red cat", "rain"])) <= set(LABELS[SequenceClassifier])


def test_the_command(classifier, tmp_path, capsys):
    out, file = str(tmp_path / "m.onnx"), tmp_path / "dev.csv"
    file.write_text("red cat,positive\nthe dog,neutral\n")
    more = ["--data", str(file), "--columns", "text", "label"]
    __main__.main(["export", "--model", str(classifier), "--to", "onnx", "--out", out, *more])
    printed = capsys.readouterr().out
    assert "2 texts of" in printed
    assert "task classify, 3 labels" in printed and "largest error" in printed and f"{out}: 0." in printed
    with pytest.raises(SystemExit, match="error: export: --out must be new"):
        __main__.main(["export", "--model", str(classifier), "--to", "onnx", "--out", out])
