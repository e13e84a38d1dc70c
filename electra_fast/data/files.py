"""What is kept between runs, in the user's cache folder, under hashes of what it is made of."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "electra_fast").expanduser()


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hashing(documents: Iterable[str], digest) -> Iterator[str]:
    """Yield the documents, each once it is in `digest`: with its length, so that no two corpora share one."""
    for document in documents:
        data = document.encode()
        digest.update(b"%d:" % len(data))
        digest.update(data)
        yield document


def text_hash(documents: Iterable[str]) -> tuple[str, int]:
    """Return the hash of a corpus, and how many characters it has."""
    digest = hashlib.sha256()
    characters = sum(len(document) for document in hashing(documents, digest))
    return digest.hexdigest(), characters


def cached(key: str, make: Callable[[], str]) -> str:
    """Return ``make()``, kept in the user's cache folder where there is one that can be used.

    The number in a key is to be raised when its recipe changes.
    """
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: no home
        checksum, text = (cache_folder() / sha256(key)[:32]).read_text("utf-8").split("\n", 1)
        if checksum == sha256(text):
            return text
    text = make()
    with contextlib.suppress(OSError, RuntimeError):
        file = cache_folder() / sha256(key)[:32]
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{sha256(text)}\n{text}", "utf-8")
        os.replace(temporary, file)  # so another process sees all of it or nothing
    return text
