"""A run to report, and the report as a browser without scripts sees it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import small_training
from tiny_scenes import write_scenes

from cac_fast.train import report

EVIL = "</script><img src=x onerror=alert(1)>"
CLASSES = ("sky", EVIL, "box", "never")

_VOID = {"br", "img", "link", "meta"}


def write_data(root: Path) -> Path:
    """5 val images; one class has a hostile name, one never occurs in a mask."""
    write_scenes(root, {"train": (3, 2), "val": (5, 0)})
    colors = ("70 130 180", "128 64 128", "220 20 60", "9 9 9")
    lines = (
        f"{i} {name} {color}\n" for i, (name, color) in enumerate(zip(CLASSES, colors, strict=True))
    )
    (root / "classes.txt").write_text("".join(lines))
    return root


def train(data: Path, output: Path, *more: str) -> list[dict]:
    """Train for seconds, with 2 evaluations; return the lines of metrics.jsonl."""
    short = "--network", "lraspp", "--iterations", "4", "--eval-every", "2"
    return small_training.run(data, output, *short, *more)


@dataclass
class Element:
    """A tag with what is in it."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Element] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.said)

    @property
    def value(self) -> float | None:
        text = self.attributes.get("data-value")
        return None if text is None else float(text)

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """What is inside, at any depth; `_` stands for - in a name."""
        wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        found = []
        for child in self.children:
            if tag in ("", child.tag) and wanted.items() <= child.attributes.items():
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("page")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.said.append(data)


def read(page: str) -> Element:
    """The elements of a page; every tag is closed where it should be."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1
    return reader.open[0]


def written(output: Path, *words: object) -> Element:
    """The report that the command writes for these words."""
    assert report.main([*map(str, words), "--device", "cpu", "--output", str(output)]) == 0
    return read(output.read_text(encoding="utf-8"))


def as_python_sorts(values: list[float | str | None], *, down: bool) -> list[float | str | None]:
    """Missing values last both ways, equal ones in the order they had."""
    known = [value for value in values if value is not None and value == value]
    missing = [None] * (len(values) - len(known))
    assert not any(isinstance(value, float) and math.isinf(value) for value in known)
    return sorted(known, reverse=down) + missing
