"""The command line: `python -m benchmarks`, `… compare a.json b.json`, `… report`."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time every op and a whole training step beside their baselines.",
        epilog="python -m benchmarks compare A.json B.json: two runs side by side. "
        "python -m benchmarks report: the tables in README.md from benchmarks/results.",
    )
    p.add_argument("--budget", type=float, metavar="SECONDS", help="default 240 on a CPU, 480 on a GPU")
    p.add_argument("--only", metavar="SUBSTRING", help="only cases whose name holds this")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    p.add_argument("--verbose", action="store_true", help="name each case, show failures in full")
    return p


def results_file(options: argparse.Namespace, device: str) -> Path:
    """Return where the JSON goes. A part of a run is no result: it takes no result's place."""
    if options.json:
        return options.json
    folder = Path(os.environ.get("OUT") or HERE / "results")
    if options.only:
        folder = Path(tempfile.mkdtemp(prefix="electra_fast-"))
    return folder / f"{device}.json"


def measure(options: argparse.Namespace) -> int:
    import pytest

    from benchmarks import report
    from benchmarks.machine import ROOT, device_slug

    file = results_file(options, device_slug())
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")  # a run that is stopped leaves the last result alone
    unfinished.unlink(missing_ok=True)
    arguments = [str(HERE), f"--rootdir={ROOT}", "-q", "-rN", "-W", "ignore"]
    arguments += ["--benchmark-quiet", f"--benchmark-json={unfinished}"]
    arguments += ["-vv"] if options.verbose else ["--tb=no"]
    arguments += [] if options.budget is None else [f"--budget={options.budget}"]
    arguments += [f"--only={options.only}"] if options.only else []
    status = pytest.main(arguments)
    if not unfinished.exists():
        print("nothing was measured", file=sys.stderr)
        return int(status) or 1
    unfinished.replace(file)
    print(f"\n{report.table(json.loads(file.read_text()))}\n{file}")
    return int(status)


def compare(arguments: list[str]) -> int:
    """Hand two results to pytest-benchmark, whose options may follow them."""
    from pytest_benchmark.cli import main as pytest_benchmark

    # It cannot mix relative and absolute paths, and takes a relative one for a pattern in its storage.
    arguments = [str(Path(a).resolve()) if Path(a).is_file() else a for a in arguments]
    columns = [] if "--between" in arguments else ["--columns=median,iqr,rounds"]
    sys.argv = ["pytest-benchmark", "compare", "--group-by=fullname", *columns, *arguments]
    return pytest_benchmark() or 0


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["compare"]:
        return compare(arguments[1:])
    if arguments[:1] == ["report"]:
        from benchmarks import report

        return report.update_readme()
    return measure(parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
