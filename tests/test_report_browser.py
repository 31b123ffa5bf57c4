"""The report in a real browser: it stays on its own, its pictures load, its tables sort."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from reported import EVIL, as_python_sorts, written

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright here")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

SILENT = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def report(reported_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs, the first with ties, a class without IoU and one more evaluation."""
    root = tmp_path_factory.mktemp("browser")
    path = shutil.copytree(reported_run, root / "a-copy-of-it") / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    odd = {"kind": "val", "iteration": 9, "miou": 0.9, "pixel_accuracy": None}
    lines.append(odd | {"iou": [0.3, 0.05, 0.3, None]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written(root / "report.html", path.parent, reported_run, "--images", "1")
    return root / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SILENT)
        yield browser
        browser.close()


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, browser: sync_api.Browser, file: Path, **settings: object) -> None:
        self.context = browser.new_context(viewport=WIDE, **settings)
        self.context.set_offline(True)
        self.context.set_default_timeout(120_000)  # runners are busy
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def column(self, table: str, index: int) -> list[float | str | None]:
        """What the cells of a column hold: a text in a `th`, a number or None in a `td`."""
        return self.page.eval_on_selector_all(
            f"table.{table} tbody tr",
            "(rows, index) => rows.map(row => row.cells[index]).map(cell => "
            "cell.tagName === 'TH' ? cell.textContent : "
            "'value' in cell.dataset ? Number(cell.dataset.value) : null)",
            index,
        )

    def sort(self, table: str, index: int) -> str | None:
        """Click on the head of a column; return its `aria-sort`."""
        head = self.page.locator(f"table.{table} thead th").nth(index)
        head.get_by_role("button").click()
        return head.get_attribute("aria-sort")


@contextmanager
def opening(browser: sync_api.Browser, file: Path, **settings: object) -> Iterator[Opened]:
    opened = Opened(browser, file, **settings)
    yield opened
    opened.context.close()


@pytest.fixture
def opened(browser: sync_api.Browser, report: Path) -> Iterator[Opened]:
    with opening(browser, report) as opened:
        yield opened


def unfold(page: sync_api.Page) -> None:
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")


def test_it_says_nothing_and_asks_for_nothing_outside(opened: Opened):
    unfold(opened.page)
    opened.page.wait_for_timeout(200)
    assert opened.said == []
    assert opened.asked and {url.partition(":")[0] for url in opened.asked} <= {"file", "data"}
    assert len([url for url in opened.asked if url.startswith("file:")]) == 1


def test_its_policy_blocks_what_an_injected_tag_would_load(opened: Opened):
    """So that the silence above means something: the browser reports what is blocked."""
    opened.page.evaluate(
        "document.body.append(Object.assign(new Image(), {src: 'https://example.org/x.png'}))"
    )
    opened.page.wait_for_timeout(200)
    assert "Content Security Policy" in " ".join(opened.said)


def test_pictures_load(opened: Opened):
    widths = opened.page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    assert len(widths) == 3 * 6 and all(width == 56 for width in widths)


def test_a_hostile_name_is_text(opened: Opened):
    assert EVIL in opened.column("iou", 0)
    assert opened.page.locator("img:not([src^='data:'])").count() == 0


@pytest.mark.parametrize(
    "table, index", [("iou", 0), ("iou", 1), ("iou", 3), ("evaluations", 0), ("evaluations", 3)]
)
def test_tables_sort_as_python_does(opened: Opened, table: str, index: int):
    unfold(opened.page)
    before = opened.column(table, index)
    assert opened.sort(table, index) == "ascending"
    assert opened.column(table, index) == as_python_sorts(before, down=False)
    assert opened.sort(table, index) == "descending"
    assert opened.column(table, index) == as_python_sorts(before, down=True)
    other = 1 if index == 0 else 0
    opened.sort(table, other)
    sorted_heads = opened.page.locator(f"table.{table} th[aria-sort]")
    assert sorted_heads.count() == 1


def test_equal_values_keep_their_order(opened: Opened):
    names, values = opened.column("iou", 0), opened.column("iou", 1)
    assert values == [0.3, 0.05, 0.3, None]
    opened.sort("iou", 1)
    assert opened.column("iou", 0) == [names[1], names[0], names[2], names[3]]
    opened.sort("iou", 1)
    assert opened.column("iou", 0) == [names[0], names[2], names[1], names[3]]


def test_rows_move_whole(opened: Opened):
    def whole() -> set[tuple[object, ...]]:
        return set(zip(*(opened.column("iou", index) for index in range(4)), strict=True))

    before = whole()
    opened.sort("iou", 1)
    assert whole() == before


def test_the_button_copies_the_csv(opened: Opened):
    opened.context.grant_permissions(["clipboard-read"])
    opened.page.locator("#classes summary").click()
    opened.page.locator("#classes button.copy").click()
    copied = opened.page.evaluate("navigator.clipboard.readText()")
    assert copied.splitlines()[0] == "class,a-copy-of-it,supervised"
    assert copied == opened.page.locator("#classes textarea").input_value()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser: sync_api.Browser, report: Path, scheme: str):
    with opening(browser, report, color_scheme=scheme) as opened:
        opened.page.set_viewport_size(PHONE)
        unfold(opened.page)
        assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        # What scrolls on its own may hold more.
        wide = opened.page.evaluate(
            "[...document.querySelectorAll('body *')].filter(one => "
            "!one.parentElement.closest('.scroll, #headline h2') && "
            "one.getBoundingClientRect().right > innerWidth).map(one => one.outerHTML.slice(0, 80))"
        )
        assert wide == []


def test_dark_mode_and_print_have_readable_text(browser: sync_api.Browser, report: Path):
    seen = {}
    for name, scheme, media in (
        ("light", "light", "screen"),
        ("dark", "dark", "screen"),
        ("print", "dark", "print"),
    ):
        with opening(browser, report, color_scheme=scheme) as opened:
            opened.page.emulate_media(media=media, color_scheme=scheme)
            seen[name] = opened.page.evaluate(
                "(style => [style.color, style.backgroundColor].map(color => "
                "color.match(/[0-9.]+/g).slice(0, 3).reduce((sum, x) => sum + Number(x), 0) / 3))"
                "(getComputedStyle(document.body))"
            )
    assert seen["light"][0] < 60 < 200 < seen["light"][1]
    assert seen["dark"][1] < 60 < 200 < seen["dark"][0]
    assert seen["print"][0] < 60 and seen["print"][1] == 255


def test_all_but_sorting_works_without_scripts(browser: sync_api.Browser, report: Path):
    with opening(browser, report, java_script_enabled=False) as opened:
        assert opened.page.locator("img").first.is_visible()
        assert opened.page.locator("svg.chart").first.is_visible()
        opened.page.locator("#classes summary").click()
        assert opened.page.locator("#classes textarea").is_visible()
        assert not opened.page.locator("#classes button.copy").is_visible()
        assert opened.said == []
