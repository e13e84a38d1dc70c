"""Readers of sentences with one tag per word, and of utterances with an intent and one slot tag per word.

Tags are BIO (IOB2, Tjong Kim Sang and Veenstra 1999): B-x begins an entity of type x, I-x continues it, and O
is outside of entities.
"""

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from electra_fast.data.lines import lines
from electra_fast.data.streams import Leaf
from electra_fast.errors import must
from electra_fast.tasks import records as tables
from electra_fast.tasks.items import Tagged, Utterance
from electra_fast.tasks.records import Record, string, strings

TAG = re.compile(r"O|[BI]-\S+")
# A character beyond U+FFFF as its two surrogates, three bytes each; SNIPS has one.
SURROGATE_PAIR = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")
INVALID = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, after decoding with "surrogateescape"


class _Sentence(NamedTuple):
    words: list[str]
    tags: list[str] | None
    places: list[str]  # of each word
    where: str
    intent: str | None = None


def tagged(paths: Sequence[str | Path], *, column: int = -1, repair: bool = False) -> list[Tagged]:
    """Return the sentences of files in CoNLL's format, or of records with ``tokens`` and ``tags``.

    CoNLL's format has one word per line, in the first of several columns that tabs or blanks separate, and a
    blank line after each sentence. Lines with ``-DOCSTART-`` are skipped, and comments: they begin with "# "
    and have no tab. Records are JSON or Parquet with two lists of strings; without ``tags`` they are None.

    Args:
        column: which column of CoNLL's format has the tags; -1 is the last one.
        repair: whether an I-x that does not follow B-x or I-x becomes B-x, as IOB1 means it. One warning
            counts the changed tags.

    Raises:
        FileNotFoundError, ImportError: as in `records.records`.
        ValueError: a word or a tag is missing or empty, or the tags are not BIO; also as in
            `records.records`.
    """
    found = tables.read(paths, "a sentence", lambda leaf: _tagged(leaf, column))
    return [Tagged(s.words, s.tags, s.where) for s in _checked(list(found), repair)]


def utterances(paths: Sequence[str | Path], *, repair: bool = False) -> list[Utterance]:
    """Return the utterances of SNIPS' files, or of records with ``intent`` and ``slots``.

    A file of SNIPS (Coucke et al. 2018) has the utterances of an intent as lists of parts, with or without an
    entity: {"PlayMusic": [{"data": [{"text": "Play "}, {"text": "Blues", "entity": "album"}]}]}. Each part is
    split at blanks, so a part that ends inside a word splits it.

    In records the ``words``, or those of ``text`` that blanks separate, have one tag each in the list
    ``slots``. If a file has no ``intent`` or no ``slots``, they are None.

    Bytes of JSON that are not UTF-8 are decoded as pairs of surrogates or else as Latin-1, with one warning
    that counts them.

    Args:
        repair: as in `tagged`.

    Raises:
        FileNotFoundError, ImportError: as in `records.records`.
        ValueError: there is no word, or not one tag per word, or the tags are not BIO; also as in
            `records.records`.
    """
    invalid: Counter[str] = Counter()
    found = list(tables.read(paths, "an utterance", lambda leaf: _utterances(leaf, invalid)))
    if invalid:
        files = ", ".join(invalid)
        warnings.warn(
            f"{files}: {invalid.total()} bytes that are not UTF-8 were decoded as surrogates or Latin-1",
            stacklevel=2,
        )
    return [Utterance(s.words, s.intent, s.tags, s.where) for s in _checked(found, repair)]


def _checked(sentences: list[_Sentence], repair: bool) -> list[_Sentence]:
    found = [s if s.tags is None else s._replace(tags=_bio(s.tags, s.places, repair)) for s in sentences]
    pairs = itertools.chain.from_iterable(
        zip(old.tags or [], new.tags or [], strict=True) for old, new in zip(sentences, found, strict=True)
    )
    if changed := sum(old != new for old, new in pairs):
        warnings.warn(f"{changed} tags I-x that began an entity became B-x", stacklevel=3)
    return found


def _bio(tags: list[str], places: list[str], repair: bool) -> list[str]:
    found, before = [], "the start of the sentence"
    for tag, place in zip(tags, places, strict=True):
        if not TAG.fullmatch(tag):
            raise ValueError(must(f"{place}: the tag", "be O, B-type or I-type", repr(tag)))
        begin = f"B-{tag[2:]}"
        if tag.startswith("I-") and before not in (tag, begin):
            if not repair:
                remedy = f"change {place.rpartition(', ')[2]} to {begin}, or convert IOB1 with --repair"
                raise ValueError(must(f"{place}: {tag}", f"follow {begin} or {tag}", before, remedy))
            tag = begin
        found.append(tag)
        before = tag
    return found


def _tagged(leaf: Leaf, column: int) -> Iterator[_Sentence]:
    if tables.form(leaf) in ("text", "csv", "tsv"):
        yield from _conll(leaf, column)
        return
    found = list(tables.records_of(leaf))
    labelled = tables.known(found, ("tags",)) is not None
    for record in found:
        tags = tables.column(record, "tags") if labelled else None
        yield _sentence(record.where, tables.column(record, "tokens"), tags)


def _sentence(where: str, words: Any, tags: Any, intent: str | None = None) -> _Sentence:
    """Return a sentence of a record, whose words and tags must be lists of as many strings."""
    if not (words := strings(where, "words", words)):
        raise ValueError(must(where, "have a word", "none"))
    if tags is not None and len(tags := strings(where, "tags", tags)) != len(words):
        raise ValueError(must(where, "have one tag per word", f"{len(tags)} tags for {len(words)} words"))
    places = [f"{where}, word {i}" for i in range(1, len(words) + 1)]
    return _Sentence(words, tags, places, where, intent)


def _conll(leaf: Leaf, column: int) -> Iterator[_Sentence]:
    words, tags, places = [], [], []
    width = None  # columns of the file
    for number, line in enumerate(itertools.chain(lines(leaf), [""]), start=1):
        place = f"{leaf.name}, line {number}"
        cells = _cells(line)
        if not line.strip() or cells[0] == "-DOCSTART-":
            if words:
                yield _Sentence(words, tags, places, places[0])
            words, tags, places = [], [], []
        elif not _is_comment(line, cells, width or 2):
            width = width or len(cells)
            word, tag = _word(cells, width, column, place)
            words.append(word)
            tags.append(tag)
            places.append(place)


def _cells(line: str) -> list[str]:
    line = line.rstrip("\t ")  # LitBank's lines end with a tab.
    return line.split("\t") if "\t" in line else re.split(" +", line)


def _is_comment(line: str, cells: list[str], width: int) -> bool:
    """Return whether a line is a comment, and not the word "#" of a file whose columns blanks separate."""
    is_word = len(cells) == width and TAG.fullmatch(cells[-1])
    return line.startswith("# ") and "\t" not in line and not is_word


def _word(cells: list[str], width: int, column: int, place: str) -> tuple[str, str]:
    """Return the word and the tag of a line."""
    if len(cells) < 2:
        raise ValueError(must(place, "have a word and a tag", repr(cells[0])))
    if len(cells) != width:
        raise ValueError(must(place, f"have {width} columns, as the lines before it", len(cells)))
    if not -width <= column < width:
        raise ValueError(must(place, f"have a column {column}", f"{width} columns, of which the first is 0"))
    return string(place, "the word", cells[0]), string(place, "the tag", cells[column])


def _utterances(leaf: Leaf, invalid: Counter[str]) -> Iterator[_Sentence]:
    if tables.form(leaf) == "json":
        text, count = _decoded(leaf.buffered().read())
        if count:
            invalid[leaf.name] = count
        found = list(tables.json_records(leaf.name, text.removeprefix("\ufeff")))
    else:
        found = list(tables.records_of(leaf))
    if all(map(_is_snips, found)):
        yield from itertools.chain.from_iterable(map(_snips, found))
        return
    has_words, has_intent, has_slots = (tables.known(found, (c,)) for c in ("words", "intent", "slots"))
    for record in found:
        if has_words:
            words = tables.column(record, "words")
        else:
            words = string(record.where, "text", tables.column(record, "text")).split()
        slots = tables.column(record, "slots") if has_slots else None
        intent = _intent(record.where, tables.column(record, "intent")) if has_intent else None
        yield _sentence(record.where, words, slots, intent)


def _decoded(data: bytes) -> tuple[str, int]:
    """Return the text of bytes in UTF-8, and how many of them are not UTF-8."""
    data, pairs = SURROGATE_PAIR.subn(
        lambda pair: (
            pair[0]
            .decode("utf-8", "surrogatepass")
            .encode("utf-16", "surrogatepass")
            .decode("utf-16")
            .encode()
        ),
        data,
    )
    text, others = INVALID.subn(
        lambda byte: chr(ord(byte[0]) - 0xDC00), data.decode("utf-8", "surrogateescape")
    )
    return text, 6 * pairs + others


def _intent(where: str, value: Any) -> str:
    return string(where, "intent", value).strip()


def _is_snips(record: Record) -> bool:
    found = record.fields.values()
    return bool(found) and all(isinstance(v, list) and v and isinstance(v[0], dict) for v in found)


def _snips(record: Record) -> Iterator[_Sentence]:
    for intent, found in record.fields.items():
        for i, utterance in enumerate(found, start=1):
            where = f"{record.file}, utterance {i} of {intent}"
            parts = utterance.get("data") if isinstance(utterance, dict) else None
            if not isinstance(parts, list) or not all(map(_is_part, parts)):
                raise ValueError(
                    must(where, "be a list of parts with a text under 'data'", repr(utterance)[:80])
                )
            words, slots = [], []
            for part in parts:
                split = part["text"].split()
                words += split
                slots += _slots(part.get("entity"), len(split))
            yield _sentence(where, words, slots, _intent(where, intent))


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _slots(entity: Any, count: int) -> list[str]:
    """Return the tags of the words of a part."""
    if entity is None:
        return ["O"] * count
    return [f"{'I' if i else 'B'}-{entity}" for i in range(count)]
