"""The command `python -m benchmarks report`: tables and pictures for the documents, or a page of HTML."""

import argparse
import sys
from pathlib import Path

from benchmarks.harness.machine import source_hash
from benchmarks.report import markdown, runs
from benchmarks.report.page import page
from electra_fast.errors import must


def main(arguments: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks report",
        description="Write the tables in README.md and docs/results.md and the pictures from "
        "benchmarks/results/*.json. With --out, write a page of HTML instead.",
    )
    p.add_argument("files", nargs="*", type=Path, help="results for the page; default: benchmarks/results")
    p.add_argument("--out", type=Path, metavar="PAGE.html", help="one file that needs no network")
    options = p.parse_args(arguments)
    if not options.out:
        if options.files:
            remedy = "`python -m benchmarks commit FILE` copies a run to benchmarks/results"
            raise ValueError(must("report: files", "come with --out", "none", remedy))
        return markdown.update()
    found = []
    for file in options.files or runs.files():
        try:
            found.append(runs.read(file))
        except runs.NotARun as other:
            print(f"{other}; it is left out", file=sys.stderr)
    if not found:
        raise ValueError("report: files must contain a run, got none; `python -m benchmarks` makes one")
    options.out.write_text(page(found, source_hash()))
    print(options.out)
    return 0
