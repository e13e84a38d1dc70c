"""The index of a large corpus, its sequences and their order, in mapped files in the user's cache folder.

The processes of one machine share the memory of mapped files, and a run does not compute them at each start.
An index is a function of its key. Each array has a .npy file of its own, which is complete or absent.
"""

import contextlib
import hashlib
import os
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from electra_fast.data.cache_folder import cache_folder, locked, sha256, unwritable
from electra_fast.data.encoded import Encoded
from electra_fast.local import regular_file

# Increase the version if the sequences of a text or their order change. The random numbers are torch's.
VERSION = f"1 {torch.__version__}"
MANY = 2_000_000  # sequences; fewer are computed in half a second, and not stored


def index_key(documents: Encoded, seq_len: int, pairs: bool, seed: int) -> str | None:
    """Return the name of the index of documents; None if they are few, or their ids are not in a file."""
    tokens = documents.num_tokens
    if documents.text is None or tokens < MANY * seq_len:
        return None
    subset = "" if documents.subset is None else hashlib.sha256(documents.subset.numpy()).hexdigest()
    return f"{_prefix(documents)}-{sha256(f'{VERSION} {tokens} {subset} {seq_len} {pairs} {seed}')[:32]}"


def _prefix(documents: Encoded) -> str:
    return f"index-{sha256(f'{documents.text} {documents.vocab}')[:32]}"


def forget_index(documents: Encoded) -> None:
    """Delete all that is stored for a text and a vocabulary, so that it is computed again."""
    with contextlib.suppress(RuntimeError):  # There is no home, so nothing is stored.
        forget(_prefix(documents))


def forget(key: str, keep: str = "/") -> None:
    """Delete the files of all keys that begin with `key`, except those of keys that begin with `keep`.

    Processes that have mapped a file keep it.
    """
    for file in cache_folder().glob(f"{key}*.npy"):
        if not file.name.startswith(keep):
            file.unlink(missing_ok=True)


def stored(
    key: str | None, dtypes: dict[str, type], make: Callable[[], Sequence[np.ndarray]]
) -> Sequence[np.ndarray]:
    """Return ``make()``, arrays of one length with these names and dtypes, mapped from the files of `key`.

    One process writes files that are missing or damaged, and the others wait; on a file system without locks
    each process writes them. If the files cannot be written, a warning says so. Without a key nothing is
    stored.
    """
    if key is None:
        return make()
    made = None
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        files = {folder / f"{key}-{name}.npy": dtype for name, dtype in dtypes.items()}
        with locked(folder / "index.lock") as alone:
            if (found := _mapped(files)) is None:
                made = make()
                for file, array in zip(files, made, strict=True):
                    _write(file, array, "part" if alone else f"{uuid.uuid4()}.part")
                found = _mapped(files)
    except (OSError, RuntimeError) as error:
        instead = "each process has the index of the corpus in its own memory, and computes it at each start"
        warnings.warn(unwritable(error, instead), stacklevel=2)
        found = make() if made is None else None
    return made if found is None else found


def _mapped(files: dict[Path, type]) -> list[np.ndarray] | None:
    """Return the arrays in the files, or None if one is missing or is not complete."""
    found = []
    with contextlib.suppress(Exception):  # A damaged header raises errors of many kinds.
        for file, dtype in files.items():
            array = np.lib.format.open_memmap(regular_file(file), mode="r")
            whole = array.offset + array.nbytes == file.stat().st_size
            if whole and array.dtype == dtype and array.ndim == 1:
                found.append(np.asarray(array))
    return found if len(found) == len(files) and len(set(map(len, found))) == 1 else None


def _write(file: Path, array: np.ndarray, ending: str) -> None:
    """Write a file under another name and rename it when it is on the disk."""
    part = file.with_suffix(f".{ending}")
    try:
        with open(part, "wb") as opened:
            np.save(opened, array)
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    except BaseException:  # including an interrupt
        part.unlink(missing_ok=True)
        raise
