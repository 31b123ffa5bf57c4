"""Text and numbers of files as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from cac_fast.train.reporting.gather import number


def escape(text: object) -> str:
    """Text for HTML, in an attribute too; bytes of a name that are no UTF-8 become `\\xNN`."""
    text = str(text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return html.escape(text, quote=True)


def cell(value: Any, form: str = ".4f", name: str = "") -> str:
    """A `<td>` of a number, which `data-value` holds in full; "-" for what is missing."""
    named = f' data-name="{escape(name)}"' if name else ""
    if number(value) is None:
        return f'<td class="number"{named}>-</td>'
    return f'<td class="number"{named} data-value="{value!r}">{value:{form}}</td>'


def span(value: Any, form: str = ".4f", name: str = "") -> str:
    """As `cell`, inside a line of text."""
    return cell(value, form, name).replace("<td", "<span").replace("</td>", "</span>")


def head(texts: Sequence[str], *, words: int = 1) -> str:
    """The head of a table that can be sorted; the first `words` columns hold text."""
    cells = (
        f'<th scope="col"{"" if index < words else " class=number"}'
        f' data-kind="{"text" if index < words else "number"}">'
        f'<button type="button">{escape(text)}</button></th>'
        for index, text in enumerate(texts)
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def table(head: str, rows: Sequence[str], *, foot: str = "", kind: str = "") -> str:
    """A table that scrolls on its own where it is wider than the page."""
    named = f' class="{kind}"' if kind else ""
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table{named}>{head}<tbody>{body}</tbody>{foot}'
        "</table></div>"
    )
