"""The user's cache folder, and the hashes that name the files in it after their sources."""

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from electra_fast.local import regular_file


def cache_folder() -> Path:
    """Return ``electra_fast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; RuntimeError if there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "electra_fast").expanduser()


@contextlib.contextmanager
def writable_cache() -> Iterator[Path]:
    """Yield `cache_folder`, or a temporary folder with a warning if that cannot be written."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        with tempfile.TemporaryDirectory(prefix="electra_fast-") as temporary:
            warnings.warn(
                f"the cache folder cannot be written ({error}); only this process will use {temporary}. "
                "Set XDG_CACHE_HOME to a folder that can be written",
                stacklevel=4,
            )
            yield Path(temporary)
    else:
        yield folder


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hashing(documents: Iterable[str], digest) -> Iterator[str]:
    """Yield the documents, each after it was added to `digest`."""
    for document in documents:
        data = document.encode()
        digest.update(b"%d:" % len(data))  # Without lengths, two corpora could have the same bytes.
        digest.update(data)
        yield document


def text_hash(documents: Iterable[str]) -> tuple[str, int]:
    """Return the hash of a corpus and its number of characters."""
    digest = hashlib.sha256()
    characters = sum(len(document) for document in hashing(documents, digest))
    return digest.hexdigest(), characters


def cached(key: str, make: Callable[[], str]) -> str:
    """Return ``make()``, or its result of an earlier call from the user's cache folder if that is usable.

    A key contains a version number, to be increased when ``make`` changes.
    """
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: no home
        checksum, text = regular_file(cache_folder() / sha256(key)[:32]).read_text("utf-8").split("\n", 1)
        if checksum == sha256(text):
            return text
    text = make()
    with contextlib.suppress(OSError, RuntimeError):
        file = cache_folder() / sha256(key)[:32]
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{sha256(text)}\n{text}", "utf-8")
        os.replace(temporary, file)  # Another process sees all of the file or nothing.
    return text
