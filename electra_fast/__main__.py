"""The command line: `python -m electra_fast COMMAND`; `--help` lists the commands."""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from electra_fast.errors import must

TASK = "classify, regress, tag, answer, choose, rank, intent or write"
DEVICE = "cuda, cuda:1, cpu; default: a GPU if there is one"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m electra_fast", description=__doc__)
    add = parser.add_subparsers(dest="command", required=True).add_parser
    add("info", help="which implementation serves each op here, and why")
    add("doctor", help="check that everything computes correctly here, and how fast")
    _add_check(add("check", help="compare your function with an op, example by example"))
    _add_pretrain(add("pretrain", help="train a discriminator on a folder of text"))
    _add_finetune(add("finetune", help="train a discriminator on a task: classify, tag, answer, …"))
    _add_evaluate(add("evaluate", help="evaluate a fine-tuned model on a file"))
    _add_tokenize(add("tokenize", help="make a folder of tokens of a corpus, for pretrain"))
    _add_use(add("use", help="use a trained model: detect, score, choose, classify, …"))
    _add_export(add("export", help="write a model as one file for ONNX Runtime, OpenVINO or torch.export"))
    options = vars(parser.parse_args(arguments))
    commands = {"info": _info, "doctor": _doctor, "check": _check, "pretrain": _pretrain}
    commands |= {"finetune": _finetune, "evaluate": _evaluate, "tokenize": _tokenize}
    commands |= {"use": _use, "export": _export}
    command = commands[options.pop("command")]
    default, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        command(**options)
    except BrokenPipeError:  # the program that reads the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, ImportError) as error:  # errors of the user: no traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before the first step, from which on a signal is noted
        sys.exit(128 + signal.SIGINT)
    finally:
        warnings.formatwarning = default


def _format_warning(message, category, filename, lineno, line=None) -> str:
    return f"warning: {message}\n"  # without the line of the source


def _info() -> None:
    from electra_fast.doctor import report

    print(report())


def _doctor() -> None:
    from electra_fast.doctor import examine

    sys.exit(examine())


def _add_check(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return [name.strip() for name in text.split(",") if name.strip()]

    parser.add_argument("function", metavar="MODULE:FUNCTION", help="your function, called with keywords")
    parser.add_argument("--op", help="the op that it computes; default: the function's name")
    adapter = "how the function is called as the op: a name such as sdpa, or module:function"
    parser.add_argument("--adapter", metavar="NAME", help=adapter)
    without = "what it does not support, such as dropout,packed,gradients: these examples are left out"
    parser.add_argument("--without", type=names, default=[], metavar="NAMES", help=without)
    own = "it draws its own random numbers, which are judged as a distribution"
    parser.add_argument("--own-random", action="store_true", help=own)
    dtypes = "the floating dtypes; default: float32,bfloat16,float16"
    parser.add_argument("--dtypes", type=names, metavar="NAMES", help=dtypes)
    checks = "further checks, such as determinism,memory,strided; or all"
    parser.add_argument("--checks", type=names, default=[], metavar="NAMES", help=checks)
    cases = "random cases after the examples, with larger sizes (default: 24)"
    parser.add_argument("--cases", type=int, default=24, help=cases)
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("--seed", type=int, help="of the example inputs; default: a new one")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--html", metavar="FILE", help="write the report there as a page with a picture")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per example (default: 60)")
    no_isolate = "run in this process, for a debugger: a crash or a hang then ends the check"
    parser.add_argument("--no-isolate", action="store_true", help=no_isolate)


def _check(function: str, own_random: bool, without: list[str], no_isolate: bool, **options) -> None:
    from electra_fast.testing import command

    supports = dict.fromkeys(without, False) | ({"random": "own"} if own_random else {})
    sys.exit(command.check(function, supports=supports, isolate=not no_isolate, **options))


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    from electra_fast.train.options import add_options
    from electra_fast.train.recipe import Recipe

    _add_folder_and_device(parser)
    verify = "read all files of the data again, even if no size and no time of them has changed"
    parser.add_argument("--verify", action="store_true", help=verify)
    add_options(parser, Recipe)


def _add_folder_and_device(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", help="the folder of a new run")
    where.add_argument("--resume", help="the folder of a run to continue")
    parser.add_argument("--device", help=DEVICE)
    timeout = "with torchrun: seconds that a process waits for the others in a step (default: 600)"
    parser.add_argument("--timeout", type=_seconds, default=600.0, help=timeout)
    graph = "on a GPU, launch the kernels one by one instead of replaying a CUDA graph"
    parser.add_argument("--no-graph", action="store_true", help=graph)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < 1e6:
            return seconds
    raise argparse.ArgumentTypeError(f"must be a number of seconds in (0, 1000000), got {text!r}")


def _pretrain(
    out: str | None,
    resume: str | None,
    device: str | None,
    timeout: float,
    no_graph: bool,
    verify: bool,
    **given,
) -> None:
    from electra_fast.train.pretrain import Pretraining
    from electra_fast.train.recipe import Recipe

    with _processes("pretrain", device, timeout, given) as world:
        folder, recipe = world.from_first(lambda: _started(Recipe, out, resume, given))
        Pretraining(recipe, folder, graph=not no_graph, world=world, verify=verify).run()


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    from electra_fast.train.options import add_options
    from electra_fast.train.recipe import TOKENIZE_OPTIONS, TokenizeRecipe

    out = "the folder of the tokens; if it is not complete, the same command continues"
    parser.add_argument("--out", required=True, help=out)
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    add_options(parser, TokenizeRecipe, TOKENIZE_OPTIONS)


def _tokenize(out: str, workers: int | None, **given) -> None:
    from electra_fast.train.recipe import TokenizeRecipe
    from electra_fast.train.tokens import tokenize

    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    print(tokenize(TokenizeRecipe(**given), out, workers))


def _add_export(parser: argparse.ArgumentParser) -> None:
    from electra_fast.export.command import add_arguments

    add_arguments(parser)


def _export(**options) -> None:
    from electra_fast.export import export

    export(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    from electra_fast.train.fine_tune_recipe import FineTuneRecipe
    from electra_fast.train.options import add_options

    parser.add_argument("task", nargs="?", help=TASK, default=argparse.SUPPRESS)
    _add_folder_and_device(parser)
    add_options(parser, FineTuneRecipe)


def _finetune(
    out: str | None, resume: str | None, device: str | None, timeout: float, no_graph: bool, **given
) -> None:
    from electra_fast.train.fine_tune import fine_tune
    from electra_fast.train.fine_tune_page import summary_table
    from electra_fast.train.fine_tune_recipe import FineTuneRecipe

    with _processes("finetune", device, timeout, given) as world:
        folder, recipe = world.from_first(lambda: _started(FineTuneRecipe, out, resume, given))
        results = fine_tune(recipe, folder, graph=not no_graph, world=world)
        print(summary_table(results))
        print(f"{folder}: the model of seed {results['best']}, metrics.json, predictions.jsonl, report.html")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    from electra_fast.train.fine_tune_recipe import FILE_OPTIONS, FineTuneRecipe
    from electra_fast.train.options import add_options

    parser.add_argument("task", help=TASK)
    parser.add_argument("--model", required=True, help="the folder of a fine-tuned model")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="files with labels")
    parser.add_argument("--split", default="test", help="of files with several: train, dev or test (default)")
    parser.add_argument(
        "--out", help="write predictions.jsonl, metrics.json and report.html into this folder"
    )
    parser.add_argument("--device", help=DEVICE)
    add_options(parser, FineTuneRecipe, FILE_OPTIONS)


def _evaluate(task: str, model: str, data: list[str], **options) -> None:
    from electra_fast.train.results import evaluate_folder, one_line

    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    print(one_line(evaluate_folder(task, model, data, **given)))


def _add_use(parser: argparse.ArgumentParser) -> None:
    from electra_fast.use.command import add_arguments

    add_arguments(parser)


def _use(use: str, **options) -> None:
    from electra_fast.use.command import run

    run(use, **options)


def _started(kind: type, out: str | None, resume: str | None, given: dict) -> tuple[Path, Any]:
    """Return the folder of a run and its recipe, a new one or that of the folder with changes.

    A run that torchrun starts again with the same command is continued.
    """
    from electra_fast.distributed import RESTARTS
    from electra_fast.train.run_folder import find_recipe

    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    again = os.environ.get(RESTARTS, "0") != "0"
    if out is not None and not (again and find_recipe(Path(out))):
        return _new_folder(kind.command, out), kind(**given)
    folder, recipe_file = _run_folder(kind.command, resume if out is None else out)
    return folder, kind.load(recipe_file).changed(**given)


@contextlib.contextmanager
def _processes(command: str, device: str | None, timeout: float, given: dict) -> Iterator[Any]:
    """Yield the `World` of this process; only the first process prints."""
    from electra_fast.distributed import ProcessLost, World

    try:
        world = World.join(command, device, timeout)
        printed = sys.stdout if world.first else io.StringIO()
        try:
            with _training_errors(command), contextlib.redirect_stdout(printed):
                world.require_same({"the options": given})
                yield world
        except ValueError as error:  # all processes have the same one
            raise error if world.first else SystemExit(1) from error
    except ProcessLost as error:
        with contextlib.suppress(OSError):
            print(f"error: {error}", file=sys.stderr)
            sys.stdout.flush()
        os._exit(1)  # the end of the interpreter would wait for threads and a GPU, which wait for the process


@contextlib.contextmanager
def _training_errors(command: str) -> Iterator[None]:
    """Raise a ValueError for a run that does not fit into the memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not re.search("alloc|out of memory|overflow", f"{error} {type(error).__name__}", re.IGNORECASE):
            raise
        subject, got = f"{command}: the model and its batches", str(error).partition("\n")[0]
        remedy = "lower the sizes in --set, --vocab or the size of a batch"
        raise ValueError(must(subject, "fit into the memory", got, remedy)) from error


def _new_folder(command: str, out: str) -> Path:
    """Return the folder of `--out`.

    Raises:
        ValueError: it is not empty.
        OSError: it is not a folder, or cannot be read.
    """
    from electra_fast.train.run_folder import find_recipe

    folder = Path(out)
    if out == "":
        raise ValueError(must(f"{command}: --out", "name a folder", "''"))
    try:
        found = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    except OSError as error:
        rule = "be a folder or a new name"
        raise OSError(must(f"{command}: --out", rule, f"{out}: {error.strerror}")) from None
    found -= {".lock", "recipe.part", "config.part"}  # left by a run that ended before its first checkpoint
    if found:
        remedy = "--resume continues its run" if find_recipe(folder) else "name another folder"
        got = f"{out}, which contains {sorted(found)[0]}"
        raise ValueError(must(f"{command}: --out", "be a new folder", got, remedy))
    return folder


def _run_folder(command: str, resume: str) -> tuple[Path, Path]:
    """Return the folder of `--resume` and the file with its recipe.

    Raises:
        ValueError: it is not the folder of a run.
        FileNotFoundError: it does not exist.
    """
    from electra_fast import local
    from electra_fast.train.run_folder import MODEL_FILES, find_recipe

    folder, option, rule = Path(resume), f"{command}: --resume", "be the folder of a run"
    if resume == "":
        raise ValueError(must(option, rule, "''"))
    local.existing(option, folder)
    if (file := find_recipe(folder)) is not None:
        return folder, file
    if any((folder / name).exists() for name in MODEL_FILES):
        option_of = {"pretrain": "--init", "finetune": "--model"}
        got, remedy = f"{resume}, the folder of a model", f"{option_of[command]} starts a new run from it"
        raise ValueError(must(option, rule, got, remedy))
    raise ValueError(must(option, rule, resume, "--out starts one"))


if __name__ == "__main__":
    main()
