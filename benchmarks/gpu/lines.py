"""Results as JSON lines, appended to one file by every process the moment they are known.

Each line has a `kind`: machine, check, benchmark, refused, capture, pretrain, test or end (of a stage).
"""

import json
import math
import os
from pathlib import Path


def write(file: Path | None, **line) -> None:
    """Append a line; a number that JSON lacks becomes null. One write of this size is not torn apart."""
    if file is None:
        return
    text = json.dumps(_plain(line), default=str) + "\n"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), "wb", buffering=0) as sink:
        sink.write(text.encode())


def read(file: Path) -> list[dict]:
    """Return the lines that are whole and have a kind: a process that was killed may leave half of one."""
    found = []
    for text in file.read_text(errors="replace").splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "kind" in line:
            found.append(line)
    return found


def _plain(x):
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {str(name): _plain(value) for name, value in x.items()}
    return [_plain(value) for value in x] if isinstance(x, list | tuple) else x
