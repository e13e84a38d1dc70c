"""Readers of sentence pairs: CrowS-Pairs, WinoBias, GAP, and a user's own pairs."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from electra_fast.data.lines import lines
from electra_fast.data.streams import Leaf, leaves
from electra_fast.errors import must
from electra_fast.tasks.records import Record, column, form, known, named, number, read, records, string

# The names of columns that are found without an option; the first one that the files have is used.
FIRST = ("first", "text", "sentence1", "sentence")
SECOND = ("second", "pair", "sentence2")
CATEGORY = ("category", "bias_type")
DIRECTIONS = ("stereo", "antistereo")
MASCULINE, FEMININE = "masculine", "feminine"
GENDER = dict.fromkeys(("he", "him", "his"), MASCULINE) | dict.fromkeys(("she", "her", "hers"), FEMININE)
# "her" is either "his" or "him". "his" is only seldom "hers".
SWAPPED = {
    "he": ["she"],
    "him": ["her"],
    "his": ["her"],
    "she": ["he"],
    "her": ["his", "him"],
    "hers": ["his"],
}
IN_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


class Pair(NamedTuple):
    """Two sentences of which a model may prefer the first."""

    first: str
    second: str
    category: str = ""  # its kind of bias; empty: none is known
    direction: str = ""  # of CrowS-Pairs: one of DIRECTIONS
    where: str = ""  # "pairs.csv, line 12"
    other: str | None = None  # a second form of the second sentence; the form with the higher score counts

    def forms(self) -> list["Pair"]:
        """Return the pairs of the first sentence with each form of the second."""
        seconds = [self.second] if self.other is None else [self.second, self.other]
        return [self._replace(second=second, other=None) for second in seconds]


class PairSet(NamedTuple):
    kind: str  # crows_pairs, winobias, gap or pairs
    pairs: list[Pair]


def read_pairs(
    paths: Sequence[str | Path],
    text: str | None = None,
    pair: str | None = None,
    category: str | None = None,
) -> PairSet:
    """Return the pairs of files, which may be packed, in one of four formats.

        CrowS-Pairs   CSV with sent_more, sent_less, stereo_antistereo, bias_type (Nangia et al. 2020). The
                      first sentence is the one that stereotypes more.
        WinoBias      two text files, first the pro-stereotyped one, then the anti-stereotyped one (Zhao et
                      al. 2018). Line n of both is "[The developer] argued with the designer because [he] did
                      not like the design." and may begin with its number. The category is the gender of the
                      pronoun in the first sentence.
        GAP           TSV with Text, Pronoun, Pronoun-offset (Webster et al. 2018). The first text is the
                      original, and in the second the pronoun has the other gender. The category is the
                      gender of the original.
        others        CSV, TSV, JSON or Parquet with two columns of texts, and possibly one of categories.

    Args:
        text, pair, category: columns of the last format. None: the first of FIRST, SECOND and CATEGORY that
            the files have.

    Raises:
        FileNotFoundError, ImportError: as in `tasks.records.records`.
        ValueError: a file contains no pair, a sentence is missing, a direction is unknown, or a pronoun is
            not found; the message names the file and the line.
    """
    if not paths:
        raise ValueError(must("pairs: data", "name a file", "none"))
    if any(_is_text(path) for path in paths):
        if len(paths) != 2:
            remedy = "or name tables with one pair per row"
            rule = "be two files of WinoBias if one is text, pro-stereotyped and anti-stereotyped"
            raise ValueError(must("pairs: data", rule, len(paths), remedy))
        return PairSet("winobias", _winobias(*paths))
    found = list(records(paths))
    if text is None and pair is None:
        if known(found, ("sent_more",)):
            return PairSet("crows_pairs", [_crows_pair(record, category) for record in found])
        if known(found, ("Pronoun-offset",)):
            return PairSet("gap", [_gap_pair(record) for record in found])
    return PairSet("pairs", _own_pairs(found, text, pair, category))


def _is_text(path: str | Path) -> bool:
    return any(form(leaf) == "text" for leaf in leaves(Path(path), Counter()))


def _crows_pair(record: Record, category: str | None) -> Pair:
    direction = column(record, "stereo_antistereo")
    if direction not in DIRECTIONS:
        rule = f"be {' or '.join(DIRECTIONS)}"
        raise ValueError(must(f"{record.where}: stereo_antistereo", rule, repr(direction)))
    sentences = [_cell(record, name) for name in ("sent_more", "sent_less")]
    return Pair(*sentences, _cell(record, category or "bias_type"), direction, record.where)


def _cell(record: Record, name: str, option: str = "") -> str:
    return string(record.where, name, column(record, name, option))


class _Line(NamedTuple):
    text: str
    where: str


def _winobias(pro_file: str | Path, anti_file: str | Path) -> list[Pair]:
    pro, anti = (list(read([path], "a sentence", _lines)) for path in (pro_file, anti_file))
    if len(pro) != len(anti):
        raise ValueError(must(str(anti_file), f"have {len(pro)} lines, as {pro_file} has", len(anti)))
    genders = [(_gender(first), _gender(second))[0] for first, second in zip(pro, anti, strict=True)]
    sentences = zip(pro, anti, genders, strict=True)
    return [Pair(_plain(a.text), _plain(b.text), gender, where=a.where) for a, b, gender in sentences]


def _lines(leaf: Leaf) -> Iterator[_Line]:
    for n, line in enumerate(lines(leaf), start=1):
        if line.strip():
            yield _Line(line, f"{leaf.name}, line {n}")


def _gender(line: _Line) -> str:
    """Return the gender of the pronoun in brackets."""
    pronouns = [each.lower() for each in IN_BRACKETS.findall(line.text) if each.lower() in GENDER]
    if not pronouns:
        raise ValueError(must(line.where, "have a pronoun in brackets, such as [he]", repr(line.text[:80])))
    return GENDER[pronouns[-1]]


def _plain(line: str) -> str:
    """Return a line of WinoBias without its number and its brackets."""
    return " ".join(re.sub(r"^\s*\d+\s+|[\[\]]", "", line).split())


def _gap_pair(record: Record) -> Pair:
    text, pronoun = (_cell(record, name) for name in ("Text", "Pronoun"))
    offset = number(record.where, "Pronoun-offset", column(record, "Pronoun-offset"))
    start, end = int(offset), int(offset) + len(pronoun)
    if start != offset or start < 0 or text[start:end] != pronoun:
        rule = f"be the offset of {pronoun!r} in the text"
        raise ValueError(must(f"{record.where}: Pronoun-offset", rule, f"{offset:g}"))
    if pronoun.lower() not in SWAPPED:
        raise ValueError(must(f"{record.where}: Pronoun", f"be one of {', '.join(SWAPPED)}", repr(pronoun)))
    swapped = [each.capitalize() if pronoun[0].isupper() else each for each in SWAPPED[pronoun.lower()]]
    second, *rest = [text[:start] + each + text[end:] for each in swapped]
    return Pair(text, second, GENDER[pronoun.lower()], "", record.where, *rest)


def _own_pairs(found: list[Record], text: str | None, pair: str | None, category: str | None) -> list[Pair]:
    names = [
        named(found, (text,) if text else FIRST, "--text"),
        named(found, (pair,) if pair else SECOND, "--pair"),
    ]
    if names[0] == names[1]:
        raise ValueError(must("pairs: pair", "be another column than the text", repr(names[1])))
    kind = named(found, (category,), "--category") if category else known(found, CATEGORY)

    def item(record: Record) -> Pair:
        sentences = [_cell(record, *each) for each in zip(names, ("--text", "--pair"), strict=True)]
        return Pair(*sentences, _cell(record, kind, "--category") if kind else "", "", record.where)

    return [item(record) for record in found]
