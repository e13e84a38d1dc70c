"""The format of a file, from its first bytes; its ending decides only if they leave a choice."""

import csv
import re

HEAD = 1 << 16  # bytes that are examined
PACKINGS = (
    ("gz", re.compile(rb"\x1f\x8b")),
    ("xz", re.compile(rb"\xfd7zXZ\0")),
    ("bz2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")),
    ("zst", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
    ("tar", re.compile(rb"(?s).{257}ustar")),
)
UNREADABLE = {
    b"%PDF": "a PDF document; extract its text",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PK\x05\x06": "a zip archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\x04\x22\x4d\x18": "lz4-compressed; unpack it",
    b"\x1f\x9d": "compressed by compress (.Z); unpack it",
    b"\x00\x00\xfe\xff": "UTF-32 text; convert it: iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe\x00\x00": "UTF-32 text; convert it: iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8",
    b"{\\rtf": "an RTF document; extract its text",
    b"%!PS": "a PostScript document; extract its text",
    b"\xd0\xcf\x11\xe0": "a document of older Microsoft Office; extract its text",
    b"SQLite format 3\x00": "an SQLite database; write its text to a .jsonl or .csv file",
    b"\x89HDF": "an HDF5 file; write its text to a .jsonl or .csv file",
    b"\x93NUMPY": "a NumPy array; write its text to a .jsonl or .csv file",
    b"\x7fELF": "a program; name a file of text",
    b"\x89PNG": "a PNG image; name a file of text",
    b"\xff\xd8\xff": "a JPEG image; name a file of text",
    b"GIF8": "a GIF image; name a file of text",
}
ARROW_STREAM = b"\xff\xff\xff\xff"
ARROW_FILE = b"ARROW1\0\0"
JSON_OBJECT = re.compile(r'\s*\{\s*"[^"\n]*"\s*:')
JSON_ARRAY = re.compile(r'\s*\[\s*\{\s*"')
MARKUP = re.compile(r"(?i)\s*(<\?xml\b|<!doctype\s+html\b|<html\b)")
HEADER_FIELD = re.compile(r"\w[\w .-]{0,63}")
UNPACKED_NAME = re.compile(r"(?i)(\.(gz|xz|bz2|zst))+$")


def packing(head: bytes) -> str | None:
    """Return gz, xz, bz2, zst or tar if the file is one of these, else None."""
    return next((name for name, magic in PACKINGS if magic.match(head)), None)


def kind(name: str, head: bytes, text_column: str | None) -> str:
    """Return text, json lines, json array, csv, tsv, parquet or arrow for a file without `packing`.

    Raises:
        ValueError: it is known to be something else; the message says what.
    """
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((ARROW_STREAM, ARROW_FILE)):
        return "arrow"
    for magic, what in UNREADABLE.items():
        if head.startswith(magic):
            raise ValueError(f"{name} is {what}")
    text = head.decode("utf-8", "ignore").removeprefix("\ufeff")
    if MARKUP.match(text):
        raise ValueError(f"{name} is an HTML or XML document; extract its text")
    first = text.split("\n", 1)[0]
    ending = UNPACKED_NAME.sub("", name).rpartition(".")[2].lower()
    as_json = ending in ("json", "jsonl", "ndjson")
    if JSON_ARRAY.match(text) or (as_json and text.lstrip().startswith("[")):
        return "json array"
    if JSON_OBJECT.match(text) or as_json:
        return "json lines"
    if ending in ("csv", "tsv"):
        return "tsv" if first.count("\t") >= max(1, first.count(",")) else "csv"
    return _by_header(first, text_column or "text") or "text"


def _by_header(line: str, text_column: str) -> str | None:
    """Return csv or tsv if a line looks like the names of columns and `text_column` is one of them."""
    for kind, delimiter in (("tsv", "\t"), ("csv", ",")):
        try:
            names = next(csv.reader([line], delimiter=delimiter), [])
        except csv.Error:
            continue
        if len(names) > 1 and text_column in names and all(map(HEADER_FIELD.fullmatch, names)):
            return kind
    return None
