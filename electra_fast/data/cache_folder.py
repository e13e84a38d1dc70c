"""The user's cache folder, and the hashes that name the files in it after their sources."""

import contextlib
import errno
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from electra_fast.local import regular_file

RECENT = 2_000_000_000  # ns; the coarsest file system, FAT, counts in steps of two seconds


def cache_folder() -> Path:
    """Return ``electra_fast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; RuntimeError if there is no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "electra_fast").expanduser()


def unwritable(error: Exception, instead: str) -> str:
    """Return the warning that the cache folder cannot be written, and what follows."""
    remedy = "Set XDG_CACHE_HOME to a folder that can be written"
    return f"the cache folder cannot be written ({error}); {instead}. {remedy}"


@contextlib.contextmanager
def writable_cache() -> Iterator[Path]:
    """Yield `cache_folder`, or a temporary folder with a warning if that cannot be written."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        with tempfile.TemporaryDirectory(prefix="electra_fast-") as temporary:
            warnings.warn(unwritable(error, f"only this process will use {temporary}"), stacklevel=4)
            yield Path(temporary)
    else:
        yield folder


@contextlib.contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Wait for the lock and yield True. Without locks in the file system yield False: each process works."""
    import fcntl  # not on Windows

    with open(file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Closing the file releases it, even if the process is killed.
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            yield False
        else:
            yield True


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
    if (text := _found(key)) is None:
        text = make()
        _keep(key, text)
    return text


def remembered(what: str, files: Sequence[Path], make: Callable[[], str], again: bool = False) -> str:
    """Return ``make()``, a function of files, or its result of an earlier call.

    The names, sizes and times of the files must be those of that call. A file can be modified twice within
    one tick of its file system's clock, so a result is kept only if all files are older than ``RECENT``.
    ``again`` calls ``make`` in any case.
    """
    before = states(files)
    key = f"{what} {before}"
    if not again and (text := _found(key)) is not None:
        return text
    text = make()
    if states(files) == before and all(time.time_ns() - state[-1] > RECENT for state in before):
        _keep(key, text)
    return text


def states(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Return for each file its absolute name, size, time of modification, and of any change, in ns."""
    found = [(str(file.absolute()), file.stat()) for file in files]
    return [(name, s.st_size, s.st_mtime_ns, max(s.st_mtime_ns, s.st_ctime_ns)) for name, s in found]


def _found(key: str) -> str | None:
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: no home
        checksum, text = regular_file(cache_folder() / sha256(key)[:32]).read_text("utf-8").split("\n", 1)
        if checksum == sha256(text):
            return text
    return None


def _keep(key: str, text: str) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        file = cache_folder() / sha256(key)[:32]
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(f"{sha256(text)}\n{text}", "utf-8")
        os.replace(temporary, file)  # Another process sees all of the file or nothing.
