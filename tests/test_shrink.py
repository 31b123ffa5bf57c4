"""Smaller copies of data."""

from __future__ import annotations

import os
from pathlib import Path

import compared
import numpy as np
import pytest
from data_folders import one_line, write_folder, write_image, write_mask
from PIL import Image

from accuracy import compare
from accuracy.shrink import shrunken
from cac_fast.train.data.images import read_image
from cac_fast.train.data.layouts import open_data
from cac_fast.train.errors import InputError

source = compared.source


def halves(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((16, 12), Image.Resampling.BOX))


def test_shrunken_holds_all_that_the_source_does(source: Path, tmp_path: Path) -> None:
    for name in ("a.jpeg", "b.JPG", "c.d.bmp"):
        write_image(source / "images/train" / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(source / "images/train/b.JPG").save(source / "images/train/e.jpg", exif=turned)
    write_mask(source / "masks/train/e.png", height=32, width=24)
    data = open_data("folder", shrunken(source, 2, tmp_path))
    before = open_data("folder", source)
    assert data.classes == before.classes
    for split, samples in before.splits.items():
        assert [item.name for item in data.splits[split]] == [item.name for item in samples]
        for sample, copy in zip(samples, data.splits[split], strict=True):
            image, small = read_image(sample.image), read_image(copy.image)
            size = (image.width // 2, image.height // 2)
            expected = image.resize(size, Image.Resampling.BOX)
            np.testing.assert_array_equal(np.asarray(small), np.asarray(expected))
            if sample.mask is None:
                assert copy.mask is None
                continue
            mask = Image.fromarray(before.read_mask(sample.mask))
            np.testing.assert_array_equal(
                data.read_mask(copy.mask), np.asarray(mask.resize(size, Image.Resampling.NEAREST))
            )
    assert (data.root / "images/train/e.png").is_file()
    # What was made until now from a PNG.
    plain = source / "images/train/t00.png"
    found = np.asarray(Image.open(data.root / "images/train/t00.png"))
    np.testing.assert_array_equal(found, halves(Image.open(plain)))


def test_shrunken_follows_its_source(source: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "there" / "set", labeled=2, unlabeled=0)
    target = shrunken(source, 2, tmp_path)
    assert len({target, shrunken(other, 2, tmp_path), shrunken(source, 4, tmp_path)}) == 3
    image, copy = source / "images/train/t00.png", target / "images/train/t00.png"
    made = copy.stat().st_ino
    shrunken(source, 2, tmp_path)
    assert copy.stat().st_ino == made
    write_image(image, seed=9)
    os.utime(image, ns=(1, copy.stat().st_mtime_ns + 10**9))
    write_image(source / "images/train/gone.png")
    shrunken(source, 2, tmp_path)
    np.testing.assert_array_equal(np.asarray(Image.open(copy)), halves(Image.open(image)))
    (source / "images/train/gone.png").unlink()
    shrunken(source, 2, tmp_path)
    assert [item.name for item in open_data("folder", target).splits["train"]] == ["t00"]


def test_killed_copy_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(image: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"\x89PNG")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            shrunken(source, 2, tmp_path)
    data = open_data("folder", shrunken(source, 2, tmp_path))
    assert read_image(data.splits["train"][0].image).size == (16, 12)


def test_shrink_refuses(source: Path, tmp_path: Path) -> None:
    def parse(*arguments: object) -> None:
        compare.parse([str(item) for item in arguments])

    for dataset in ("cityscapes", "voc", "toycity"):
        with pytest.raises(InputError) as error:
            parse("--dataset", dataset, "--data-dir", source, "--shrink", 2)
        one_line(error, "--shrink", dataset, "--dataset folder")
    with pytest.raises(InputError) as error:
        parse("--dataset", "folder", "--data-dir", source, "--shrink", 0)
    one_line(error, "--shrink 0")
    with pytest.raises(InputError) as error:
        parse("--dataset", "folder", "--shrink", 2)
    one_line(error, "--data-dir")
    write_mask(source / "masks/train/t00.png", height=25)
    with pytest.raises(InputError) as error:
        shrunken(source, 2, tmp_path)
    one_line(error, "32 x 25", "32 x 24")
