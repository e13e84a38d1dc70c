"""A folder of tokens: a corpus of any size in shards, with a manifest of all its files.

    manifest.json               format, hashes of text and vocabulary, sources, and the files below
    tokenizer/                  the tokenizer, as Hugging Face reads it
    tokens-000000.safetensors   a shard: the format of `cache`, with some whole documents
    lines.bin, offsets.bin      int64, little-endian: the offsets of all lines and documents, and the end

The manifest names the size, the time and the SHA-256 of each file. It has its own SHA-256 and is written
last. A folder whose manifest has no shards is incomplete.
"""

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from electra_fast.data.cache import HEADER, open_arrays
from electra_fast.data.cache import unknown_of as unknown_of_shard
from electra_fast.data.encoded import Encoded
from electra_fast.data.parts import Parts
from electra_fast.data.unknown import Unknown, total
from electra_fast.data.wordpiece import load_tokenizer, vocab_hash
from electra_fast.errors import must
from electra_fast.local import json_object, regular_file

FORMAT = "electra_fast tokens folder 1"
COUNTS = ("tokens", "lines", "documents")
MANIFEST, TOKENIZER, LINES, OFFSETS = "manifest.json", "tokenizer", "lines.bin", "offsets.bin"
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes of this machine
AGAIN = "delete it and run tokenize again with the same --out"


def shard_name(number: int) -> str:
    return f"tokens-{number:06}.safetensors"


def is_tokens_folder(path: str | os.PathLike) -> bool:
    """Return whether a path is a folder of tokens, complete or not."""
    path = Path(path)
    is_one = (path / MANIFEST).exists() or (path / shard_name(0)).exists()
    return is_one and (path / TOKENIZER).is_dir()


def open_tokens(folder: str | os.PathLike, tokenizer=None, verify: bool = False) -> Encoded:
    """Map a folder that `tokenize_folder` made; its documents are those of the text, in order.

    The size and the time of each file must be those in the manifest. A file with another time, such as a
    copy, is read and accepted if its SHA-256 is right; ``verify`` reads all files. A page of a file is read
    when one of its tokens is first used.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder is incomplete, a file is damaged or not of this folder, or the vocabulary is
            not `tokenizer`'s; the message names the file and the remedy.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if "shards" not in manifest:
        raise ValueError(must(str(folder), "be complete", "a part of the shards", "run tokenize again"))
    if tokenizer is not None and vocab_hash(tokenizer) != manifest["vocab"]:
        remedy = f"leave it out to use {folder / TOKENIZER}, or tokenize the text again into another folder"
        rule = f"be the vocabulary of {folder}"
        raise ValueError(must("open_tokens: the tokenizer (--vocab)", rule, "another one", remedy))
    check_files(folder, manifest, verify)
    dtype = np.uint16 if manifest["vocab_size"] <= 1 << 16 else np.int32
    shards = [(folder / shard["name"], shard["tokens"]) for shard in manifest["shards"]]
    parts = Parts([np.memmap(file, dtype, "r", HEADER, (tokens,)) for file, tokens in shards])
    if len(parts) * np.dtype(dtype).itemsize > MEMORY // 2:
        parts.read_only_announced()
    lines = _mapped(folder / LINES, manifest["lines"] + 1, torch.int64)
    offsets = _mapped(folder / OFFSETS, manifest["documents"] + 1, torch.int64)
    hashes = {name: manifest[name] for name in ("text", "vocab")}
    return Encoded(parts, offsets, lines, **hashes, unknown=unknown_of(manifest))


def unknown_of(manifest: dict[str, Any]) -> Unknown:
    """Return the share of [UNK] from a manifest."""
    *numbers, words = manifest["unknown"]
    return Unknown(manifest["tokens"], *numbers, tuple(map(tuple, words)))


def tokenizer_of(folder: Path, **options: Any):
    """Return the tokenizer of a folder of tokens.

    Raises:
        ValueError: it is not the one with which the folder was made, or there are `options` of
            `load_tokenizer`, which it contains already.
    """
    tokenizer, manifest = load_tokenizer(folder / TOKENIZER, **options), read_manifest(folder)
    if vocab_hash(tokenizer) != manifest["vocab"]:
        remedy = f"restore it, or {AGAIN}"
        raise ValueError(
            must(str(folder / TOKENIZER), "be the tokenizer of the tokens", "another one", remedy)
        )
    return tokenizer


def _mapped(file: Path, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(str(file), shared=False, size=size, dtype=dtype, device="cpu")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        ValueError: it is damaged or of another format.
    """
    file = folder / MANIFEST
    manifest = json_object("tokens folder", file)
    if manifest.get("format") != FORMAT:
        raise ValueError(must(str(file), f"have the format {FORMAT!r}", repr(manifest.get("format"))))
    if manifest.pop("sha256", None) != _seal(manifest):
        raise ValueError(f"{file}: damaged, its SHA-256 is not the one that was written; {AGAIN}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any], writer: int) -> None:
    """Write the manifest under another name, which contains `writer`, and rename it."""
    with _writing(folder / MANIFEST, writer, time.time_ns()) as file:
        file.write(json.dumps(manifest | {"sha256": _seal(manifest)}, indent=1).encode())


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _writing(file: Path, writer: int, time_ns: int) -> Iterator[BinaryIO]:
    """Yield a file to write; it gets its time and its name when it is complete and on the disk."""
    part = file.with_name(f"{file.name}.{writer}.part")
    with open(part, "wb") as opened:
        yield opened
        opened.flush()
        os.fsync(opened.fileno())
    os.utime(part, ns=(time_ns, time_ns))
    part.replace(file)


def describe(folder: Path, texts: list[str], writer: int) -> dict[str, Any]:
    """Read the shards of a complete folder, write its index, and return what the manifest says about them.

    `texts` has the hash of each shard's text.

    Raises:
        ValueError: a shard is damaged, or of another text or vocabulary.
    """
    vocab, files = read_manifest(folder)["vocab"], [folder / shard_name(n) for n in range(len(texts))]
    last = max(file.stat().st_mtime_ns for file in files)  # so the index has the same time from each rank
    shards, unknown, tokens = [], [], 0
    with (
        _writing(folder / LINES, writer, last) as lines,
        _writing(folder / OFFSETS, writer, last) as offsets,
    ):
        for file in (lines, offsets):
            file.write(bytes(8))
        for file, text in zip(files, texts, strict=True):
            facts, arrays = open_arrays(file)
            require_same(file, facts, text, vocab)
            for index, name in ((lines, "lines"), (offsets, "offsets")):
                index.write((arrays[name].numpy()[1:] + tokens).astype("<i8").tobytes())
            tokens += int(facts["tokens"])
            counts = {name: int(facts[name]) for name in COUNTS}
            shards.append(counts | {"sha256": facts["sha256"], **_described(file)})
            unknown.append(unknown_of_shard(facts))
    return {
        "vocab_size": int(facts["vocab_size"]),
        **{name: sum(shard[name] for shard in shards) for name in COUNTS},
        "unknown": total(unknown)[1:],
        "index": [
            {"sha256": _sha256(folder / name), **_described(folder / name)} for name in (LINES, OFFSETS)
        ],
        "shards": shards,
    }


def _sha256(file: Path) -> str:
    with open(regular_file(file), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def require_same(file: Path, facts: dict[str, str], text: str, vocab: str) -> None:
    """Raise a ValueError if a shard is not of this text and vocabulary."""
    if facts["vocab"] != vocab:
        raise ValueError(f"{file}: tokenized with another vocabulary; {AGAIN}")
    if facts["text"] != text:
        remedy = "name another folder with --out, or delete this one"
        raise ValueError(f"{file}: the tokens of another text, or of another order of its files; {remedy}")


def check_files(folder: Path, manifest: dict[str, Any], verify: bool = False) -> None:
    """Check that the files of a folder are those in its manifest; see `open_tokens`."""
    entries = [*manifest["index"], *manifest["shards"]]
    with ThreadPoolExecutor() as pool:
        was_read = list(pool.map(lambda entry: _was_read(folder, entry, manifest["vocab"], verify), entries))
    if any(was_read) and not verify:
        warnings.warn(
            f"{folder}: {sum(was_read)} files were read as a whole, because their times are not those in the "
            "manifest, as after a copy. They are right. cp -a and rsync -t keep the times",
            stacklevel=3,
        )


def _was_read(folder: Path, entry: dict[str, Any], vocab: str, verify: bool) -> bool:
    """Check one file of a folder; return whether that needed all of it."""
    file = folder / entry["name"]
    if not file.exists():
        raise FileNotFoundError(f"{file}: missing; run tokenize again with the same --out")
    if not verify and _described(file).items() <= entry.items():
        return False
    if "tokens" in entry:
        facts, _ = open_arrays(file)
        require_same(file, facts, facts["text"], vocab)
        sha256 = facts["sha256"]
    else:
        sha256 = _sha256(file)
    if sha256 != entry["sha256"]:
        raise ValueError(f"{file}: not the file that was written, its SHA-256 differs; {AGAIN}")
    return True


def _described(file: Path) -> dict[str, Any]:
    found = file.stat()
    return {"name": file.name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
