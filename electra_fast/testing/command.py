"""`python -m electra_fast check`: print the report of a function, and write it to files."""

import os
import re
import sys
from pathlib import Path

import torch

from electra_fast import testing
from electra_fast.errors import must
from electra_fast.testing.importing import imported

OPTION = r"^report: (?=adapter|checks|seed|device|limit|cases)"  # arguments of `report` that are options here


def check(
    function: str, *, op: str | None, device: str | None, dtypes: list[str] | None,
    json: str | None, html: str | None, **options,
) -> int:  # fmt: skip
    """Print the report; return 0 if something is right and nothing is wrong, else 1.

    Raises:
        ValueError: an option is wrong.
    """
    testing.interpret()
    name = getattr(imported("check", function), "__name__", "")
    if op is None and name not in testing.OPS:
        rule, remedy = "be given", f"one of {', '.join(testing.OPS)}"
        raise ValueError(must("check: --op", rule, f"a function called {name or function}", remedy))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for option, file in (("--json", json), ("--html", html)):
        if file is not None and not _writable(file):
            rule = "name a file in an existing folder, which can be written"
            raise ValueError(must(f"check: {option}", rule, repr(file)))
    try:
        found = testing.report(
            op or name, function, device=device, dtypes=_dtypes(dtypes), progress=True, **options
        )
    except (TypeError, ValueError) as error:  # a TypeError: another signature
        raise ValueError(re.sub(OPTION, "check: --", str(error))) from None
    except KeyboardInterrupt:
        print("stopped: nothing is reported", file=sys.stderr)
        return 130
    print(found)
    if json is not None:
        found.to_json(json)
    if html is not None:
        found.to_html(html)
    return 0 if found.ok else 1


def _writable(file: str) -> bool:
    path = Path(file).absolute()
    return bool(file) and not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)


def _dtypes(names: list[str] | None) -> list[torch.dtype] | None:
    if names is None:
        return None
    if not names:
        raise ValueError(must("check: --dtypes", "name a dtype", "none"))
    known = {str(dtype).removeprefix("torch."): dtype for dtype in testing.DTYPES}
    for name in names:
        if name not in known:
            raise ValueError(must("check: --dtypes", f"be some of {', '.join(known)}", name))
    return [known[name] for name in names]
