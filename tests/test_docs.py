"""What README.md and docs/ promise: a short first page, live links, an example that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "csrc", "csrc/cuda", "docs", "kernels")
PAGES = [
    ROOT / "README.md",
    *(page for name in FOLDERS for page in sorted((ROOT / name).glob("*.md"))),
]
MOST_LINES = 130

_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings, for links with a #."""
    headings = _HEADING.findall(_CODE.sub("", page.read_text(encoding="utf-8")))
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def python_snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not dead_links(page)


@pytest.mark.parametrize("page", ["README.md", "docs/loss.md"])
def test_the_example_of_the_loss_runs(page: str) -> None:
    (snippet,) = python_snippets(ROOT / page)
    names: dict[str, object] = {}
    exec(compile(snippet, page, "exec"), names)
    assert names["loss"].isfinite()
