"""The command line: `python -m benchmarks`, and its subcommands."""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

from electra_fast.errors import must
from electra_fast.tables import text_table

HERE = Path(__file__).parent
LOCAL = HERE.parent / "build" / "bench"  # ignored by git
COMMANDS = {  # the module with the subcommand's `main`, and its help
    "report": ("report.command", "write the documents' tables and pictures, or a page of HTML"),
    "commit": ("report.commit", "make a run the committed result of its device"),
    "compare": ("harness.compare", "find what got slower between two runs, or two commits"),
    "static": ("static.command", "print figures of the compiled kernels; needs no GPU"),
    "host": ("static.host", "print the host's work per op and per patched step; needs no GPU"),
    "gpu": ("gpu.command", "check and measure everything in a few minutes on a GPU"),
    "roofline": ("harness.roofline", "print the least time of a training step on known GPUs"),
    "scaling": ("scaling.command", "predict a step on many GPUs, or measure two processes of this machine"),
    "tune": ("harness.tune", "rank the launch shapes of a kernel on this GPU"),
}


def parser() -> argparse.ArgumentParser:
    commands = text_table([[f"  {name}", help] for name, (_, help) in COMMANDS.items()])
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time every op and a whole training step, and their baselines.",
        epilog=f"Other commands, each with --help:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--budget", type=float, metavar="SECONDS", help="default 240 on a CPU, 480 on a GPU")
    p.add_argument("--only", metavar="TEXT", help="run cases whose names contain it; separate several by |")
    p.add_argument("--quick", action="store_true", help="leave out rivals and compiled providers")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results there instead of build/bench")
    p.add_argument("--lines", type=Path, metavar="FILE", help="append each result to it immediately")
    p.add_argument("--stage", default="", help="the stage that the lines name")
    own = "check a function of yours and time it too; may be given several times"
    p.add_argument("--provider", action="append", default=[], metavar="NAME=MODULE:FUNCTION", help=own)
    adapter = "of your functions, if they are not called as the op: a name, such as sdpa, or MODULE:FUNCTION"
    p.add_argument("--adapter", metavar="NAME", help=adapter)
    p.add_argument("--baseline", type=Path, metavar="FILE", help="compare with an earlier run's --json FILE")
    p.add_argument("--verbose", action="store_true", help="print each case, all numbers and whole failures")
    return p


def results_file(options: argparse.Namespace, device: str) -> Path:
    """Return the path of the JSON; part of a run goes to a temporary folder."""
    if options.json:
        if options.json.exists() and not options.json.is_file():  # replacing a device file would delete it
            raise ValueError(must("benchmarks: --json", "be a regular file", options.json))
        return options.json
    folder = Path(os.environ.get("OUT") or LOCAL)
    if options.only or options.quick:
        folder = Path(tempfile.mkdtemp(prefix="electra_fast-"))
    return folder / f"{device}.json"


def measure(options: argparse.Namespace) -> int:
    import pytest

    from benchmarks import STARTED
    from benchmarks.harness import compare, yours
    from benchmarks.harness.machine import ROOT, budget, device_slug
    from benchmarks.harness.progress import Progress
    from benchmarks.report.runs import read
    from benchmarks.report.text import summary, table

    yours.give(options.provider, options.only, options.adapter)
    options.only = options.only or "|".join(yours.GIVEN)
    before = compare.baseline(options.baseline, yours.GIVEN) if options.baseline else None
    file = results_file(options, device_slug())
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")  # replaces the last result when it is complete
    unfinished.unlink(missing_ok=True)
    # With providers of a user only the cases of their ops run: `attention` without `attention_qkv`.
    files = [str(HERE / f"bench_{op}.py") for op in yours.GIVEN] or [str(HERE)]
    arguments = [*files, f"--rootdir={ROOT}", "-rN", "-W", "ignore"]
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
        rule, got = "be part of a case's name", repr(options.only)
        raise ValueError(must("benchmarks: --only", rule, got, "see benchmarks/"))
    if not unfinished.exists():
        print("nothing was measured; --verbose prints the reasons", file=sys.stderr)
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
        print(f"stopped: {shown} was not changed", file=sys.stderr)
        return int(status)
    print(f"\nall numbers: {shown}\nas a page: python -m benchmarks report {shown} --out report.html")
    if before is None:
        return int(status)
    print()
    compare.check(str(options.baseline), before, str(shown), result)
    slower = compare.show(before, result, compare.THRESHOLD)
    return int(status) or slower


def main(arguments: list[str]) -> int:
    try:
        if arguments and arguments[0] in COMMANDS:
            module = importlib.import_module(f"benchmarks.{COMMANDS[arguments[0]][0]}")
            return module.main(arguments[1:])
        return measure(parser().parse_args(arguments))
    except ValueError as error:  # its message is for the user
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
