"""The command line: `python -m electra_fast info`, `… doctor`, `… pretrain`."""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m electra_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which implementation serves each op here, and why")
    commands.add_parser("doctor", help="whether it all computes what it should here, and how fast")
    _add_pretrain(commands.add_parser("pretrain", help="from a folder of text to a discriminator"))
    options = vars(parser.parse_args(arguments))
    command = {"info": _info, "doctor": _doctor, "pretrain": _pretrain}[options.pop("command")]
    try:
        command(**options)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend, without a traceback
        sys.exit(f"error: {error}")


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
    parser.add_argument("--device", help="cuda, cuda:1, cpu; none: a GPU if there is one")
    parser.add_argument("--no-graph", action="store_true", help="on a GPU, launch each kernel anew")
    add_options(parser)


def _pretrain(out: str | None, resume: str | None, device: str | None, no_graph: bool, **given) -> None:
    from electra_fast import local
    from electra_fast.pretrain import NotFinite, Pretraining
    from electra_fast.recipe import Recipe

    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    folder = Path(out or resume)
    begun = (folder / "config.json").exists()
    if resume and not begun:
        local.existing("pretrain: --resume", folder)
        raise ValueError(f"pretrain: --resume must be the folder of a run, got {folder}; --out begins one")
    if out and begun:
        raise ValueError(f"pretrain: --out must be a new folder, got {folder}; --resume goes on with its run")
    recipe = Recipe.load(folder / "config.json").changed(**given) if resume else Recipe(**given)
    try:
        Pretraining(recipe, folder, device=device, graph=not no_graph).run()
    except NotFinite as error:
        raise ValueError(error) from error


if __name__ == "__main__":
    main()
