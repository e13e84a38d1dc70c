"""Files as a compressed tar in parts, because the files that come back from a GPU machine have a limit."""

import io
import lzma
import tarfile
from collections.abc import Iterable
from pathlib import Path

from electra_fast.errors import must

PART = 15 << 20  # bytes
FAST = 1  # the preset of xz: 8 s for 20 MB in bfloat16, of which it saves a quarter


def write(folder: Path, names: Iterable[str], target: Path, size: int = PART) -> list[Path]:
    """Write files and folders of `folder` to target.0, target.1, …; return these. Older parts are removed."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=FAST) as tar:
        for name in names:
            tar.add(folder / name, name)
    whole = packed.getvalue()
    for old in target.parent.glob(f"{target.name}.*"):  # there may be more of them than new ones
        old.unlink()
    files = []
    for number, first in enumerate(range(0, len(whole), size)):
        files.append(target.with_name(f"{target.name}.{number}"))
        files[-1].write_bytes(whole[first : first + size])
    return files


def read(target: Path, folder: Path) -> None:
    """Unpack all parts of `target` into a folder.

    Raises:
        FileNotFoundError: there is no part.
        ValueError: a part is missing or damaged.
    """
    numbered = (file for file in target.parent.glob(f"{target.name}.*") if file.suffix[1:].isdecimal())
    files = sorted(numbered, key=lambda file: int(file.suffix[1:]))
    if not files:
        raise FileNotFoundError(f"{target}.0 does not exist")
    whole = io.BytesIO(b"".join(file.read_bytes() for file in files))
    try:
        with tarfile.open(fileobj=whole, mode="r:xz") as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(must(f"{target}.*", "be all parts of one file", f"{len(files)}: {error}")) from error
