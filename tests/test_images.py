"""Images and masks in every form people have them."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from data_folders import one_line
from PIL import Image, PngImagePlugin

from cac_fast.train.data import png
from cac_fast.train.data.images import read_image, read_mask
from cac_fast.train.errors import InputError

RAMP = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10


def pixels(path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def test_rgb_is_read_as_it_is(tmp_path):
    color = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=2)
    Image.fromarray(color).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), color)


def test_gray(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), gray(RAMP))


def test_one_bit(tmp_path):
    Image.fromarray(RAMP > 100).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), gray((RAMP > 100) * 255))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_the_high_byte(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 256 + 200).save(path)
    np.testing.assert_array_equal(pixels(path), gray(RAMP))


def test_palette(tmp_path):
    image = Image.fromarray(RAMP % 3).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png")
    colors = np.arange(10, 100, 10, dtype=np.uint8).reshape(3, 3)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), colors[RAMP % 3])


def test_alpha_is_composited_on_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 100
    rgba[0, :, 3] = (0, 255, 51)  # nothing, all, a fifth
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0].tolist() == [[255] * 3, [100, 0, 0], [224, 204, 204]]


def test_gray_with_alpha(tmp_path):
    Image.fromarray(np.stack([RAMP, RAMP * 0], axis=2), "LA").save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == 255).all()


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.fromarray(RAMP % 2).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=1)
    colors = np.array([[10, 20, 30], [255, 255, 255]])
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), colors[RAMP % 2])


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = pixels(tmp_path / "a.jpg")[4, 8]
    assert red > 240 and green < 15 and blue < 15


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    # Blocks of 8 pixels, so that JPEG keeps them.
    stored = np.kron(RAMP, np.ones((8, 8), np.uint8))
    Image.fromarray(stored).save(path, exif=exif)
    found = pixels(path)
    expected = gray(UPRIGHT[orientation](stored))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 8


def test_missing_image(tmp_path):
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "nowhere.jpg")
    one_line(error, tmp_path / "nowhere.jpg", "does not exist")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError) as error:
        read_image(path)
    one_line(error, path, "replace or remove")


@pytest.mark.parametrize("content", [b"", b"not an image\nat all"])
def test_file_that_is_no_image(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (read_image, lambda path: read_mask(path, 3)):
        with pytest.raises(InputError) as error:
            read(path)
        one_line(error, path, "cannot be read")


def test_floating_point_image(tmp_path):
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "a.tif")
    one_line(error, tmp_path / "a.tif", "floating-point")


def save_mask(path, mode: str, ids: np.ndarray):
    image = Image.fromarray(ids.astype(np.uint16) if mode == "I;16" else ids.astype(np.uint8))
    if mode == "P":
        image = image.convert("P")
        image.putpalette([200, 0, 0] + [0, 200, 0] * 255)  # ids, not colors, are what counts
    elif mode == "1":
        image = Image.fromarray(ids.astype(bool))
    image.save(path)
    with Image.open(path) as file:
        assert file.mode == mode
    return path


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
def test_mask_modes_hold_raw_ids(tmp_path, mode):
    ids = RAMP // 10 % 2 if mode == "1" else np.where(RAMP > 200, 255, RAMP // 10 % 5)
    mask = read_mask(save_mask(tmp_path / "m.png", mode, ids), num_classes=5)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, ids)


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_label_map_comes_first(tmp_path, mode):
    label_map = tuple(255 if i == 7 else i // 10 for i in range(256))
    path = save_mask(tmp_path / "m.png", mode, np.array([[7, 10, 29]]))
    assert read_mask(path, 3, label_map).tolist() == [[255, 1, 2]]
    with pytest.raises(InputError) as error:
        read_mask(save_mask(tmp_path / "m.png", mode, np.array([[10, 99]])), 3, label_map)
    one_line(error, tmp_path / "m.png", 99)


def test_label_map_on_one_bit(tmp_path):
    path = save_mask(tmp_path / "m.png", "1", np.array([[0, 1, 1]]))
    assert read_mask(path, 3, tuple(2 - i % 2 for i in range(256))).tolist() == [[2, 1, 1]]


@pytest.mark.parametrize("value, mode", [(3, "L"), (254, "P"), (256, "I;16"), (511, "I;16")])
def test_mask_out_of_range_names_file_and_value(tmp_path, value, mode):
    path = save_mask(tmp_path / "m.png", mode, np.array([[0, 2, 255, value]]))
    with pytest.raises(InputError) as error:
        read_mask(path, 3)
    one_line(error, path, f"id {value},", "0 to 2")


def test_wide_ids_are_not_wrapped_by_a_label_map(tmp_path):
    path = save_mask(tmp_path / "m.png", "I;16", np.array([[0, 256]]))
    with pytest.raises(InputError) as error:
        read_mask(path, 3, tuple([0] * 256))
    one_line(error, path, 256)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_color_mask_says_what_is_expected(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "m.png")
    with pytest.raises(InputError) as error:
        read_mask(tmp_path / "m.png", 3)
    one_line(error, tmp_path / "m.png", "color", "palette PNG", "255")


def test_truncated_mask(tmp_path):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 3, (64, 64), np.uint8)
    Image.fromarray(noise).save(buffer, "png")
    path = tmp_path / "m.png"
    path.write_bytes(buffer.getvalue()[:200])
    with pytest.raises(InputError) as error:
        read_mask(path, 3)
    one_line(error, path)


def test_image_that_does_not_fit_in_memory(tmp_path, monkeypatch):
    def full(_):
        raise MemoryError

    Image.fromarray(RAMP).save(tmp_path / "a.png")
    monkeypatch.setattr(png, "spng_decode", full)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", full)
    for read in (read_image, lambda path: read_mask(path, 3)):
        with pytest.raises(InputError, match=r"a.png is too large to be decoded"):
            read(tmp_path / "a.png")


def plain(image: Image.Image, **more) -> np.ndarray | None:
    stream = io.BytesIO()
    image.save(stream, "png", **more)
    stream.seek(0)
    found = png.read_plain(stream)
    assert found is not None or stream.tell() == 0
    return found


def text(key: str, value: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value)
    return info


needs_imagecodecs = pytest.mark.skipif(png.spng_decode is None, reason="imagecodecs is not there")
COLOR = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)


@needs_imagecodecs
@pytest.mark.parametrize(
    "more", [{}, {"dpi": (72, 72)}, {"gamma": 0.5}, {"pnginfo": text("Software", "a camera")}]
)
def test_plain_png(more):
    found = plain(Image.fromarray(COLOR), **more)
    assert found.dtype == np.uint8
    assert np.array_equal(found, COLOR)


@needs_imagecodecs
@pytest.mark.parametrize(
    ("mode", "more"),
    [
        ("P", {}),
        ("1", {}),
        ("L", {}),
        ("LA", {}),
        ("RGBA", {}),
        ("I;16", {}),
        ("RGB", {"transparency": (1, 2, 3)}),
        ("RGB", {"exif": Image.Exif()}),
        (
            "RGB",
            {"icc_profile": b"what colors mean"},
        ),
        ("RGB", {"pnginfo": text("Raw profile type exif", "orientation")}),
        ("RGB", {"pnginfo": text("XML:com.adobe.xmp", "tiff:Orientation")}),
        ("RGB", {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "red")]}),
    ],
)
def test_png_that_is_more_than_pixels_is_left_to_pillow(mode, more):
    if "exif" in more:
        more["exif"][0x0112] = 6
    assert plain(Image.new(mode, (8, 8)), **more) is None


@needs_imagecodecs
@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n"])
def test_no_png_is_left_to_pillow(content):
    stream = io.BytesIO(content)
    assert png.read_plain(stream) is None and stream.tell() == 0


@needs_imagecodecs
def test_broken_png_leaves_nothing_behind(capfd):
    stream = io.BytesIO()
    Image.fromarray(COLOR).save(stream, "png")
    cut = stream.getvalue()[: len(stream.getvalue()) // 2]
    nones = sys.getrefcount(None)
    for _ in range(500):
        assert png.read_plain(io.BytesIO(cut)) is None
    assert abs(sys.getrefcount(None) - nones) < 100
    assert capfd.readouterr().err == ""


def test_png_without_imagecodecs(tmp_path, monkeypatch):
    Image.fromarray(COLOR).save(tmp_path / "a.png")
    monkeypatch.setattr(png, "spng_decode", None)
    assert np.array_equal(pixels(tmp_path / "a.png"), COLOR)
