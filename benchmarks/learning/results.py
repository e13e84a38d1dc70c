"""results/learning.json: what the experiments have found. LEARNING.md is made from it."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.learning import report
from benchmarks.learning.runs import save
from electra_fast.local import json_object

FILE = Path(__file__).parents[1] / "results" / "learning.json"


def read() -> dict[str, Any]:
    """Return the results; after measuring, because another command may have added to them meanwhile.

    Raises:
        ValueError: the file is damaged.
    """
    return json_object("learning", FILE) if FILE.exists() else {"runs": []}


def write(results: dict[str, Any]) -> None:
    """Write the results and LEARNING.md."""
    save(FILE, results)
    report.write(results)


def positive(text: str) -> int:
    """Return a number of the command line, which must be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def run(main: Callable[[], None]) -> None:
    """Call the function of a command; of an error that is for the user, print the message only."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
