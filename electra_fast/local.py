"""Files, folders and devices of this machine; each error names the argument or the file that is wrong."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import torch

from electra_fast.errors import must

FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def existing(argument: str, path: str | Path, hub: bool = True) -> Path:
    """Return `path` as a `Path`; `argument` names it in the error: "pretrain: --vocab".

    Set `hub` if the user may have meant the name of a model.

    Raises:
        TypeError: it is not a path.
        FileNotFoundError: it does not exist. If it looks like the name of a model on Hugging Face's hub, the
            message says how to download that model.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(must(argument, "be a path", type(path).__name__))
    path = Path(path)
    rule = "be on this machine"
    try:
        if path.exists():
            return path
    except OSError as error:  # for example a name that is too long
        raise OSError(must(argument, rule, f"{path}: {error.strerror}")) from None
    # Recipes contain absolute paths: the name of a model then follows the current folder.
    absolute, here = path.absolute(), Path.cwd()
    name = str(absolute.relative_to(here)) if absolute.is_relative_to(here) else ""
    remedy = ""
    if hub and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (".txt", ".json"):
        remedy = (
            f"if it is the name of a model on Hugging Face's hub, "
            f"`hf download {name} --local-dir {path.name}` downloads it to the folder {path.name}"
        )
    raise FileNotFoundError(must(argument, rule, f"{path}, which does not exist", remedy))


def new_folder(argument: str, folder: Path) -> None:
    """Create a folder if it does not exist; `argument` names it in the error, as in `existing`.

    Raises:
        OSError: it cannot be created, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        got = f"{folder}: {error.strerror}"
        raise OSError(must(argument, "be a folder that can be created", got)) from error


def regular_file(path: Path, call: str = "") -> Path:
    """Return `path` if it is a regular file, because opening a FIFO would wait for a writer.

    `call` begins the error: "from_pretrained".

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is of another kind.
    """
    subject, rule = f"{call}: {path}" if call else str(path), "be a regular file"
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(must(subject, rule, "nothing there")) from None
    if not stat.S_ISREG(mode):
        raise ValueError(must(subject, rule, FILE_KINDS.get(stat.S_IFMT(mode), "another kind")))
    return path


def json_object(call: str, path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; `call` begins the error, as in `regular_file`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file, or does not contain a JSON object.
    """
    text = regular_file(path, call).read_bytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(must(f"{call}: {path}", "contain JSON", error)) from None
    if not isinstance(found, dict):
        raise ValueError(must(f"{call}: {path}", "contain a JSON object", type(found).__name__))
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object; a kill leaves the old file or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def device(argument: str, name: str | torch.device | None) -> torch.device:
    """Return a device that PyTorch can use; None is a GPU if there is one, else the CPU.

    Raises:
        ValueError: PyTorch cannot use it; the message says why.
    """
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without that device
        reason = str(error).partition("\n")[0]
        rule = "be cpu, or cuda or cuda:N if PyTorch can use a GPU"
        raise ValueError(must(argument, rule, f"{str(name)!r}: {reason}")) from None
    return found
