"""The command line: `python -m benchmarks`, and `… report`, `commit`, `compare`, `static`, `gpu`."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LOCAL = HERE.parent / "build" / "bench"  # git ignores it


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time every op and a whole training step beside their baselines.",
        epilog="python -m benchmarks report --help: README.md's tables, or a page of HTML. "
        "python -m benchmarks commit --help: a run into README.md's tables. "
        "python -m benchmarks compare --help: two runs, or two commits, side by side. "
        "python -m benchmarks static --help: what the compilers make of the kernels, without a GPU. "
        "python -m benchmarks gpu --help: all evidence from a few minutes on a GPU.",
    )
    p.add_argument("--budget", type=float, metavar="SECONDS", help="default 240 on a CPU, 480 on a GPU")
    p.add_argument("--only", metavar="SUBSTRING", help="only cases whose name holds this; | between several")
    p.add_argument("--quick", action="store_true", help="no rivals, and nothing that compiles")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the results go, else build/bench")
    p.add_argument("--lines", type=Path, metavar="FILE", help="append each result the moment it is known")
    p.add_argument("--stage", default="", help="what these lines say they belong to")
    p.add_argument(
        "--verbose", action="store_true", help="name each case, show every number, and failures in full"
    )
    return p


def results_file(options: argparse.Namespace, device: str) -> Path:
    """Return where the JSON goes. A part of a run is no result: it takes no result's place."""
    if options.json:
        if options.json.exists() and not options.json.is_file():  # it is replaced, which ends a device
            raise ValueError(f"benchmarks: --json must be a regular file, got {options.json}")
        return options.json
    folder = Path(os.environ.get("OUT") or LOCAL)
    if options.only or options.quick:
        folder = Path(tempfile.mkdtemp(prefix="electra_fast-"))
    return folder / f"{device}.json"


def measure(options: argparse.Namespace) -> int:
    import pytest

    from benchmarks import STARTED
    from benchmarks.machine import ROOT, budget, device_slug
    from benchmarks.progress import Progress
    from benchmarks.report.runs import read
    from benchmarks.report.text import summary, table

    file = results_file(options, device_slug())
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")  # it replaces the last result when it is whole
    unfinished.unlink(missing_ok=True)
    arguments = [str(HERE), f"--rootdir={ROOT}", "-rN", "-W", "ignore"]
    arguments += ["--benchmark-quiet", f"--benchmark-json={unfinished}"]
    arguments += ["-vv"] if options.verbose else ["-qq", "--tb=no"]
    arguments += [] if options.budget is None else [f"--budget={options.budget}"]
    arguments += [f"--only={options.only}"] if options.only else []
    arguments += ["--quick"] if options.quick else []
    arguments += [f"--lines={options.lines}", f"--stage={options.stage}"] if options.lines else []
    progress = None if options.verbose else Progress(budget(options.budget), STARTED)
    status = pytest.main(arguments, plugins=[progress] if progress else [])
    if progress:
        progress.close()
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ValueError(
            f"benchmarks: --only must be part of a case's name, got {options.only!r}; see benchmarks/"
        )
    if not unfinished.exists():
        print("nothing was measured; --verbose says why", file=sys.stderr)
        return int(status) or 1
    stopped = status == pytest.ExitCode.INTERRUPTED
    result = read(unfinished)
    if stopped:
        unfinished.unlink()
    else:
        unfinished.replace(file)
    shown = Path(os.path.relpath(file)) if file.is_relative_to(Path.cwd()) else file
    print(table(result) if options.only or options.verbose else summary(result))
    if stopped:
        print(f"stopped: {shown} is left as it was", file=sys.stderr)
        return int(status)
    print(f"\nall numbers: {shown}\nas a page: python -m benchmarks report {shown} --out report.html")
    return int(status)


def report(arguments: list[str]) -> int:
    from benchmarks.machine import source_hash
    from benchmarks.report import markdown, runs
    from benchmarks.report.page import page

    p = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Write benchmarks/results into README.md as tables; with --out, a page of HTML instead.",
    )
    p.add_argument("files", nargs="*", type=Path, help="results of the page, else all of benchmarks/results")
    p.add_argument("--out", type=Path, metavar="PAGE.html", help="one file that needs no network")
    options = p.parse_args(arguments)
    if not options.out:
        if options.files:
            raise ValueError(
                "report: files must come with --out, got none; README.md has benchmarks/results, where "
                "`python -m benchmarks commit FILE` puts a run"
            )
        return markdown.update_readme()
    found = []
    for file in options.files or runs.files():
        try:
            found.append(runs.read(file))
        except runs.NotARun as other:
            print(f"{other}; the page goes without", file=sys.stderr)
    if not found:
        raise ValueError("report: there must be a run to show, got none; `python -m benchmarks` makes one")
    options.out.write_text(page(found, source_hash()))
    print(options.out)
    return 0


def commit(arguments: list[str]) -> int:
    from benchmarks.report import commit

    return commit.main(arguments)


def compare(arguments: list[str]) -> int:
    from benchmarks import compare

    return compare.main(arguments)


def static(arguments: list[str]) -> int:
    from benchmarks.static import command

    return command.main(arguments)


def gpu(arguments: list[str]) -> int:
    from benchmarks.gpu import command

    return command.main(arguments)


def main(arguments: list[str]) -> int:
    commands = {"report": report, "commit": commit, "compare": compare, "static": static, "gpu": gpu}
    try:
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return measure(parser().parse_args(arguments))
    except ValueError as error:  # a sentence for the user
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
