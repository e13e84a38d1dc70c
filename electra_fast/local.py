"""Files, folders and devices of this machine: what cannot be used is refused in a sentence that names it."""

import json
import re
from pathlib import Path
from typing import Any

import torch


def existing(argument: str, path: str | Path, hub: bool = True) -> Path:
    """Return `path` as a `Path`; `argument` names it in the error: "pretrain: --vocab".

    With `hub` the path may be meant as the name of a model.

    Raises:
        FileNotFoundError: it does not exist. The message says how to download a model of Hugging Face's hub
            if it looks like the name of one.
    """
    path = Path(path)
    try:
        if path.exists():
            return path
    except OSError as error:  # too long a name, say
        raise OSError(f"{argument} must be on this machine, got {path}: {error.strerror}") from None
    message = f"{argument} must be on this machine, got {path}, which does not exist"
    # A recipe holds absolute paths, and the name of a model then has the current folder before it.
    absolute, here = path.absolute(), Path.cwd()
    name = str(absolute.relative_to(here)) if absolute.is_relative_to(here) else ""
    if hub and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and path.suffix not in (".txt", ".json"):
        message += (
            f"; if it is the name of a model on Hugging Face's hub, "
            f"`hf download {name} --local-dir {path.name}` downloads it to the folder {path.name}"
        )
    raise FileNotFoundError(message)


def json_object(call: str, file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; `call` begins the error: "from_pretrained".

    Raises:
        FileNotFoundError: it is no regular file. A named pipe would be waited for without end.
        ValueError: it holds no JSON object.
    """
    if not file.is_file():
        got = "something else" if file.exists() else "nothing there"
        raise FileNotFoundError(f"{call}: {file} must be a regular file, got {got}")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{call}: {file} must hold JSON, got: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{call}: {file} must hold a JSON object, got {type(found).__name__}")
    return found


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
        rule = "must be cpu, or cuda or cuda:N where PyTorch can use a GPU"
        raise ValueError(f"{argument} {rule}, got {str(name)!r}: {reason}") from None
    return found
