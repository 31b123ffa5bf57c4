"""What the start of a run and train/check.py say about the masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import small_training
import tiny_scenes
from data_folders import DATA, needs_camvid, write_image
from PIL import Image

from cac_fast.train import check, config, main, pictures
from cac_fast.train.data import forms, opening
from cac_fast.train.data.images import read_image
from cac_fast.train.data.inventory import Inventory, Part, Seen
from cac_fast.train.data.layouts import SegmentationData, open_data

COLORS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))


def write(root: Path, labeled: Sequence[np.ndarray], val: Sequence[np.ndarray], k: int = 3) -> Path:
    """A folder of these masks, with images of their sizes."""
    root.mkdir(parents=True, exist_ok=True)
    lines = [f"{i} {'abc'[i]} {' '.join(map(str, COLORS[i]))}\n" for i in range(k)]
    (root / "classes.txt").write_text("".join(lines))
    for split, masks in (("train", labeled), ("val", val)):
        for index, ids in enumerate(masks):
            write_image(root / f"images/{split}/{index}.png", *ids.shape, seed=index)
            path = root / f"masks/{split}/{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(ids.astype(np.uint8)).save(path)
    return root


def mask(*ids: int) -> np.ndarray:
    """Rows of 8 pixels, one an id."""
    return np.repeat(np.array(ids)[:, None], 8, axis=1)


def take(root: Path, dataset: str = "folder") -> Inventory:
    inventory, broken = check.take_inventory(open_data(dataset, root))
    assert broken == []
    return inventory


def test_pixels_of_each_class(tmp_path):
    root = write(tmp_path, [mask(0, 1, 2, 2), mask(1, 255)], [mask(0, 1, 2)])
    write_image(root / "images/train/more.png")
    inventory = take(root)
    labeled, val, test = inventory.parts
    assert labeled.pixels[[0, 1, 2, 255]].tolist() == [8, 16, 16, 8]
    assert labeled.masks[[0, 1, 2, 255]].tolist() == [1, 2, 1, 1]
    assert (labeled.images, len(labeled.seen), test.images) == (3, 2, 0)
    assert labeled.share(1) == 0.4 and labeled.ignored == 1 / 6 and val.ignored == 0
    assert inventory.table().splitlines() == [
        "    class                   labeled  masks  validation  masks",
        "  0 a                       20.00 %      1     33.33 %      1",
        "  1 b                       40.00 %      2     33.33 %      1",
        "  2 c                       40.00 %      1     33.33 %      1",
        "255 ignored, of all         16.67 %      1      0.00 %      0",
        "    pixels                       48      2          24      1",
        "    images without mask           1                  0",
    ]
    assert inventory.warnings() == [] and inventory.refusal() is None


def warned(root: Path, *words: str) -> str:
    found = take(root).warnings()
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found
    return found[0]


def test_class_without_a_pixel(tmp_path):
    root = write(tmp_path, [mask(0, 1)], [mask(0, 1, 2)])
    warned(root, "no pixel of 'c' is in the labeled masks")
    root = write(tmp_path, [mask(0, 1, 2)], [mask(0, 1)])
    warned(root, "no pixel of 'c' is in the validation masks")


def test_mostly_ignored(tmp_path):
    masks = [mask(0, 1, 2, *[255] * 4)]
    warned(write(tmp_path / "1", masks, [mask(0, 1, 2)]), "57.14 % of the pixels of the labeled")
    assert take(write(tmp_path / "2", [mask(0, 1, 2, 255, 255, 255)], [])).warnings() == []


def test_zero_and_255_with_two_classes(tmp_path):
    root = write(tmp_path / "all", [mask(0, 255)] * 2, [mask(0, 1)], k=2)
    reason = take(root).refusal()
    assert "hold the id 0 ('a') and 255, which is ignored: write the object as 1" in reason
    root = write(tmp_path / "some", [mask(0, 1), mask(0, 255)], [mask(0, 1)], k=2)
    warned(root, "1 labeled masks hold 0 and 255 alone", "if it is 'b', write 1 (1)")
    assert take(root).refusal() is None


@pytest.mark.parametrize(
    ("labeled", "val", "k", "words"),
    [
        ([mask(255)], [mask(0)], 3, "every pixel of all 1 labeled masks is 255"),
        ([mask(0, 1)], [mask(255)], 3, "every pixel of all 1 validation masks is 255"),
        ([mask(1, 1)], [mask(0, 1)], 3, "hold the id 1 ('b') alone"),
        ([mask(0, 0)], [mask(0)], 1, "'a' is the only class"),
        ([], [mask(0)], 3, "no training image"),
    ],
)
def test_no_training_can_come_of_it(tmp_path, labeled, val, k, words):
    root = write(tmp_path, labeled, val, k)
    write_image(root / "images/train/more.png")
    assert words in take(root).refusal()


@pytest.mark.parametrize(("name", "says"), [("person", 1), ("Unlabelled", 0), ("void", 0)])
def test_class_that_takes_the_ignored_id(tmp_path, name, says):
    root = write(tmp_path, [mask(0, 1, 2)], [mask(0, 1, 2)])
    with (root / "classes.txt").open("a") as file:
        file.write(f"255 {name} 1 2 3\n")
    found = take(root).warnings()
    assert len(found) == says and all("gives the id 255 to 'person'" in line for line in found)


def test_palette_that_disagrees(tmp_path):
    root = write(tmp_path, [mask(0, 1, 2)] * 2, [mask(0, 1, 2)])

    def paint(colors) -> None:
        image = Image.fromarray(mask(0, 1, 2).astype(np.uint8)).convert("P")
        image.putpalette([value for color in colors for value in color])
        image.save(root / "masks/train/1.png")

    paint((COLORS[0], COLORS[2], COLORS[1]))
    warned(root, "1 labeled masks hold a palette", "1 is (0, 0, 200) there, that of 'c'", "'b'")
    paint((COLORS[0], (7, 8, 9), COLORS[2]))
    warned(root, "1 is (7, 8, 9) there, but 'b' is (0, 200, 0)")
    for agreeing in (COLORS, [(i, i, i) for i in range(3)]):
        paint(agreeing)
        assert take(root).warnings() == []


@pytest.mark.parametrize(("orientation", "height", "says"), [(3, 24, 1), (6, 32, 1), (1, 24, 0)])
def test_images_that_exif_turns_in_place(tmp_path, orientation, height, says):
    root = write(tmp_path, [np.arange(height * 32).reshape(height, 32) % 3], [mask(0, 1, 2)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(write_image(root / "images/train/0.png", height)).save(
        root / "images/train/0.png", exif=exif
    )
    found = take(root).warnings()
    assert len(found) == says and all("turned by their EXIF" in line for line in found)


def test_images_that_are_almost_black_or_have_a_fourth_band(tmp_path):
    root = write(tmp_path, [mask(0, 1, 2)], [mask(0, 1, 2)])
    Image.new("RGB", (8, 3), (15, 0, 3)).save(root / "images/train/0.png")
    warned(root, "1 labeled images are black or almost so")
    (root / "images/train/0.png").unlink()
    Image.new("RGBA", (8, 3), (150, 0, 3, 9)).save(root / "images/train/0.tif")
    warned(root, "1 labeled images have a fourth band", "(0)")


def test_a_cache_tells_the_pixels_alone(tmp_path, monkeypatch):
    from cac_fast.train.data.cache import PixelReader
    from cac_fast.train.data.loaders import check_samples

    data = open_data("folder", write(tmp_path, [mask(0, 1, 2, 2)], []))
    reader = PixelReader(data, tmp_path / "cache")
    reader.fill(data.splits["train"], data.splits["train"])
    monkeypatch.setattr(forms, "header", None)  # no file is opened
    (seen,) = check_samples(data.splits["train"], reader)
    assert seen.counts[:3].tolist() == [8, 8, 16]


def imaginary(pixels: Sequence[int]) -> Part:
    counts = np.zeros(256, int)
    counts[: len(pixels)] = pixels
    return Part("labeled", [Seen("a", counts)])


def test_small_shares_and_large_counts():
    data = SegmentationData("folder", Path("."), ("a", "b"), COLORS[:2], {})
    table = Inventory(data, [imaginary([10**9, 1])]).table()
    assert "<0.01 %" in table and "100.00 %" in table and "1.0 G" in table


def test_a_run_begins_with_the_table(tmp_path, capfd):
    root = tiny_scenes.write_scenes(tmp_path / "data", {"train": (3, 1), "val": (1, 0)})
    (root / "masks/train/lost.png").write_bytes((root / "masks/train/00.png").read_bytes())
    arguments = small_training.arguments(root, tmp_path / "run", "--iterations", "1")
    assert main.main(arguments) == 0
    out, err = capfd.readouterr()
    assert "255 ignored, of all" in out and "sky" in out
    (warning,) = [line for line in err.splitlines() if line.startswith("warning")]
    assert "1 of the masks in" in warning and "lost.png" in warning


@pytest.mark.parametrize(("method", "most"), [("cac", 64), ("cac", 2), ("supervised", 64)])
def test_a_run_tells_of_dark_images_without_a_mask(tmp_path, monkeypatch, method, most):
    root = write(tmp_path / "data", [mask(0, 1, 2)] * 2, [mask(0, 1, 2)])
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for index in range(3):
        Image.fromarray(values).save(root / f"images/train/low{index}.png")
    Image.fromarray(values << 4).save(root / "images/train/of_12_bits.png")
    Image.new("RGBA", (8, 3), (150, 0, 3, 9)).save(root / "images/train/band.tif")
    (root / "images/train/broken.png").write_bytes(b"no image")
    write_image(root / "images/train/plain.png")
    read: list[str] = []
    monkeypatch.setattr(opening, "MAX_DECODED", most)
    monkeypatch.setattr(
        opening, "read_image", lambda path: read.append(path.stem) or read_image(path)
    )
    given = small_training.arguments(root, tmp_path / "run", "--method", method)
    settings = config.parse(given)
    warnings = opening.open_inputs(settings, with_unlabeled=method == "cac").warnings
    if method == "supervised":
        assert warnings == [] == read
        return
    banded, dark = warnings
    assert "1 unlabeled images have a fourth band" in banded and "(band)" in banded
    if most == 2:
        assert "2 unlabeled images are black" in dark and "(low0, low2)" in dark
        assert dark.endswith("(2 of the 4 images of 16 bits were looked at)")
    else:
        assert "3 unlabeled images are black" in dark and dark.endswith("(low0, low1, low2)")
    assert len(read) == min(most, 4)  # none of 8 bits


def run_check(root: Path, *more: object) -> int:
    return check.main(["--dataset", "folder", "--data-dir", str(root), *map(str, more)])


def test_check_prints_writes_and_draws(tmp_path, capfd):
    root = write(tmp_path / "data", [mask(*[0, 1, 255] * 8)] * 14, [mask(*[0, 1, 2] * 8)] * 5)
    files = tmp_path / "found.json", tmp_path / "sheet.png"
    assert run_check(root, "--json", files[0], "--sheet", files[1]) == 0
    out, err = capfd.readouterr()
    inventory = take(root)
    assert inventory.table() in out
    assert err.splitlines() == [f"warning: {line}" for line in inventory.warnings()] != []
    found = json.loads(files[0].read_text())
    assert found["parts"]["labeled"] == {
        "images": 14, "masks": 14, "pixels": 14 * 24 * 8, "ignored_pixels": 14 * 8 * 8,
    }  # fmt: skip
    assert found["classes"][1]["pixels"] == {"labeled": 14 * 64, "validation": 5 * 64, "test": 0}
    assert found["warnings"] == inventory.warnings() and found["broken"] == []
    # Twelve of the labeled images and four of validation, in tiles of one size.
    sheet = Image.open(files[1])
    assert sheet.width == 4 * (pictures.TILE[0] + 16) + 16
    assert sheet.height > 4 * pictures.TILE[1]


def test_overlay_is_the_mask_over_the_image(tmp_path):
    root = write(tmp_path, [np.repeat(mask(*[0] * 60, *[255] * 60), 20, 1)], [])
    Image.new("RGB", (160, 120), (100, 100, 100)).save(root / "images/train/0.png")
    data = open_data("folder", root)
    tile = np.asarray(pictures._tile(data.splits["train"][0], data)).astype(int)
    assert tile.shape == (240, 320, 3)
    mixed = 100 + pictures.OPACITY * (np.array(COLORS[0]) - 100)
    assert np.abs(tile[20, 20] - mixed).max() <= 1
    assert (tile[120, 50] == 255).all()  # the border between them
    ignored = tile[200, :16]
    assert (ignored[:, 0] == ignored[:, 2]).all() and len(np.unique(ignored)) == 2


def test_check_names_what_is_broken(tmp_path, capfd):
    root = write(tmp_path / "data", [mask(0, 1, 2)] * 3, [mask(0, 1, 2)])
    write_image(root / "images/train/more.png").write_bytes(b"no image")
    Image.fromarray(mask(0, 77).astype(np.uint8)).save(root / "masks/train/1.png")
    assert run_check(root) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "warning", "error"]
    assert "id 77" in lines[0] and "more.png" in lines[1] and "2 files cannot be used" in lines[2]
    assert "33.33 %      2" in out  # of those that can


def test_check_looks_at_images_without_a_mask_too(tmp_path, capfd):
    root = write(tmp_path / "data", [mask(0, 1, 2)] * 2, [mask(0, 1, 2)])
    Image.new("RGB", (8, 3), (15, 0, 3)).save(root / "images/train/dark.png")
    Image.new("RGBA", (8, 3), (150, 0, 3, 9)).save(root / "images/train/band.tif")
    assert run_check(root, "--json", tmp_path / "found.json") == 0
    err = capfd.readouterr().err
    assert "1 unlabeled images are black or almost so" in err and "(dark)" in err
    assert "1 unlabeled images have a fourth band" in err and "(band)" in err
    assert len(json.loads((tmp_path / "found.json").read_text())["warnings"]) == 2


@pytest.mark.parametrize("name", ["s.psd", "s.xyz", "s"])
def test_check_refuses_a_sheet_that_it_cannot_write(tmp_path, capfd, name):
    root = write(tmp_path / "data", [mask(0, 1, 2)], [mask(0, 1, 2)])
    assert run_check(root, "--sheet", tmp_path / name) == 2
    assert "end it with .png or .jpg" in capfd.readouterr().err


@needs_camvid
def test_camvid():
    inventory = take(DATA / "camvid")
    assert inventory.warnings() == [] and inventory.refusal() is None
    assert inventory.parts[0].masks[:11].min() == 173


@pytest.mark.parametrize("linked", [False, True])
def test_labeled_images_that_are_scored(tmp_path, linked):
    root = write(tmp_path, [mask(0, 1, 2), mask(0, 1, 2)], [mask(0, 1, 2)])
    arguments = ["--dataset", "folder", "--data-dir", str(root)]
    if linked:
        (root / "images/train/1.png").unlink()
        (root / "images/train/1.png").symlink_to(root / "images/val/0.png")
    else:
        listed = root / "labeled.txt"
        listed.write_text("images/train/0.png\nimages/val/0.png\n")
        arguments += ["--labeled", str(listed)]
    warnings = opening.open_inputs(config.parse(arguments), False).warnings
    assert len(warnings) == 1 and warnings[0].startswith("1 labeled images are validation images")
