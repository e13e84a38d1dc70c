"""Files: which may be read, and what is kept in the user's cache folder, under hashes of its sources."""

import contextlib
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def regular(path: Path) -> Path:
    """Return `path` if it is a regular file; opening a FIFO would wait for a writer.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is something else.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: must be a file or a folder, got a path with nothing there"
        ) from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: must be a regular file, got {KINDS.get(stat.S_IFMT(mode), 'another')}")
    return path


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
                f"the cache folder cannot be written ({error}); {temporary} is used for this process alone. "
                "Set XDG_CACHE_HOME to a folder that can be written",
                stacklevel=4,
            )
            yield Path(temporary)
    else:
        yield folder


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
        checksum, text = regular(cache_folder() / sha256(key)[:32]).read_text("utf-8").split("\n", 1)
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
