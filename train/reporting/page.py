"""The page as one text: style, script and pictures are inside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cac_fast
from cac_fast.train.errors import InputError
from cac_fast.train.reporting import classes, sections
from cac_fast.train.reporting.gather import Run
from cac_fast.train.reporting.images import Album, pictures, steps
from cac_fast.train.reporting.text import escape

MOST_BYTES = 10_000_000

# What the page asks of the browser: to load nothing from anywhere, and to say so where it would.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_PARTS = {
    "headline": "Results",
    "settings": "Settings",
    "curves": "Curves",
    "classes": "Classes",
    "confusion": "Confusion",
    "images": "Images",
    "speed": "Speed",
}


def build(runs: Sequence[Run], albums: Sequence[Album], count: int) -> str:
    """The page, in UTF-8 at most `MOST_BYTES` long.

    count: images of each kind; where they take too much the page has smaller or fewer of them.

    Raises:
        InputError: it is too long without any picture.
    """
    for fit in steps(count):
        page = _page(runs, pictures(runs, albums, fit))
        if len(page.encode()) <= MOST_BYTES:
            return page
    raise InputError(
        f"the report of {len(runs)} runs is longer than {MOST_BYTES / 1e6:g} MB without any "
        "picture: name fewer runs"
    )


def _page(runs: Sequence[Run], images: str) -> str:
    names = ", ".join(run.name for run in runs)
    style, script = (
        Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js")
    )
    links = "".join(f'<a href="#{name}">{text}</a>' for name, text in _PARTS.items())
    parts = (
        sections.headline(runs),
        sections.settings(runs),
        sections.curves(runs),
        classes.iou(runs),
        classes.confusion(runs),
        images,
        sections.speed(runs),
        sections.all_of_them(runs),
    )
    title = names if len(runs) == 1 else f"{len(runs)} runs"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Report: {escape(names)}</title>\n<style>\n{style}</style></head>\n<body>"
        f"<header><p>Training report</p><h1>{escape(title)}</h1><nav>{links}</nav></header>\n"
        f"<main>{chr(10).join(parts)}</main>\n"
        f"<footer>Made with cac_fast {escape(cac_fast.__version__)}</footer>\n"
        f"<script>\n{script}</script></body></html>\n"
    )
