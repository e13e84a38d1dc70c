"""Texts and pairs of texts: read as the options of a run say, and encoded."""

from collections.abc import Iterator, Sequence
from typing import Any

from electra_fast.tasks.examples import Examples, assemble, token_ids
from electra_fast.tasks.glue import glue
from electra_fast.tasks.items import Text
from electra_fast.tasks.readers import texts


def read_texts(options: Any, paths: Sequence[str], role: str, score: bool = False) -> list[Text]:
    """Return the texts of files; arguments and errors as in `readers.texts`, or `glue` with ``--glue``."""
    if options.glue:
        return [item for folder in paths for item in glue(folder, options.glue, role)]
    return texts(
        paths,
        text=options.text,
        pair=options.pair,
        label=options.label,
        separator=options.separator,
        columns=options.columns or None,
        score=score,
        role=role,
    )


def encode_texts(items: Sequence[Text], tokenizer: Any, max_len: int) -> Examples:
    """Return the sequences of texts and pairs, without targets."""
    first = token_ids([item.text for item in items], tokenizer)
    found = zip(items, token_ids([item.pair or "" for item in items], tokenizer), strict=True)
    second = [None if item.pair is None else ids for item, ids in found]
    return assemble(first, second, tokenizer, max_len)


def unlabelled(items: Sequence[Text]) -> str | None:
    """Return an error about the first text without a label or score, None if all have one."""
    places = (item.where for item in items if item.label is None)
    return next((f"{where}: the text has no label; name its column with --label" for where in places), None)


def texts_of(items: Sequence[Text]) -> Iterator[str]:
    """Yield the texts of items, both of a pair."""
    for item in items:
        yield from (item.text, item.pair) if item.pair is not None else (item.text,)
