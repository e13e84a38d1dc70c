"""Tables of text in aligned columns, for everything that this package prints."""

from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return `rows` as lines whose columns are two spaces apart.

    Args:
        rows: cells of text, the same number in each row; the first row may be the header.
        right: the indices of the columns that are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.rjust if i in right else str.ljust for i in range(len(widths))]
    lines = (
        "  ".join(f(cell, width) for f, cell, width in zip(align, row, widths, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
