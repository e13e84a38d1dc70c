"""States of a training run on disk: whole or not there, verified before they are loaded, never unpickled.

    <folder>/step-000000300/model.safetensors       each group of tensors in a file
                            optimizer.safetensors
                            manifest.json           step, facts, and of each file its size and SHA-256

A snapshot is written beside its place, every file and the folder flushed to the disk, and then renamed: a
kill leaves the one before. safetensors checks its header and not the numbers behind it, where a flipped bit
would go unseen; hence the hashes.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"


class Snapshot(NamedTuple):
    folder: Path
    step: int
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # by group, on the CPU


class Damaged(ValueError):
    """A snapshot is not what was written."""


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any], keep: int = 3
):
    """Write the snapshot of a step and return its folder; only then are all but the `keep` newest removed.

    Raises:
        OSError: the disk is full, say; what was there before is as it was.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    place, unfinished = folder / f"step-{step:09d}", folder / f".step-{step:09d}"
    _remove(unfinished)
    try:
        unfinished.mkdir()
        files = {}
        for group, named in tensors.items():
            file = unfinished / f"{group}.safetensors"
            save_file({name: x.detach().contiguous() for name, x in named.items()}, file)
            _flush(file)
            files[file.name] = _measure(file)
        manifest = {"format": FORMAT, "step": step, "facts": facts, "files": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _flush(unfinished / MANIFEST)
        _flush(unfinished)
        _remove(place)  # a damaged one: whole ones are not written again
        unfinished.rename(place)
        _flush(folder)
    except BaseException as error:
        _remove(unfinished)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(f"snapshot: {place} must be written whole, got {error}") from error
        raise
    for old in _steps(folder)[keep:]:
        _remove(old)
    return place


def load(folder: Path) -> Snapshot:
    """Return the newest whole snapshot; a damaged one is named in a warning and passed over.

    Raises:
        FileNotFoundError: there is no whole one.
    """
    for place in _steps(folder):
        try:
            return read(place)
        except Damaged as error:
            warnings.warn(f"snapshot: {error}; taking the one before", stacklevel=2)
    raise FileNotFoundError(f"snapshot: {folder} must hold a whole snapshot, got none")


def read(place: Path) -> Snapshot:
    """Verify and load one snapshot.

    Raises:
        Damaged: names the file and what is wrong with it.
    """
    from safetensors.torch import load_file

    try:
        manifest = json.loads((place / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise Damaged(f"{place / MANIFEST} has format {manifest['format']}, this version reads {FORMAT}")
        tensors = {}
        for name, wanted in manifest["files"].items():
            if not re.fullmatch(r"\w+\.safetensors", name):
                raise Damaged(f"{place / MANIFEST} names a file {name!r}")
            if (found := _measure(place / name)) != wanted:
                raise Damaged(f"{place / name} is not what was written: {found}, the manifest has {wanted}")
            tensors[Path(name).stem] = load_file(place / name)
        return Snapshot(place, manifest["step"], manifest["facts"], tensors)
    except Damaged:
        raise
    except Exception as error:  # of the file system, of JSON, of safetensors; each with its own class
        raise Damaged(f"{place} cannot be read: {error!r}") from error


def restore(what: str, mine: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy tensors of the same names, shapes and dtypes, all finite; PyTorch would cast, and take NaN.

    Raises:
        ValueError: names what is missing, unknown, of another shape or dtype, or not finite.
    """
    wrong = [f"{name} is missing" for name in mine.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - mine.keys()]
    for name in mine.keys() & tensors.keys():
        a, b = mine[name], tensors[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            found = f"{list(b.shape)} {b.dtype}, the model has {list(a.shape)} {a.dtype}"
            wrong.append(f"{name} is {found}")
        elif not b.isfinite().all():
            wrong.append(f"{name} is not finite")
    if wrong:
        raise ValueError(f"{what}: state must be this model's, got: " + "; ".join(sorted(wrong)[:10]))
    with torch.no_grad():
        for name, x in mine.items():
            x.copy_(tensors[name])


def _steps(folder: Path) -> list[Path]:
    """Return the snapshots' folders, the newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 9), reverse=True)


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(place: Path) -> None:
    """Remove a folder; under a name that nobody loads, as a kill may come in between."""
    if place.exists():
        doomed = place.with_name(f".gone-{place.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        place.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def lock(folder: Path) -> int:
    """Return the descriptor of a file that stays locked until it is closed."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise OSError(f"pretrain: --out must be a folder in which nobody trains, got {folder}") from None
    return descriptor
