"""Results as JSON lines, which every process appends to one file immediately.

Each line has a `kind`: machine, check, benchmark, refused, capture, pretrain, test or end (of a stage).
"""

import json
import math
import os
from pathlib import Path


def write(file: Path | None, **line) -> None:
    """Append a line with one write, which is atomic at this size. NaN and infinity become null."""
    if file is None:
        return
    text = json.dumps(_plain(line), default=str) + "\n"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), "wb", buffering=0) as sink:
        sink.write(text.encode())


def read(file: Path) -> list[dict]:
    """Return the complete lines that have a kind; a process that is killed may leave half a line."""
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
