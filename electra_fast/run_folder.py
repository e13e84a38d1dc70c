"""The folder of a pre-training run: its lock, what a resumed run reads first, and the halves for others."""

import contextlib
import hashlib
import os
import shutil
import weakref
from pathlib import Path

from torch import nn

from electra_fast import data, snapshot
from electra_fast.recipe import Recipe


class RunFolder:
    """Makes and locks the folder of a run.

    Raises:
        ValueError: its name is not UTF-8.
        OSError: it cannot be made, or another process trains there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config, self.tokenizer = self.path / "config.json", self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        try:
            str(path).encode()
        except UnicodeEncodeError:  # tokenizers can write no file there
            rule = "--out must be a folder whose name is UTF-8"
            raise ValueError(f"pretrain: {rule}, got {str(path)!r}; rename it") from None
        self._lock()

    def _lock(self) -> None:
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            rule = "--out must be a folder that can be made"
            raise OSError(f"pretrain: {rule}, got {self.path}: {error.strerror}") from error
        self._descriptor = snapshot.lock(self.path)
        self.close = weakref.finalize(self, os.close, self._descriptor)  # at the end of the process too

    def describe(self, recipe: Recipe, tokenizer) -> None:
        """Write what a resumed run reads first: config.json, and tokenizer/ unless it is there."""
        recipe.save(self.config)
        if not self.tokenizer.exists():
            part = self.path / "tokenizer.part"
            data.save_tokenizer(tokenizer, part)
            part.rename(self.tokenizer)

    def restore(self, recipe: Recipe, tokenizer) -> None:
        """Make the folder again if it was removed or renamed while its run trained.

        Raises:
            OSError: it cannot be made, or another process trains there meanwhile.
        """
        if not snapshot.holds(self._descriptor, self.path):
            self.close()
            self._lock()
            self.describe(recipe, tokenizer)

    def tokenizer_hash(self) -> str:
        """Return the SHA-256 of the file that decides which ids a text has."""
        return hashlib.sha256((self.tokenizer / "tokenizer.json").read_bytes()).hexdigest()

    def require_space(self, parameters: int, keep: int) -> None:
        """Refuse a disk that cannot hold `keep` checkpoints, the one being written, and the halves.

        The folder is removed if this run made it.

        Raises:
            OSError: names the bytes needed and free.
        """
        needed, free = 4 * parameters * (3 * (keep + 1) + 2), shutil.disk_usage(self.path).free
        if needed > free:
            self._remove()
            got = f"{_size(needed)} free for {keep + 1} checkpoints, got {_size(free)}"
            raise OSError(f"pretrain: --out must have {got}; lower --keep")

    def _remove(self) -> None:
        """Remove the folder if it is new and empty."""
        if self._made:
            (self.path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def export(self, model: nn.Module, tokenizer) -> None:
        """Write discriminator/ and generator/, each with the tokenizer's files.

        Raises:
            OSError: a file cannot be written.
        """
        for name in ("discriminator", "generator"):
            if (half := getattr(model, name, None)) is not None:
                half.save_pretrained(self.path / name)
                try:
                    data.save_tokenizer(tokenizer, self.path / name)
                except Exception as error:  # tokenizers has no class of its own for a full disk
                    raise OSError(f"pretrain: {self.path / name} must be written, got: {error}") from error


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.1f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.1f} MB"
