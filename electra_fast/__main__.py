"""The command line: `python -m electra_fast info`, `… doctor`, `… pretrain`."""

import argparse
import re
import sys
import warnings
from pathlib import Path

# The weights of a Hugging Face model: its folder has a config.json too.
MODEL_FILES = {"model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m electra_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which implementation serves each op here, and why")
    commands.add_parser("doctor", help="whether it all computes what it should here, and how fast")
    _add_pretrain(commands.add_parser("pretrain", help="from a folder of text to a discriminator"))
    options = vars(parser.parse_args(arguments))
    command = {"info": _info, "doctor": _doctor, "pretrain": _pretrain}[options.pop("command")]
    usual, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        command(**options)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend, without a traceback
        sys.exit(f"error: {error}")
    finally:
        warnings.formatwarning = usual


def _format_warning(message, category, filename, lineno, line=None) -> str:
    return f"warning: {message}\n"  # the line of the source says nothing to a user


def _info() -> None:
    from electra_fast.installation import report

    print(report())


def _doctor() -> None:
    from electra_fast.doctor import examine

    sys.exit(examine())


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    from electra_fast.recipe import add_options

    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", help="the folder of a new run")
    where.add_argument("--resume", help="the folder of a run that goes on")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: a GPU if there is one")
    graph = "on a GPU, launch each kernel by itself instead of replaying a CUDA graph"
    parser.add_argument("--no-graph", action="store_true", help=graph)
    add_options(parser)


def _pretrain(out: str | None, resume: str | None, device: str | None, no_graph: bool, **given) -> None:
    from electra_fast.pretrain import NotFinite, Pretraining
    from electra_fast.recipe import Recipe

    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if out is not None:
        folder, recipe = _new_folder(out), Recipe(**given)
    else:
        folder = _run_folder(resume)
        recipe = Recipe.load(folder / "config.json").changed(**given)
    try:
        Pretraining(recipe, folder, device=device, graph=not no_graph).run()
    except NotFinite as error:
        raise ValueError(error) from error
    except (RuntimeError, MemoryError) as error:
        if not re.search("alloc|out of memory|overflow", f"{error} {type(error).__name__}", re.IGNORECASE):
            raise
        rule = "the model and its batches must fit into the memory"
        remedy = "lower the sizes that --set gives, --vocab or --batch-tokens"
        raise ValueError(f"pretrain: {rule}, got: {str(error).partition(chr(10))[0]}; {remedy}") from error


def _new_folder(out: str) -> Path:
    """Return the folder of `--out`.

    Raises:
        ValueError: it holds something.
        OSError: it is no folder, or cannot be read.
    """
    folder = Path(out)
    if out == "":
        raise ValueError("pretrain: --out must name a folder, got ''")
    try:
        found = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        raise OSError(
            f"pretrain: --out must be a folder or a new name, got {out}: {error.strerror}"
        ) from None
    if found - {".lock", "config.part"}:  # of a run that ended before its first checkpoint
        is_run = "config.json" in found and not (found & MODEL_FILES)
        remedy = "--resume goes on with its run" if is_run else "name another"
        raise ValueError(
            f"pretrain: --out must be a new folder, got {out}, which holds {sorted(found)[0]}; {remedy}"
        )
    return folder


def _run_folder(resume: str) -> Path:
    """Return the folder of `--resume`.

    Raises:
        ValueError: it is not the folder of a run.
        FileNotFoundError: it does not exist.
    """
    from electra_fast import local

    folder, rule = Path(resume), "pretrain: --resume must be the folder of a run"
    if resume == "":
        raise ValueError(f"{rule}, got ''")
    local.existing("pretrain: --resume", folder)
    if any((folder / name).exists() for name in MODEL_FILES):
        raise ValueError(f"{rule}, got {resume}, the folder of a model; --init starts a new run from it")
    if not (folder / "config.json").exists():
        raise ValueError(f"{rule}, got {resume}; --out begins one")
    return folder


if __name__ == "__main__":
    main()
