"""Tokenize a corpus into a folder of tokens, with several processes, on one machine or several.

The documents are cut into shards by the length of their text, so neither the number of processes nor their
speed changes a byte. The parent reads the text and hands each shard to a worker. A shard is complete or
absent: the same command continues after a kill.

Rank r of W, as torchrun numbers its processes, makes the shards r, W + r, 2W + r, … in a folder that all
ranks share. They do not communicate: each that finds all shards complete at its end writes the same manifest.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from electra_fast import local
from electra_fast.data import tokens_folder
from electra_fast.data.cache import open_arrays, unknown_of, write_tokens
from electra_fast.data.cache_folder import hashing, text_hash
from electra_fast.data.text import Documents
from electra_fast.data.tokens_folder import MANIFEST, TOKENIZER, shard_name
from electra_fast.data.unknown import LIMIT, Unknown, require_known, total
from electra_fast.data.wordpiece import save_tokenizer, vocab_hash
from electra_fast.data.words import WordEncoder
from electra_fast.data.workers import results
from electra_fast.errors import must

SHARD = 1 << 25  # characters of a shard, which the parent and each worker have in the memory
DOCUMENT = 64  # characters that a document counts in addition, because its string needs memory too


@dataclass
class Work:
    """What a call of `tokenize_folder` did."""

    shards: int = 0  # made by this call
    text_bytes: int = 0
    seconds: float = 0.0
    missing: int = 0  # shards of other ranks that are not complete
    was_complete: bool = False


def tokenize_folder(
    documents: Documents,
    tokenizer,
    out: str | os.PathLike,
    *,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
    allow_unknown: bool = False,
    progress: bool = True,
) -> Work:
    """Write the tokens of documents into a folder, or continue there; `tokens_folder.open_tokens` maps them.

    Raises:
        OSError: the folder cannot be written, another process works in it, or a worker failed. The complete
            shards stay.
        ValueError: the folder has other files, or tokens of another text or vocabulary; or too much of the
            text is [UNK], unless ``allow_unknown`` is true.
    """
    out, work, start = Path(out), Work(), time.monotonic()
    local.new_folder("tokenize: --out", out)
    with _locked(out, rank):
        facts = _claimed(out, tokenizer, rank)
        sources = _sources(documents)
        if _is_complete(out, sources):
            work.was_complete = True
            return work
        texts, digest = [], hashlib.sha256()
        made = results(
            _jobs(hashing(documents, digest), out, texts, facts["vocab"], rank, world),
            workers,
            _prepare,
            tokenizer.to_str(),
        )
        unknown = []
        with contextlib.closing(made), _bar(progress) as show:
            for size, of_shard in made:
                work.text_bytes += size
                show(size)
                unknown.append(of_shard)
                if not allow_unknown:
                    _warn_of_unknown(unknown)
        work.shards = len(unknown)
        files = [out / shard_name(number) for number in range(len(texts))]
        work.missing = sum(not file.exists() for file in files)
        if not work.missing:
            _require_no_more(out, len(texts))
            described = tokens_folder.describe(out, texts, rank)
            if not described["tokens"]:
                raise ValueError(must("tokenize: --data", "contain a token", "none"))
            if not allow_unknown:
                require_known(tokens_folder.unknown_of(described), tokenizer, "--data", "tokenize")
            facts |= {"text": digest.hexdigest(), "sources": sources} | described
            tokens_folder.write_manifest(out, facts, rank)
    work.seconds = time.monotonic() - start
    return work


@contextlib.contextmanager
def _locked(out: Path, rank: int) -> Iterator[None]:
    """Hold the lock of a rank in a folder; on a file system without locks only warn."""
    import fcntl  # not on Windows

    with open(out / f".lock-{rank}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OSError(f"tokenize: another process tokenizes into {out}; wait until it ends") from None
            text = f"tokenize: {out} cannot be locked ({error.strerror})"
            warnings.warn(f"{text}; make sure that no other process tokenizes into it", stacklevel=3)
        yield


def _claimed(out: Path, tokenizer, rank: int) -> dict[str, Any]:
    """Return the first part of the manifest, after writing it and the tokenizer into a new folder."""
    facts = {"format": tokens_folder.FORMAT, "vocab": vocab_hash(tokenizer)}
    if (out / MANIFEST).exists():
        if tokens_folder.read_manifest(out)["vocab"] != facts["vocab"]:
            remedy = "name another folder, or delete this one"
            rule = "have no tokens of another vocabulary"
            raise ValueError(must("tokenize: --out", rule, out, remedy))
    elif others := sorted(file.name for file in out.iterdir() if not _is_ours(file.name)):
        rule = "be a new folder or a folder of tokens"
        raise ValueError(must("tokenize: --out", rule, f"{out}, which contains {others[0]}"))
    else:
        tokens_folder.write_manifest(out, facts, rank)
    if not (out / TOKENIZER).exists():
        part = out / f"{TOKENIZER}.{rank}.part"
        try:
            save_tokenizer(tokenizer, part)
        except Exception as error:  # tokenizers has no class of error for a full disk
            raise OSError(must(f"tokenize: {part}", "be writable", error)) from error
        with contextlib.suppress(OSError):  # Another rank has written it.
            part.rename(out / TOKENIZER)
        shutil.rmtree(part, ignore_errors=True)
    tokens_folder.tokenizer_of(out)
    return facts


def _is_ours(name: str) -> bool:
    named = (TOKENIZER, tokens_folder.LINES, tokens_folder.OFFSETS)
    return name in named or name.startswith((".lock-", "tokens-")) or name.endswith(".part")


def _sources(documents: Documents) -> list[Any]:
    """Return what identifies the text without reading it: the options, and each file's size and time."""
    files = [(str(file.absolute()), file.stat()) for file in documents.files or ()]
    described = [{"path": name, "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for name, s in files]
    return [{"text_column": documents.text_column, "blanks_separate": documents.blanks_separate}, *described]


def _is_complete(out: Path, sources: list[Any]) -> bool:
    manifest = tokens_folder.read_manifest(out)
    if manifest.get("sources") != sources or len(sources) == 1:
        return False
    try:
        tokens_folder.check_files(out, manifest)
    except (FileNotFoundError, ValueError):  # It is made again.
        return False
    return True


def _jobs(
    documents: Iterable[str], out: Path, texts: list[str], vocab: str, rank: int, world: int
) -> Iterator[tuple[Path, list[str]]]:
    """Yield the shards to make, each with its file; append the hash of every shard to `texts`."""
    for number, shard in enumerate(_shards(documents)):
        text, _ = text_hash(shard)
        texts.append(text)
        file = out / shard_name(number)
        if number % world == rank and not _is_made(file, text, vocab):
            for part in out.glob(f"{file.name}.*.part"):  # of a process that was killed
                part.unlink(missing_ok=True)
            yield file, shard


def _shards(documents: Iterable[str]) -> Iterator[list[str]]:
    shard, size = [], 0
    for document in documents:
        shard.append(document)
        size += len(document) + DOCUMENT
        if size >= SHARD:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _is_made(file: Path, text: str, vocab: str) -> bool:
    """Return whether a shard is complete; a ValueError if it is of another text or vocabulary."""
    if not file.exists():
        return False
    try:
        facts, _ = open_arrays(file)
    except ValueError as error:
        warnings.warn(f"{error}; it is made again", stacklevel=2)
        return False
    tokens_folder.require_same(file, facts, text, vocab)
    return True


def _warn_of_unknown(shards: list[Unknown]) -> None:
    """Warn when too much of the shards so far is [UNK], before hours of work."""
    now = total(shards)
    if now.share > LIMIT >= total(shards[:-1]).share:
        text = f"tokenize: {now}, so far; with more than {LIMIT:.0%} at the end it will be an error"
        warnings.warn(f"{text} without --allow-unknown", stacklevel=3)


def _require_no_more(out: Path, count: int) -> None:
    more = sorted(file for file in out.glob("tokens-*.safetensors") if file.name >= shard_name(count))
    if more:
        remedy = "name another folder with --out, or delete this one"
        raise ValueError(f"{more[0]}: the tokens of a longer text; {remedy}")


def _prepare(tokenizer_json: str) -> Callable[[tuple[Path, list[str]]], tuple[int, Unknown]]:
    """Return the function of a worker: it writes a shard and returns the bytes of its text, and its [UNK]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    encoder = WordEncoder(tokenizer)

    def make(job: tuple[Path, list[str]]) -> tuple[int, Unknown]:
        file, documents = job
        part = file.with_name(f"{file.name}.{uuid.uuid4()}.part")
        facts = write_tokens(part, documents, tokenizer, encoder)
        part.replace(file)
        return sum(len(document.encode()) for document in documents), unknown_of(facts)

    return make


@contextlib.contextmanager
def _bar(progress: bool) -> Iterator[Callable[[int], Any]]:
    if not (progress and sys.stderr.isatty()):
        yield lambda size: None
        return
    from tqdm import tqdm

    with tqdm(desc="tokenize", unit="B", unit_scale=True) as bar:
        yield bar.update
