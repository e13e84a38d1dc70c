"""Checkpoints of a training run: complete or absent, verified before they are loaded, never unpickled.

    <folder>/step-000000300/model.safetensors       one file per group of tensors
                            optimizer.safetensors
                            manifest.json           step, facts, size and SHA-256 of each file, and
                                                    the SHA-256 of all this

A checkpoint is written under another name, flushed to the disk, and then renamed, so a kill leaves the
previous one. The hashes are needed because safetensors checks its header only, and would not see a flipped
bit in the numbers.
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
from electra_fast.errors import must

FORMAT = 1
MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    folder: Path
    step: int
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]  # by group, on the CPU


class Damaged(ValueError):
    """A checkpoint differs from what was written."""


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any], keep: int = 3
):
    """Write the checkpoint of a step and return its folder; then remove all but the `keep` newest ones.

    Raises:
        OSError: for example a full disk; the existing checkpoints are unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for left_over in [*folder.glob(".step-*"), *folder.glob(".gone-*")]:  # from a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    target, unfinished = folder / f"step-{step:09d}", folder / f".step-{step:09d}"
    try:
        unfinished.mkdir()
        files = {}
        for group, named in tensors.items():
            file = unfinished / f"{group}.safetensors"
            save_file({name: x.detach().contiguous() for name, x in named.items()}, file)
            _flush(file)
            files[file.name] = _measure(file)
        manifest = {"format": FORMAT, "step": step, "facts": facts, "files": files}
        manifest["sha256"] = _digest(manifest)
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _flush(unfinished / MANIFEST)
        _flush(unfinished)
        _remove(target)  # a damaged checkpoint; a complete one is not written again
        unfinished.rename(target)
        _flush(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise OSError(must(f"checkpoint: {target}", "be writable", error)) from error
        raise
    for old in _steps(folder)[keep:]:
        _remove(old)
    return target


def load(folder: Path, groups: Iterable[str] = (), facts: Mapping[str, type] | None = None) -> Checkpoint:
    """Return the newest complete checkpoint; warn about damaged ones and skip them.

    Args:
        folder: contains the checkpoints.
        groups: the groups of tensors that a checkpoint must have.
        facts: the facts that it must have, with their types.

    Raises:
        FileNotFoundError: there is no complete one.
    """
    paths = _steps(folder)
    for path in paths:
        try:
            return read(path, groups, facts)
        except Damaged as error:
            previous = "" if path == paths[-1] else "; the previous one is loaded"
            warnings.warn(f"checkpoint: {error}{previous}", stacklevel=2)
    remedy = "restore one from a copy, or start another run with --out"
    raise FileNotFoundError(must(f"checkpoint: {folder}", "contain a complete checkpoint", "none", remedy))


def read(path: Path, groups: Iterable[str] = (), facts: Mapping[str, type] | None = None) -> Checkpoint:
    """Verify and load one checkpoint; arguments as in `load`.

    Raises:
        Damaged: the message names the file and the error.
    """
    from safetensors.torch import load_file

    try:
        file = path / MANIFEST
        manifest = local.json_object("checkpoint", file)
        if manifest["format"] != FORMAT:
            raise Damaged(f"{file} has format {manifest['format']}, this version reads {FORMAT}")
        digest = manifest.pop("sha256", None)  # manifests of older versions have none
        if digest is not None and digest != _digest(manifest):
            raise Damaged(f"{file} is damaged: its SHA-256 differs")
        if manifest.keys() != {"format", "step", "facts", "files"}:  # a flipped bit can rename "sha256"
            raise Damaged(must(str(file), "have four fields", ", ".join(manifest)))
        step, found_facts = manifest["step"], manifest["facts"]
        if type(step) is not int or path.name != f"step-{step:09d}":
            raise Damaged(must(str(file), "have the step of the folder's name", f"step {step!r}"))
        for name, type_ in (facts or {}).items():
            if type(found_facts[name]) is not type_:
                got = f"{name} of type {type(found_facts[name]).__name__}"
                raise Damaged(must(str(file), f"have {name} of type {type_.__name__}", got))
        tensors = {}
        for name, wanted in manifest["files"].items():
            if not re.fullmatch(r"\w+\.safetensors", name):
                raise Damaged(f"{file} names a file {name!r}")
            if (found := _measure(path / name)) != wanted:
                sizes = f"{found['bytes']} bytes, the manifest has {wanted['bytes']}"
                raise Damaged(f"{path / name} is damaged: its size or SHA-256 differs, {sizes}")
            tensors[Path(name).stem] = load_file(path / name)
        if missing := set(groups) - tensors.keys():
            raise Damaged(
                must(str(file), f"name the files of {', '.join(groups)}", f"no {', '.join(missing)}")
            )
        return Checkpoint(path, step, found_facts, tensors)
    except Damaged:
        raise
    except Exception as error:  # the file system, JSON and safetensors have different classes of errors
        got = f"no field {error}" if isinstance(error, KeyError) else error
        raise Damaged(f"{path} cannot be read: {got}") from error


def restore(subject: str, targets: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Copy `tensors` to `targets`, without the casts and the NaN that PyTorch would accept.

    Raises:
        ValueError: tensors are missing, unknown, of another shape or dtype, or not finite; the message lists
            them.
    """
    wrong = [f"{name} is missing" for name in targets.keys() - tensors.keys()]
    wrong += [f"{name} is unknown" for name in tensors.keys() - targets.keys()]
    for name in targets.keys() & tensors.keys():
        a, b = targets[name], tensors[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            found = f"{list(b.shape)} {b.dtype}, the model has {list(a.shape)} {a.dtype}"
            wrong.append(f"{name} is {found}")
        elif not b.isfinite().all():
            wrong.append(f"{name} is not finite")
    if wrong:
        raise ValueError(must(f"{subject}: state", "fit this model", "; ".join(sorted(wrong)[:10])))
    with torch.no_grad():
        for name, x in targets.items():
            x.copy_(tensors[name])


def _steps(folder: Path) -> list[Path]:
    """Return the folders of the checkpoints, the newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 9), reverse=True)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _measure(file: Path) -> dict[str, Any]:
    with local.regular_file(file).open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # some network file systems can flush files but not folders
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder. It is renamed first, so that a kill does not leave part of a checkpoint."""
    if path.exists():
        renamed = path.with_name(f".gone-{path.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


def lock(folder: Path, command: str = "pretrain") -> int:
    """Lock a folder for training; return the descriptor of its lock file, which stays locked until closed.

    On a file system without locks, such as some network file systems, only a warning is given.

    Raises:
        OSError: another process has the lock, or the file cannot be created.
    """
    try:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OSError(must(f"{command}: the folder {folder}", "be writable", error.strerror)) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            remedy = "wait until it ends, or name another folder"
            text = f"{command}: {folder} is locked by another training process; {remedy}"
            raise OSError(text) from None
        warnings.warn(
            f"{command}: {folder} cannot be locked: its file system answers {error.strerror!r} to flock. "
            "Training continues; make sure that no other process trains in this folder",
            stacklevel=2,
        )
    return descriptor


def holds(descriptor: int, folder: Path) -> bool:
    """Return whether a descriptor of `lock` is still the lock of `folder`, which may have been removed."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder / ".lock"))
    except FileNotFoundError:
        return False
