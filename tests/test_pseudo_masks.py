"""Pseudo masks of a network that is known: what is written, kept, deleted, shown and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from red_network import red_network
from test_classify import masks_of, times_of

from cac_fast.train.data.layouts import open_data
from cac_fast.train.errors import InputError
from cac_fast.train.weak.labels import ImageLabels
from cac_fast.train.weak.masks import CamSettings, MaskWriter, confusion
from cac_fast.train.weak.report import as_table, describe_masks


@pytest.fixture
def red_squares(tmp_path: Path) -> tuple[Any, ImageLabels]:
    """Red squares on blue, classes background and red; the last image has no mask."""
    root, names = tmp_path / "data", ("a", "b", "sub/c")
    root.mkdir()
    (root / "classes.txt").write_text("0 background 0 0 0\n1 red 255 0 0\n")
    for index, name in enumerate(names):
        ids = np.zeros((96, 128), np.uint8)
        ids[16 : 48 + 16 * index, 32:80] = 1
        pixels = np.array([[0, 0, 255], [255, 0, 0]], np.uint8)[ids]
        for folder, values in (("images", pixels), ("masks", ids)):
            path = root / folder / "train" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if folder == "images" or index < 2:
                Image.fromarray(values).save(path)
    data = open_data("folder", root)
    samples = data.splits["train"]
    assert [sample.name for sample in samples] == list(names)
    return data, ImageLabels(samples, ((1,), (1,), (1,)), "by hand")


def test_masks_of_a_network_that_reads_red(
    red_squares: tuple[Any, ImageLabels], tmp_path: Path
) -> None:
    data, labels = red_squares
    settings = CamSettings(scales=(1.0,))
    writer = MaskWriter(red_network(), "hash", labels, data, settings, tmp_path / "out")
    assert writer.write() == 0
    masks = masks_of(tmp_path / "out")
    assert list(masks) == ["a.png", "b.png", "sub/c.png"]
    about = describe_masks(labels, writer.paths, data)
    counts = np.zeros((2, 2), np.int64)
    pixels, known = np.zeros(256, np.int64), np.zeros(2, np.int64)
    for sample, mask in zip(labels.samples, masks.values(), strict=True):
        for value in mask.ravel():
            pixels[value] += 1
        if sample.mask is not None:
            truth = data.read_mask(sample.mask)
            for true, given in zip(truth.ravel(), mask.ravel(), strict=True):
                known[true] += 1
                if given != 255:
                    counts[true, given] += 1
    assert pixels[255] and pixels[0] and pixels[1]  # as a file of 4 bits could not hold
    assert about["with_truth"] == 2 and about["covered"] == 1 - pixels[255] / pixels.sum()
    iou = [counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c]) for c in (0, 1)]
    assert about["masks"]["miou"] == pytest.approx(np.mean(iou)) and min(iou) > 0.8
    assert about["masks"]["pixel_accuracy"] == pytest.approx(counts.trace() / counts.sum())
    red = about["classes"][1]
    assert (red["name"], red["images"], red["image_share"]) == ("red", 3, 1.0)
    assert red["precision"] == pytest.approx(counts[1, 1] / counts[:, 1].sum())
    # A mask of background alone: red's IoU is 0, background's its share.
    constant = about["most_frequent"]
    assert constant["class"] == "background"
    assert constant["all_pixels"]["miou"] == pytest.approx(known[0] / known.sum() / 2)
    covered = counts.sum(1)
    assert constant["covered_pixels"]["pixel_accuracy"] == pytest.approx(covered[0] / covered.sum())
    table = as_table(about)
    for number in (about["masks"]["miou"], about["irn"]["miou"]):
        assert f"mIoU {number:.4f}" in table
    # irn's figure decides every pixel, at 0.15 of the peak.
    irn = np.zeros((2, 2), np.int64)
    for sample in labels.samples[:2]:
        maps = writer.maps(Image.open(sample.image), (1,))[0].numpy()
        given = (maps > np.float32(0.15)).astype(int)
        np.add.at(irn, (data.read_mask(sample.mask), given), 1)
    iou = [irn[c, c] / (irn[c].sum() + irn[:, c].sum() - irn[c, c]) for c in (0, 1)]
    assert about["irn"]["miou"] == pytest.approx(np.mean(iou))
    assert about["irn"]["pixel_accuracy"] == pytest.approx(irn.trace() / irn.sum())


def test_masks_of_another_network_are_made_anew(
    red_squares: tuple[Any, ImageLabels], tmp_path: Path
) -> None:
    data, labels = red_squares
    others = ImageLabels(labels.samples, ((1,), (), (1,)), "by hand")
    kept = []
    for checkpoint_hash, given in (
        ("one", labels),
        ("one", labels),
        ("one", others),
        ("two", others),
    ):
        before = times_of(tmp_path)
        MaskWriter(red_network(), checkpoint_hash, given, data, CamSettings(), tmp_path).write()
        kept.append([before.get(path) == time for path, time in sorted(times_of(tmp_path).items())])
    assert kept == [[False] * 3, [True] * 3, [True, False, True], [False] * 3]


def test_maps_of_a_long_strip(red_squares: tuple[Any, ImageLabels], tmp_path: Path) -> None:
    data, labels = red_squares
    strip = Image.new("RGB", (700, 20), (0, 0, 255))
    strip.paste((255, 0, 0), (100, 0, 300, 20))
    writer = MaskWriter(red_network(), "hash", labels, data, CamSettings(), tmp_path)
    maps = writer.maps(strip, (1,))
    assert maps.shape == (1, 20, 700) and writer.maps(strip, ()).shape == (0, 20, 700)
    assert maps[0, :, 140:260].min() > 0.9 and maps[0, :, 340:].max() == maps[0, :, :60].max() == 0


def test_sheet_shows_image_heat_mask_and_truth(
    red_squares: tuple[Any, ImageLabels], tmp_path: Path
) -> None:
    data, labels = red_squares
    MaskWriter(red_network(), "hash", labels, data, CamSettings(), tmp_path).write()
    pixels = np.array(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (3 * 96, 4 * 128, 3)
    image, heat, mask, truth = (pixels[:96, 128 * i : 128 * (i + 1)] for i in range(4))
    inside, outside = (32, 56), (80, 8)
    assert image[inside].tolist() == [255, 0, 0] and image[outside].tolist() == [0, 0, 255]
    assert heat[inside].min() > heat[outside].min()
    assert mask[inside].tolist() == truth[inside].tolist() == [255, 0, 0]
    assert mask[outside].tolist() == truth[outside].tolist() == [0, 0, 0]
    assert (pixels[2 * 96 :, 3 * 128 :] == 255).all()  # no truth


def test_without_truth_there_are_no_scores(red_squares: tuple[Any, ImageLabels]) -> None:
    data, labels = red_squares
    one = ImageLabels(labels.samples[2:], ((),), "by hand")
    about = describe_masks(one, [Path("nowhere/c.png")], data)
    assert about["masks"] == about["irn"] == {"miou": None, "pixel_accuracy": None}
    assert about["most_frequent"]["class"] is None
    assert "true masks" not in as_table(about)


def test_confusion_leaves_out_what_either_ignores() -> None:
    truth, mask = np.array([[0, 1, 255, 1]], np.uint8), np.array([[1, 255, 0, 1]], np.uint8)
    assert confusion(truth, mask, 2).tolist() == [[0, 1], [0, 1]]


def written(
    folder: Path, data: Any, labels: ImageLabels, checkpoint: str = "hash", code: int = 0
) -> list[str]:
    """The masks that a writer leaves in a folder."""
    settings = CamSettings(scales=(1.0,))
    assert MaskWriter(red_network(), checkpoint, labels, data, settings, folder).write() == code
    return list(masks_of(folder))


def test_masks_of_images_that_have_no_labels_any_more_are_deleted(
    red_squares: tuple[Any, ImageLabels], tmp_path: Path
) -> None:
    data, labels = red_squares
    assert written(tmp_path, data, labels) == ["a.png", "b.png", "sub/c.png"]
    by_hand = tmp_path / "masks/drawn.png"  # not ours to delete
    Image.new("P", (8, 8)).save(by_hand)
    (tmp_path / "pseudo.json").write_text("{}")
    fewer = ImageLabels(labels.samples[:2], labels.labels[:2], "by hand")
    times = times_of(tmp_path)
    assert written(tmp_path, data, fewer) == ["a.png", "b.png", "drawn.png"]
    assert Image.open(tmp_path / "sheet.png").height == 2 * 96
    assert not (tmp_path / "pseudo.json").exists()
    assert all(times[path] == time for path, time in times_of(tmp_path).items())


def test_an_image_that_became_unreadable_loses_its_outdated_mask(
    red_squares: tuple[Any, ImageLabels], tmp_path: Path
) -> None:
    data, labels = red_squares
    written(tmp_path, data, labels)
    labels.samples[1].image.write_bytes(b"no image")
    assert written(tmp_path, data, labels, "another", code=1) == ["a.png", "sub/c.png"]


def test_an_interruption_leaves_no_sheet_of_other_masks(
    red_squares: tuple[Any, ImageLabels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, labels = red_squares
    written(tmp_path, data, labels)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", lambda *_, **__: stop())
        written(tmp_path, data, labels, "another")
    assert not (tmp_path / "sheet.png").exists()


def stop() -> None:
    raise KeyboardInterrupt


def test_an_image_too_large_for_its_maps_is_named(
    red_squares: tuple[Any, ImageLabels], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(MaskWriter, "maps", full)
    with pytest.raises(InputError, match=r"a\.png \(128 x 96\).*smaller --cam-scales"):
        written(tmp_path, *red_squares)
