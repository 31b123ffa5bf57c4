"""The sheet of images where two networks differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_folders import one_line, write_image, write_mask
from PIL import Image, ImageDraw, ImageFont

from accuracy import sheet
from cac_fast.train.errors import InputError

GOOD = [0.2, 0.9, 0.5, 0.1, 0.7]
"""Of image n, the share of pixels that the second network has right; the first has half."""


class Network:
    """Right in the left part of every image."""

    def __init__(self, shares: list[float]) -> None:
        self.shares = iter(shares)

    def predict(self, image: Image.Image) -> np.ndarray:
        ids = np.ones((image.height, image.width), np.uint8)
        ids[:, : round(image.width * next(self.shares))] = 0
        return ids


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command; all pixels of the masks are of class 0."""
    root = tmp_path / "data"
    for split, count in (("train", 1), ("test", len(GOOD))):
        for number in range(count):
            write_image(root / f"images/{split}/{number}.png", 40, 100)
            write_mask(root / f"masks/{split}/{number}.png", 40, 100, value=0)
    (root / "classes.txt").write_text("0 road 0 0 255\n1 sky 255 255 0\n")
    networks = {"one": Network([0.5] * 9), "other": Network(GOOD)}
    monkeypatch.setattr(sheet, "load", lambda path: networks[path.name])
    output = ["--output", str(tmp_path / "sheet.png"), "--checkpoints", "one", "other"]
    return ["--dataset", "folder", "--data-dir", str(root), *output]


def test_rows_are_chosen_by_rule(words: list[str], tmp_path: Path, capsys) -> None:
    sheet.main(words)
    assert capsys.readouterr().out.split("\n")[:3] == [
        "gain: 1 +40.0",
        "median: 2 +0.0",
        "least: 3 -40.0",
    ]
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    step = sheet.TILE[1] + 32
    assert picture.shape == (3 * step + 32, 5 * (sheet.TILE[0] + 8) + 8, 3)
    last = picture[:, -sheet.TILE[0] - 8 :]
    greens, reds = ((last == color).all(2) for color in (sheet.SECOND_ALONE, sheet.FIRST_ALONE))
    assert greens[:step].sum() > 5000 and not greens[step:].any()
    assert reds[2 * step :].sum() > 5000 and not reds[: 2 * step].any()


def test_long_names_stay_within_their_columns(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    write = ImageDraw.ImageDraw.text

    def text(pen: ImageDraw.ImageDraw, xy: tuple[int, int], text: str, *more: object) -> None:
        said.append((xy, text))
        write(pen, xy, text, *more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    names = "supervised-dusk-seed1-and-more", "cac-dusk-seed1-and-much-more-" + "x" * 40
    sheet.main([*words, "--captions", *names])
    step, font = sheet.TILE[0] + 8, ImageFont.load_default(15)
    heads = [(xy, text) for xy, text in said if xy[1] < 70 and not text.startswith("gain")]
    for (x, _), text in heads:
        assert x % step == 8 and font.getlength(text) <= sheet.TILE[0]
    # All words of the last head are there, one line below another.
    last = [(y, text) for (x, y), text in heads if x > 4 * step]
    assert len(last) >= 3 and len({y for y, _ in last}) == len(last)
    whole = " ".join(text for _, text in last)
    assert whole.startswith("right: ") and f"alone green, {names[0]} alone red" in whole
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape[0] == 3 * (sheet.TILE[1] + 32) + 32 + 18 * (len(last) - 1)


def test_names_and_mistakes(words: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "names.txt").write_text("2\n3\n")
    sheet.main([*words, "--names", str(tmp_path / "names.txt"), "--rows", "2"])
    # Two images are too few for three kinds; they meet the first two shares.
    assert capsys.readouterr().out.split("\n")[:2] == ["gain: 3 +40.0", ""]
    with pytest.raises(InputError) as error:
        sheet.main([*words, "--split", "val"])
    one_line(error, "the val split", "no image with a mask")


def test_mean_iou_of_an_image() -> None:
    truth = np.array([[0, 0, 1, 1, 255]], np.uint8)
    assert sheet.image_miou(truth, np.array([[0, 1, 1, 1, 0]], np.uint8)) == pytest.approx(
        (1 / 2 + 2 / 3) / 2
    )
    assert sheet.image_miou(truth, np.array([[0, 0, 2, 2, 2]], np.uint8)) == 0.5
    assert sheet.image_miou(np.full((1, 2), 255, np.uint8), truth[:, :2]) == 0


def test_choice() -> None:
    assert sheet.choose([0.0, 3.0, 1.0, -2.0, 2.0, 9.0, 1.0], 2) == {
        "gain": [5, 1],
        "median": [4, 6],
        "least": [0, 3],
    }
    assert sheet.choose([1.0, 2.0, 3.0], 5) == {"gain": [2], "median": [1], "least": [0]}
