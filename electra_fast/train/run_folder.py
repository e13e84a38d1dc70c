"""The folder of a run: its lock, the files that a resumed run reads first, and the exported halves."""

import contextlib
import hashlib
import os
import shutil
import weakref
from pathlib import Path

from torch import nn

from electra_fast import data, local
from electra_fast.errors import must
from electra_fast.pretrained import PretrainedHalf
from electra_fast.train import checkpoint
from electra_fast.train.options import Options

RECIPE, OLD_RECIPE = "recipe.json", "config.json"  # the latter in runs of versions before this one
MODEL_FILES = {"model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"}

# The remedy if a run is used before its first checkpoint.
WITHOUT_MODEL = "pretrain writes discriminator/ with each checkpoint: wait for the first, or --resume the run"


def find_recipe(folder: Path) -> Path | None:
    """Return the file with the recipe of the run in `folder`, None if it is not the folder of a run."""
    if (folder / RECIPE).exists():
        return folder / RECIPE
    is_model = any((folder / name).exists() for name in MODEL_FILES)  # of Hugging Face, with config.json too
    return folder / OLD_RECIPE if (folder / OLD_RECIPE).exists() and not is_model else None


def require_new(folder: Path) -> None:
    """Check that a folder without a recipe is not that of a model, nor of a run whose recipe was lost.

    Raises:
        ValueError: it is one of these.
    """
    found = [name for name in sorted(MODEL_FILES) if (folder / name).exists()]
    found += ["checkpoints without a recipe"] * any((folder / "checkpoints").glob("step-*"))
    if found:
        rule, got = "be a new folder or the folder of a run", f"{folder}, which contains {found[0]}"
        raise ValueError(must("pretrain: out", rule, got, "name another folder"))


class RunFolder:
    """Creates and locks the folder of a run.

    Raises:
        ValueError: its name is not UTF-8.
        OSError: it cannot be created, or another process trains in it.
    """

    def __init__(self, path: str | Path, command: str = "pretrain"):
        self.path, self.command = Path(path), command
        self.tokenizer, self.checkpoints = self.path / "tokenizer", self.path / "checkpoints"
        try:
            str(path).encode()
        except UnicodeEncodeError:  # the package tokenizers cannot write files there
            rule = "be a folder whose name is UTF-8"
            raise ValueError(must(f"{self.command}: --out", rule, repr(str(path)), "rename it")) from None
        self._lock()

    def _lock(self) -> None:
        self._created = not self.path.exists()
        local.new_folder(f"{self.command}: --out", self.path)
        self._descriptor = checkpoint.lock(self.path, self.command)
        self.close = weakref.finalize(self, os.close, self._descriptor)  # also at the end of the process

    def save_recipe(self, recipe: Options) -> None:
        """Write recipe.json; it replaces the config.json of a run that an earlier version started."""
        old = find_recipe(self.path)
        recipe.save(self.path / RECIPE)
        if old is not None and old.name == OLD_RECIPE:
            old.unlink()
            text = f"{self.path} was started by an earlier version; {OLD_RECIPE} is now {RECIPE}"
            print(f"{self.command}: {text}")

    def describe(self, recipe: Options, tokenizer) -> None:
        """Write the files that a resumed run reads first: recipe.json, and tokenizer/ if it is missing."""
        self.save_recipe(recipe)
        if not self.tokenizer.exists():
            part = self.path / "tokenizer.part"
            self.save_tokenizer(tokenizer, part)
            part.rename(self.tokenizer)

    def restore(self, recipe: Options, tokenizer) -> None:
        """Create the folder again if it was removed or renamed during training.

        Raises:
            OSError: it cannot be created, or another process trains in it now.
        """
        if not checkpoint.holds(self._descriptor, self.path):
            self.close()
            self._lock()
            self.describe(recipe, tokenizer)

    def tokenizer_hash(self) -> str:
        """Return the SHA-256 of the file that determines the ids of a text."""
        return hashlib.sha256((self.tokenizer / "tokenizer.json").read_bytes()).hexdigest()

    def require_space(self, parameters: int, keep: int) -> None:
        """Check that the disk has space for `keep` checkpoints, the one being written, and the halves.

        Otherwise the folder is removed if this run created it.

        Raises:
            OSError: the message has the bytes needed and free.
        """
        needed, free = 4 * parameters * (3 * (keep + 1) + 2), shutil.disk_usage(self.path).free
        if needed > free:
            self._remove()
            rule = f"have {_size(needed)} free for {keep + 1} checkpoints"
            raise OSError(must(f"{self.command}: --out", rule, _size(free), "lower --keep"))

    def _remove(self) -> None:
        """Remove the folder if it is new and empty."""
        if self._created:
            (self.path / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def export(self, model: nn.Module, tokenizer) -> None:
        """Write discriminator/ and generator/, each with the files of the tokenizer.

        Raises:
            OSError: a file cannot be written.
        """
        for name in ("discriminator", "generator"):
            half = getattr(model, name, None)
            if isinstance(half, PretrainedHalf):  # a model may lack one, or its generator has no parameters
                half.save_pretrained(self.path / name)
                self.save_tokenizer(tokenizer, self.path / name)

    def save_tokenizer(self, tokenizer, folder: Path) -> None:
        """Write the files of the tokenizer into a folder of the run.

        Raises:
            OSError: a file cannot be written.
        """
        try:
            data.save_tokenizer(tokenizer, folder)
        except Exception as error:  # tokenizers has no class of error for a full disk
            raise OSError(must(f"{self.command}: {folder}", "be writable", error)) from error


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e9:.1f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.1f} MB"
