"""Parts of the page that are not charts."""

from html import escape


def table(head: list[str], rows: list[list[str]], words: tuple[str, ...] = ()) -> str:
    """Return a table that scrolls inside its box; the first column and `words` are text, others numbers."""
    kinds = ["words" if i == 0 or column in words else "number" for i, column in enumerate(head)]
    top = "".join(f'<th scope="col" class="{k}">{escape(c)}</th>' for c, k in zip(head, kinds, strict=True))
    body = []
    for row in rows:
        cells = [f'<td class="{k}">{escape(c)}</td>' for c, k in zip(row[1:], kinds[1:], strict=True)]
        body.append(f'<tr><th scope="row" class="words">{escape(row[0])}</th>{"".join(cells)}</tr>')
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{inner}</div>'


def folded(summary: str, inner: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inner}</details>"


def paragraph(text: str, style: str = "") -> str:
    return f"<p{f' class={style}' if style else ''}>{escape(text)}</p>"


def section(title: str, *parts: str) -> str:
    return f"<section><h3>{escape(title)}</h3>{''.join(parts)}</section>"


def items(lines: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
