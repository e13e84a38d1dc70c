"""States of a training run on disk: whole or not there, verified before they are loaded, never unpickled.

    <folder>/step-000000300/model.safetensors       each group of tensors in a file
                            optimizer.safetensors
                            manifest.json           step, facts, size and SHA-256 of each file, and
                                                    its own SHA-256

A snapshot is written beside its place, every file and the folder flushed to the disk, and then renamed: a
kill leaves the one before. safetensors checks its header and not the numbers behind it, where a flipped bit
would go unseen; hence the hashes.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from electra_fast import local

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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for left_over in [*folder.glob(".step-*"), *folder.glob(".gone-*")]:  # by a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    place, unfinished = folder / f"step-{step:09d}", folder / f".step-{step:09d}"
    try:
        unfinished.mkdir()
        files = {}
        for group, named in tensors.items():
            file = unfinished / f"{group}.safetensors"
            save_file({name: x.detach().contiguous() for name, x in named.items()}, file)
            _flush(file)
            files[file.name] = _measure(file)
        manifest = {"format": FORMAT, "step": step, "facts": facts, "files": files}
        manifest["sha256"] = _seal(manifest)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _flush(unfinished / MANIFEST)
        _flush(unfinished)
        _remove(place)  # a damaged one: whole ones are not written again
        unfinished.rename(place)
        _flush(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(f"snapshot: {place} must be written whole, got {error}") from error
        raise
    for old in _steps(folder)[keep:]:
        _remove(old)
    return place


def load(folder: Path, groups: Iterable[str] = (), facts: Mapping[str, type] | None = None) -> Snapshot:
    """Return the newest whole snapshot; a damaged one is named in a warning and passed over.

    Args:
        groups: the groups of tensors that a snapshot must have.
        facts: the facts that it must have, with their types.

    Raises:
        FileNotFoundError: there is no whole one.
    """
    places = _steps(folder)
    for place in places:
        try:
            return read(place, groups, facts)
        except Damaged as error:
            before = "" if place == places[-1] else "; taking the one before"
            warnings.warn(f"snapshot: {error}{before}", stacklevel=2)
    remedy = "restore one from a copy, or begin another run with --out"
    raise FileNotFoundError(f"snapshot: {folder} must hold a whole snapshot, got none; {remedy}")


def read(place: Path, groups: Iterable[str] = (), facts: Mapping[str, type] | None = None) -> Snapshot:
    """Verify and load one snapshot; arguments as of `load`.

    Raises:
        Damaged: names the file and what is wrong with it.
    """
    from safetensors.torch import load_file

    try:
        manifest = local.json_object("snapshot", place / MANIFEST)
        if manifest["format"] != FORMAT:
            raise Damaged(f"{place / MANIFEST} has format {manifest['format']}, this version reads {FORMAT}")
        seal = manifest.pop("sha256", None)  # older manifests have none
        if seal is not None and seal != _seal(manifest):
            raise Damaged(f"{place / MANIFEST} is not what was written: its SHA-256 is another")
        if manifest.keys() != {"format", "step", "facts", "files"}:  # one flipped bit renames the checksum
            raise Damaged(f"{place / MANIFEST} must have four fields, got {', '.join(manifest)}")
        step, found_facts = manifest["step"], manifest["facts"]
        if type(step) is not int or place.name != f"step-{step:09d}":
            raise Damaged(f"{place / MANIFEST} must be of the step in the folder's name, got step {step!r}")
        for name, type_ in (facts or {}).items():
            if type(found_facts[name]) is not type_:
                got = f"{name} of type {type(found_facts[name]).__name__}"
                raise Damaged(f"{place / MANIFEST} must have {name} of type {type_.__name__}, got {got}")
        tensors = {}
        for name, wanted in manifest["files"].items():
            if not re.fullmatch(r"\w+\.safetensors", name):
                raise Damaged(f"{place / MANIFEST} names a file {name!r}")
            if (found := _measure(place / name)) != wanted:
                sizes = f"{found['bytes']} bytes, the manifest has {wanted['bytes']}"
                raise Damaged(f"{place / name} is not what was written: its size or SHA-256 differs, {sizes}")
            tensors[Path(name).stem] = load_file(place / name)
        if missing := set(groups) - tensors.keys():
            raise Damaged(
                f"{place / MANIFEST} must name the files of {', '.join(groups)}, got no {', '.join(missing)}"
            )
        return Snapshot(place, step, found_facts, tensors)
    except Damaged:
        raise
    except Exception as error:  # of the file system, of JSON, of safetensors; each with its own class
        got = f"no field {error}" if isinstance(error, KeyError) else error
        raise Damaged(f"{place} cannot be read: {got}") from error


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


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _measure(file: Path) -> dict[str, Any]:
    if not file.is_file():  # to open a named pipe would wait without end
        raise FileNotFoundError(f"{file} must be a regular file")
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some network file systems can flush files and no folders
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
    """Return the descriptor of a file that stays locked until it is closed.

    A file system may have no locks, as some network file systems: then a warning says so, and nothing keeps
    a second process from training in the folder.

    Raises:
        OSError: another process holds the lock, or the file cannot be made.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        rule = f"the folder {folder} must be one that can be written"
        raise OSError(f"pretrain: {rule}, got: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            got = f"the folder {folder} is in use by another training process"
            raise OSError(f"pretrain: {got}; wait for its end or name another") from None
        warnings.warn(
            f"pretrain: {folder} cannot be locked: its file system answers {error.strerror!r} to flock. "
            "Training goes on; make sure that no other process trains in this folder",
            stacklevel=2,
        )
    return descriptor


def holds(descriptor: int, folder: Path) -> bool:
    """Return whether `lock`'s descriptor is still the lock of `folder`, which may have been removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder / ".lock"))
    except FileNotFoundError:
        return False
