"""`export`: from a folder to a file that was run and compared before it got its name."""

import contextlib
import errno
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from electra_fast import data, local
from electra_fast.errors import must
from electra_fast.export import as_bert, onnx, openvino, torch_export
from electra_fast.export.check import Difference, arrays, check, expected
from electra_fast.export.engine import Engine, as_logits, run
from electra_fast.export.int8 import Measure, Quantized, quantize
from electra_fast.export.model import Source, package, read_source
from electra_fast.export.texts import Texts, encode, manual_texts, read_texts, spread
from electra_fast.train.fine_tune_recipe import FILE_OPTIONS

OUT = "export: --out"
CHECKED = 64  # texts of the self-check
ITEMS, LIMIT = 1000, 0.5  # the defaults for int8
BERT = "bert"  # --as-bert on the command line


class Format(NamedTuple):
    """A format of exported models."""

    endings: tuple[str, ...]  # of its files, the first one that of --out; none: a folder
    packages: tuple[str, ...]
    write: Callable[[Source, Path], Engine]  # writes the files and returns what runs them


FORMATS = {
    "onnx": Format((".onnx",), ("onnx", "onnxruntime"), onnx.write),
    "openvino": Format((".xml", ".bin"), ("onnx", "openvino"), openvino.write),
    "torch": Format((".pt2",), (), torch_export.write),
    BERT: Format((), (), as_bert.write),
}


class Export(NamedTuple):
    """What was written, and how right it is."""

    files: list[Path]  # that of --out first
    difference: Difference  # of the model in float32
    quantized: Quantized | None


def export(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    int8: bool = False,
    data: str | Path | Sequence[str | Path] = (),
    limit: float = LIMIT,
    items: int = ITEMS,
    **options: Any,
) -> Export:
    """Write a discriminator with its head as a file for another engine, and its tokenizer next to it.

    The files get their names after the exported model has given the logits of this package's model.

    Args:
        model: a fine-tuned folder, a run of pre-training, or a folder of transformers' ElectraForX.
        to: onnx, openvino, torch, or bert for a folder with the names of transformers' BertModel.
        out: the new file, with the ending of the format; for bert a new folder.
        int8: quantise an ONNX file; the units that lose too much stay in float.
        data: files of the model's task for the check and for int8; default: those on which the run was
            evaluated, else Python's manual.
        limit: the largest loss of int8, in points of the task's metric, without labels in percent of changed
            predictions.
        items: the largest number of items of the files on which the loss of int8 is measured.
        options: fields of `FineTuneRecipe` about files and lengths.

    Raises:
        ValueError: an argument is wrong, or the exported model is.
        OSError: a file cannot be read or written.
        ImportError: a package is not installed.
    """
    require(to, int8, limit, items, options)
    for name in ("transformers", "tokenizers", *FORMATS[to].packages):
        package(name)
    out = Path(out)
    with new_files(out, FORMATS[to]) as folder:
        source = read_source(model, options)
        if to == BERT:
            as_bert.require(source)
        else:
            save_tokenizer(source, tokenizer_of(folder / out.name), tokenizer_of(out))
        paths = [data] if isinstance(data, str | Path) else data
        found = read_texts(source, paths, items if int8 else CHECKED)
        print(introduction(source, found), flush=True)
        file = folder / out.name
        engine = FORMATS[to].write(source, file)
        difference = self_check(engine, as_bert.encoder_of(source) if to == BERT else source, found)
        quantized = quantize(file, Measure(source, found, engine), limit) if int8 else None
    files = [path for path in (*files_of(out, FORMATS[to]), tokenizer_of(out)) if path.exists()]
    print(*(f"{path}: {size(path)}" for path in (*files, source.folder / "model.safetensors")), sep="\n")
    return Export(files, difference, quantized)


def require(to: str, int8: bool, limit: float, items: int, options: Mapping[str, Any]) -> None:
    """Check the arguments of `export` that are not files."""
    if to not in FORMATS:
        raise ValueError(must("export: --to", f"be one of {', '.join(FORMATS)}", repr(to)))
    if int8 and to != "onnx":
        remedy = {"torch": "hf.patch(model, int8=True) computes in int8 in PyTorch"}.get(to, "use --to onnx")
        raise ValueError(must("export: --int8", f"be left out with --to {to}", "--int8", remedy))
    if not 0 <= limit <= 100:
        raise ValueError(must("export: --limit", "be in [0, 100]", limit))
    if items < 1:
        raise ValueError(must("export: --items", "be 1 or more", items))
    if unknown := sorted(options.keys() - set(FILE_OPTIONS)):
        raise TypeError(must("export: options", f"be of {', '.join(FILE_OPTIONS)}", ", ".join(unknown)))


def files_of(out: Path, format_: Format) -> list[Path]:
    """Return the files of a format: `out` and those next to it."""
    return [out, *(out.with_suffix(ending) for ending in format_.endings[1:])]


def tokenizer_of(out: Path) -> Path:
    return out.with_suffix(".tokenizer.json")


@contextlib.contextmanager
def new_files(out: Path, format_: Format) -> Iterator[Path]:
    """Yield a temporary folder next to `out`; its files are moved there if no error is raised.

    Raises:
        ValueError: `out` has another ending, or a file exists.
        OSError: the folder cannot be written.
    """
    ending = format_.endings[0] if format_.endings else ""
    if not out.name or (ending and out.suffix != ending):
        rule = f"end in {ending}" if ending else "name a folder"
        raise ValueError(must(OUT, rule, repr(str(out))))
    for path in files_of(out, format_):
        if path.exists():
            raise ValueError(must(OUT, "be new", f"{path}, which exists", "remove it or use another name"))
    local.new_folder(OUT, out.parent)
    try:
        temporary = tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-")
    except OSError as error:
        raise OSError(must(OUT, "be in a writable folder", f"{out.parent}: {error.strerror}")) from None
    with temporary as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            got = f"{out.parent}: {error.strerror}"
            raise OSError(must(OUT, "be on a disk with space for the files", got)) from None
        written = sorted(Path(folder).iterdir(), key=lambda path: path.name == out.name)
        for path in written:  # `out` is the last one, so it exists only with the others
            path.replace(out.with_name(path.name))


def save_tokenizer(source: Source, file: Path, existing: Path) -> None:
    """Write a file of `tokenizers` that makes the inputs of the model, padded and cut off at its length.

    Raises:
        ValueError: `existing` exists and is another tokenizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        data.save_tokenizer(source.tokenizer, folder)
        tokenizer = package("tokenizers").Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(source.head.config.max_positions)
    tokenizer.enable_padding(pad_id=source.pad_id, pad_token="[PAD]")
    tokenizer.save(str(file))
    if existing.exists() and existing.read_bytes() != file.read_bytes():
        got, remedy = f"{existing}, that of another model", "remove it or use another name"
        raise ValueError(must(f"{OUT}: the tokenizer", "be new", got, remedy))


def introduction(source: Source, texts: Texts) -> str:
    """Return what is exported, in one line."""
    metadata = source.metadata()
    labels = f", {len(json.loads(metadata['labels']))} labels" if "labels" in metadata else ""
    name = f"{source.folder}: {metadata['architecture']}, task {metadata['task']}{labels}"
    return f"{name}; {len(texts.items):,} texts of {texts.name}"


def self_check(engine: Engine, source: Source, texts: Texts) -> Difference:
    """Compare an engine with the model of this package on the texts; if they are few, on others too.

    Raises:
        ValueError: they differ by more than rounding.
    """
    items = spread(texts.items, CHECKED)
    parts = [encode(source, items)]
    if len(items) < CHECKED:
        parts.append(manual_texts(source, CHECKED).examples)
    found = []
    for examples in parts:
        results = run(engine, source.outputs, examples, source.pad_id)
        found.append(check(arrays(as_logits(source.head, results)), expected(source.head, examples)))
    sequences = sum(len(examples.offsets) - 1 for examples in parts)
    print(f"self-check on {sequences:,} sequences in padded batches: {max(found)}", flush=True)
    return max(found)


def size(path: Path) -> str:
    """Return the size of a file, or of the files in a folder."""
    parts = [path] if path.is_file() else path.iterdir()
    return f"{sum(part.stat().st_size for part in parts) / 1e6:.2f} MB"
