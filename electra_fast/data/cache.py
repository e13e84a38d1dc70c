"""The token cache: the ids of a corpus in a memory-mapped file, so that the corpus may exceed the memory.

The file has the safetensors format, which other programs can read:

    ids      uint16 if the vocabulary fits, else int32; padded with zeros to a multiple of 8 bytes
    lines    int64, the offset of each line, and the end
    offsets  int64, the offset of each document, and the end

Its metadata contain the hashes of the text and of the vocabulary, which also make the file's name, and
`sha256`, the hash of these arrays and of the other metadata: a file that was truncated or changed is refused.
"""

import hashlib
import json
import os
import sys
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from electra_fast.data.cache_folder import hashing, locked, remembered, sha256, writable_cache
from electra_fast.data.encoded import Encoded, encode_into
from electra_fast.data.text import corpus_hash
from electra_fast.data.unknown import Unknown, UnknownCounter
from electra_fast.data.wordpiece import vocab_hash
from electra_fast.data.words import WordEncoder
from electra_fast.errors import must
from electra_fast.local import regular_file

FORMAT = "electra_fast tokens 2"
# Bytes reserved for the header, which is written last: it needs 900, and up to 1,700 more for unknown words.
HEADER = 4096


def tokenize(
    documents: Iterable[str],
    tokenizer,
    folder: str | os.PathLike | None = None,
    progress: bool = True,
    verify: bool = False,
) -> Encoded:
    """Return memory-mapped token ids of documents, from the cache if they are there.

    This is `encode` for a corpus of any size. Documents that can be read twice are hashed first, and
    tokenized only if ``folder`` (None: ``electra_fast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``) has no file
    of that text and vocabulary; of several processes one works and the others wait. The documents of a
    generator are tokenized each time. ``progress`` shows a bar on a terminal. Lines and documents need 8
    bytes of memory each, tokens none. Files of the same names, sizes and times as in an earlier call are not
    hashed again, unless ``verify`` is true.

    The ids stay mapped if the file is removed or replaced; if it is truncated in place, the process ends with
    SIGBUS. If the default folder cannot be written, a warning says so, and the ids are in a temporary file
    that only this process uses.

    Raises:
        OSError: ``folder`` cannot be written.
        ValueError: the documents contain no token.
    """
    if folder is None:
        with writable_cache() as folder:  # A temporary file is removed, but stays mapped.
            return tokenize(documents, tokenizer, folder, progress, verify)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(documents, Iterator):
        shown = _with_bar(documents, None, progress)
        return open_cache(_build(folder / f"{uuid.uuid4()}.part", shown, tokenizer), tokenizer)
    text, characters = corpus_hash(documents, verify)
    file = folder / _name(text, vocab_hash(tokenizer))
    with locked(file.with_suffix(".lock")) as alone:
        if file.exists():
            try:
                return open_cache(file, tokenizer, verify)
            except ValueError as error:
                warnings.warn(f"{error}; it is built again", stacklevel=2)
        shown = _with_bar(documents, characters, progress)
        part = file.with_suffix(".part") if alone else folder / f"{uuid.uuid4()}.part"
        return open_cache(_build(part, shown, tokenizer), tokenizer)


def open_cache(file: str | os.PathLike, tokenizer=None, verify: bool = True) -> Encoded:
    """Map a file that `tokenize` wrote, after reading all of it once to check that it is complete.

    If ``verify`` is false, a file of the same name, size and time as in an earlier call is not read again.

    Raises:
        ValueError: it is damaged, of another format, or made with another vocabulary than ``tokenizer``'s.
    """
    facts, tensors = open_arrays(file, verify)
    if tokenizer is not None and facts["vocab"] != vocab_hash(tokenizer):
        raise _refusal(file, "tokenized with another vocabulary")
    ids = tensors["ids"][: int(facts["tokens"])]
    hashes = {name: facts[name] for name in ("text", "vocab")}
    return Encoded(ids, tensors["offsets"], tensors["lines"], **hashes, unknown=unknown_of(facts))


def open_arrays(file: str | os.PathLike, verify: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the mapped arrays of a file that `write_tokens` wrote; see `open_cache`.

    Raises:
        ValueError: it is damaged or of another format.
    """
    safe_open, SafetensorError = _safetensors()
    regular_file(Path(file), "open_cache")
    try:
        with safe_open(file, "pt", device="cpu") as opened:
            facts = opened.metadata() or {}
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            layout = {name: (found.get_dtype(), *found.get_shape()) for name, found in slices.items()}
            tensors = {name: opened.get_tensor(name) for name in slices}
    except SafetensorError as error:
        raise _refusal(file, f"damaged, {error}") from None
    if facts.get("format") != FORMAT:
        raise _refusal(file, f"must have the format {FORMAT!r}, got {facts.get('format')!r}")

    def seal() -> str:
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(tensors[name].numpy())
        return _seal(digest, {name: fact for name, fact in facts.items() if name != "sha256"})

    found = remembered("tokens 1", [Path(file)], seal, again=verify)
    # Only metadata with the right checksum can safely be read as numbers.
    if found != facts.get("sha256") or layout != _layout(facts):
        raise _refusal(file, "damaged, its SHA-256 is not the one that was written")
    return facts, tensors


def unknown_of(facts: dict[str, str]) -> Unknown:
    """Return the share of [UNK] from the metadata of a file."""
    numbers, words = json.loads(facts["unknown"])
    return Unknown(int(facts["tokens"]), *numbers, tuple(map(tuple, words)))


def _refusal(file: str | os.PathLike, reason: str) -> ValueError:
    return ValueError(f"open_cache: {file}: {reason}; delete it and tokenize again")


def _safetensors():
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("tokenize: the token cache needs a package: pip install safetensors") from None
    return safe_open, SafetensorError


def _name(text: str, vocab: str) -> str:
    return sha256(f"{FORMAT} {text} {vocab}")[:32] + ".safetensors"


def _seal(digest, facts: dict[str, str]) -> str:
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _layout(facts: dict[str, str]) -> dict[str, tuple[str, int]]:
    """Return dtype and length of each array, in the order of the file."""
    dtype, ids_per_8_bytes = ("U16", 4) if int(facts["vocab_size"]) <= 1 << 16 else ("I32", 2)
    tokens = -(-int(facts["tokens"]) // ids_per_8_bytes) * ids_per_8_bytes
    lines, documents = int(facts["lines"]), int(facts["documents"])
    return {"ids": (dtype, tokens), "lines": ("I64", lines + 1), "offsets": ("I64", documents + 1)}


def _header(facts: dict[str, str]) -> bytes:
    header, end = {"__metadata__": facts}, 0
    for name, (dtype, length) in _layout(facts).items():
        start, end = end, end + length * {"U16": 2, "I32": 4, "I64": 8}[dtype]
        header[name] = {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
    size = HEADER - 8
    return size.to_bytes(8, "little") + json.dumps(header).encode().ljust(size)


def _build(part: Path, documents: Iterable[str], tokenizer) -> Path:
    """Write the file under the name `part` until it is complete; return its final path."""
    facts = write_tokens(part, documents, tokenizer, WordEncoder(tokenizer))
    if facts["tokens"] == "0":
        part.unlink()
        raise ValueError(must("tokenize: documents", "contain a token", "none"))
    return part.replace(part.with_name(_name(facts["text"], facts["vocab"])))


def write_tokens(part: Path, documents: Iterable[str], tokenizer, encoder: WordEncoder) -> dict[str, str]:
    """Write a file in the format of the cache, complete and on the disk; return its metadata.

    It is removed after an error.
    """
    _safetensors()  # A missing package is reported before the work, not after it.
    text, payload = hashlib.sha256(), hashlib.sha256()
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32

    def write(data) -> None:
        payload.update(data)
        file.write(data)

    try:
        with open(part, "wb") as file:
            file.write(bytes(HEADER))
            hashed = hashing(documents, text)
            counter = UnknownCounter(tokenizer)
            offsets, lines = encode_into(lambda ids: write(ids.astype(dtype)), hashed, encoder, counter)
            facts = {"format": FORMAT, "text": text.hexdigest(), "vocab": vocab_hash(tokenizer)}
            counts = {"tokens": lines[-1], "lines": len(lines) - 1, "documents": len(offsets) - 1}
            facts |= {name: str(count) for name, count in counts.items()} | {"vocab_size": str(vocab_size)}
            _, *numbers, words = counter.result()
            facts["unknown"] = json.dumps([numbers, words])
            write(np.zeros(_layout(facts)["ids"][1] - lines[-1], dtype))
            write(lines)
            write(offsets)
            facts["sha256"] = _seal(payload, facts)
            file.seek(0)
            file.write(_header(facts))
            file.flush()
            os.fsync(file.fileno())
        return facts
    except BaseException:  # including an interrupt
        part.unlink(missing_ok=True)
        raise


def _with_bar(documents: Iterable[str], characters: int | None, progress: bool) -> Iterator[str]:
    if not (progress and sys.stderr.isatty()):
        yield from documents
        return
    from tqdm import tqdm

    with tqdm(desc="tokenize", total=characters, unit=" characters", unit_scale=True) as bar:
        for document in documents:
            yield document
            bar.update(len(document))
