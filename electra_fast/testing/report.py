"""The report of a check: one row per example and quantity, as text, JSON or a page."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from electra_fast.tables import text_table

RIGHT, WRONG, RAISED, UNSUPPORTED = VERDICTS = ("right", "wrong", "raised", "unsupported")


SHOWN = 12  # errors that are printed


class Row(NamedTuple):
    """One result or gradient of one example, or a whole example that has none."""

    example: str
    dtype: str  # of the tensors that get a gradient, "float32"; empty if the row is about none
    quantity: str  # "loss", "gradient of x"; empty: the whole example
    verdict: str  # one of VERDICTS
    why: str = ""  # empty if right
    error: float | None = None  # None where there is only right or wrong
    budget: float | None = None
    ratio: float | None = None  # error / budget: right up to 1


@dataclass
class Report:
    """What `testing.report` found. `print` it, or write it with `to_json` or `to_html`."""

    subject: str  # the op, or the name of the definition
    function: str
    device: str
    seed: int
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""  # what a reader must know about the rows

    def of(self, verdict: str) -> list[Row]:
        """Return the rows with this verdict."""
        return [row for row in self.rows if row.verdict == verdict]

    @property
    def ok(self) -> bool:
        """Return whether something is right, and nothing is wrong or raised an error."""
        return bool(self.of(RIGHT)) and not self.of(WRONG) and not self.of(RAISED)

    @property
    def largest(self) -> Row | None:
        """Return the right row that is nearest to its budget."""
        return max((row for row in self.of(RIGHT) if row.ratio), key=lambda row: row.ratio, default=None)

    def assert_right(self) -> None:
        """Raise AssertionError unless every example is right or was declared as unsupported."""
        self.assert_nothing_wrong()
        raised = [row.why for row in self.of(UNSUPPORTED) if row.why.startswith("NotImplementedError")]
        if raised:
            said = "; ".join(f"{why} ({count} examples)" for why, count in Counter(raised).items())
            raise AssertionError(f"{self.subject}: not declared in `supports`: {said}")
        if not self.of(RIGHT):
            reasons = dict.fromkeys(row.why for row in self.of(UNSUPPORTED))
            said = ", ".join(reasons) or "there is no example"
            raise AssertionError(f"{self.subject}: nothing was compared: {said}")

    def assert_nothing_wrong(self) -> None:
        """Raise AssertionError for the first row that is wrong or raised an error."""
        for row in self.rows:
            if row.verdict in (WRONG, RAISED):
                raise AssertionError(f"{row.why} [seed {self.seed}]")

    def summary(self) -> str:
        """Return the counts in one line, and the result that is nearest to its budget."""
        counts = Counter(row.verdict for row in self.rows)
        line = f"{self.subject}: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        if row := self.largest:
            line += f"; the largest error is {row.ratio:.2f} of its budget ({row.quantity}, {row.example}"
            line += f", {row.dtype})" if row.dtype else ")"
        return line

    def __str__(self) -> str:
        lines = [f"{self.function} as {self.subject} on {self.device}, seed {self.seed}", ""]
        lines += [text_table(self._cells()), ""] if self.rows else []
        bad = [f"{row.verdict}: {row.why}" for row in self.rows if row.verdict in (WRONG, RAISED)]
        lines += bad[:SHOWN]
        lines += [f"and {len(bad) - SHOWN} more, which to_json and to_html have"] if bad[SHOWN:] else []
        reasons = Counter(row.why for row in self.of(UNSUPPORTED))
        lines += [f"unsupported: {why} ({n} row{'s' * (n > 1)})" for why, n in reasons.items()]
        lines += [f"note: {self.note}"] if self.note else []
        return "\n".join([*lines, f"{self.summary()}; {self.seconds:.0f} s"])

    def _cells(self) -> list[list[str]]:
        """Return a row per example and a column per dtype, each with the largest error over its budget."""
        dtypes = list(dict.fromkeys(row.dtype for row in self.rows if row.dtype)) or [""]
        found: dict[str, dict[str, list[Row]]] = {}
        for row in self.rows:
            found.setdefault(row.example, {}).setdefault(row.dtype or dtypes[0], []).append(row)
        table = [["error / budget", *dtypes]]
        table += [[name, *(_cell(by.get(dtype, [])) for dtype in dtypes)] for name, by in found.items()]
        return table

    def to_json(self, file: str | Path | None = None) -> str:
        """Return the report as JSON, and write it to `file` if that is given; an infinite number is null."""

        def finite(value):
            return None if isinstance(value, float) and not math.isfinite(value) else value

        rows = [{name: finite(value) for name, value in row._asdict().items()} for row in self.rows]
        text = json.dumps({**asdict(self), "ok": self.ok, "rows": rows}, indent=1)
        if file is not None:
            Path(file).write_text(text)
        return text

    def to_html(self, file: str | Path | None = None) -> str:
        """Return the report as one page with a picture, and write it to `file` if that is given."""
        from electra_fast.testing.page import page

        text = page(self)
        if file is not None:
            Path(file).write_text(text)
        return text


def _cell(rows: list[Row]) -> str:
    """Return the worst verdict of some rows, or the largest error over budget and its quantity."""
    if not rows:
        return ""
    for verdict in (RAISED, WRONG):
        if bad := [row for row in rows if row.verdict == verdict]:
            worst = max(bad, key=lambda row: row.ratio or 0)
            ratio = f" {worst.ratio:.3g}" if worst.ratio and math.isfinite(worst.ratio) else ""
            return f"{verdict.upper()}{ratio} {worst.quantity}".rstrip()
    right = [row for row in rows if row.verdict == RIGHT]
    if not right:
        return "unsupported"
    worst = max(right, key=lambda row: row.ratio or 0)
    return f"{worst.ratio:.2f} {worst.quantity}" if worst.ratio else "right"
