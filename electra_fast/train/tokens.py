"""The command `tokenize`: a corpus of any size becomes a folder of tokens for `pretrain --data`."""

import os
import signal
import sys
from pathlib import Path

from electra_fast import data
from electra_fast.errors import must
from electra_fast.train import corpus, interruption
from electra_fast.train.recipe import TokenizeRecipe


def tokenize(recipe: TokenizeRecipe, out: str, workers: int | None) -> str:
    """Make a folder of tokens, or continue there; return the last line for the user.

    Raises:
        ValueError, OSError: see `data.tokenize_folder`; or an option is wrong.
    """
    recipe, folder = recipe.resolved(), Path(out)
    rank, world = (_number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if rank >= world:
        raise ValueError(must("tokenize: RANK", f"be less than WORLD_SIZE, {world}", rank))
    if out == "":
        raise ValueError(must("tokenize: --out", "name a folder", "''"))
    if workers is None:
        workers = max(1, (os.cpu_count() or 1) // max(1, _number("LOCAL_WORLD_SIZE", 1)))
    if workers < 1:
        raise ValueError(must("tokenize: --workers", "be 1 or more", workers))
    if tokens := [path for path in recipe.data if data.is_tokens_folder(path)]:
        raise ValueError(must("tokenize: --data", "name text", f"{tokens[0]}, a folder of tokens"))
    documents = corpus.documents(recipe, recipe.data)
    tokenizer = corpus.new_tokenizer(recipe)

    def stop(number: int) -> None:
        print(
            f"{signal.Signals(number).name}: {out} is not complete; the same command continues",
            file=sys.stderr,
        )
        raise SystemExit(128 + number)

    with interruption.noted(stop):
        work = data.tokenize_folder(
            documents,
            tokenizer,
            folder,
            workers=workers,
            rank=rank,
            world=world,
            allow_unknown=recipe.allow_unknown,
        )
    return _summary(folder, work, documents.note)


def _summary(folder: Path, work: data.Work, note: str | None) -> str:
    if work.missing:
        return f"{folder}: {work.shards} shards made; {work.missing} of other ranks are not complete yet"
    manifest = data.read_manifest(folder)
    counts = "{tokens:,} tokens, {documents:,} documents".format(**manifest)
    shards = f"{len(manifest['shards'])} shard{'s' * (len(manifest['shards']) > 1)}"
    speed = f"{work.text_bytes / 1e6 / work.seconds:.1f} MB/s" if work.shards else "complete before"
    line = f"{folder}: {counts}, {shards}, {speed}; {data.unknown_of(manifest)}"
    return f"{line}; {note}" if note else line


def _number(name: str, default: int) -> int:
    """Return an environment variable that torchrun sets."""
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise ValueError(must(f"tokenize: {name}", "be a number", repr(value)))
    return int(value)
