"""Masks and images as programs write them: raw ids, colors, bands, depths, suffixes."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from data_folders import one_line
from PIL import Image, PngImagePlugin

from cac_fast.train.data.forms import header
from cac_fast.train.data.images import check_size, read_image, read_mask
from cac_fast.train.errors import InputError

IDS = np.array([[0, 1, 2, 255], [2, 2, 1, 0]], np.uint8)
PALETTE = ((128, 0, 0), (0, 128, 0), (0, 0, 128))


def png(path, depth: int, rows: list[bytes], width: int, kind: int = 0):
    """A PNG of any depth, which Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    size = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


def tiff(
    path,
    pixels: np.ndarray,
    extra: list[int] | None = None,
    bits: int | None = None,
    deflate: bool = False,
    apart: bool = False,
):
    """A TIFF; packed samples of `bits` bits come as bytes (H, B). `apart`: band after band."""
    height, width, channels = (*pixels.shape, 1)[:3]
    depth = bits or 8 * pixels.itemsize
    width = width * 8 // depth if bits else width
    strips = [pixels[..., i].tobytes() for i in range(channels)] if apart else [pixels.tobytes()]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    strips = [strip + bytes(len(strip) % 2) for strip in strips]
    content = b"".join(strips)
    tags = {
        256: [width],
        257: [height],
        258: [depth] * channels,
        259: [8 if deflate else 1],
        262: [2 if channels > 2 else 1],
        273: [8 + sum(map(len, strips[:i])) for i in range(len(strips))],
        277: [channels],
        278: [height],
        279: [len(strip) for strip in strips],
        284: [2 if apart else 1],
    }
    if extra is not None:
        tags[338] = extra
    start = 8 + len(content)
    far = start + 2 + 12 * len(tags) + 4
    body, more = b"", b""
    for tag, values in tags.items():
        raw = struct.pack(f"<{len(values)}H", *values)
        if len(raw) > 4:
            raw, more = struct.pack("<I", far + len(more)), more + raw
        body += struct.pack("<HHI", tag, 3, len(values)) + raw.ljust(4, b"\0")
    begin = b"II*\0" + struct.pack("<I", start)
    path.write_bytes(begin + content + struct.pack("<H", len(tags)) + body + bytes(4) + more)
    return path


@pytest.mark.parametrize(
    ("depth", "row", "ids"),
    [
        (1, b"\xa0", [1, 0, 1, 0]),
        (2, b"\x1b", [0, 1, 2, 3]),
        (2, b"\x33", [0, 3, 0, 3]),
        (4, b"\x01\x23", [0, 1, 2, 3]),
        (8, b"\x00\x01\x02\x03", [0, 1, 2, 3]),
    ],
)
@pytest.mark.parametrize("write", [png, tiff])
def test_ids_of_any_depth_are_raw(tmp_path, depth, row, ids, write):
    if write is png:
        path = png(tmp_path / "m.png", depth, [row, row], 4)
    else:
        path = tiff(tmp_path / "m.tif", np.array([[*row]] * 2, np.uint8), bits=depth)
        if depth == 1:
            ids = [*ids, 0, 0, 0, 0]  # a whole byte
    assert read_mask(path, 4).tolist() == [ids, ids]


@pytest.mark.parametrize("suffix", ["tif", "tiff", "bmp", "gif"])
@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_of_other_kinds(tmp_path, suffix, mode):
    image = Image.fromarray(IDS)
    if mode == "P":
        image = image.convert("P")
        image.putpalette([value for color in PALETTE for value in color])
        image = Image.fromarray(np.where(IDS == 255, 0, IDS)) if suffix == "gif" else image
    image.save(tmp_path / f"m.{suffix}")
    expected = np.where(IDS == 255, 0, IDS) if (suffix, mode) == ("gif", "P") else IDS
    np.testing.assert_array_equal(read_mask(tmp_path / f"m.{suffix}", 3), expected)


def test_colors_of_a_gif_are_not_looked_at(tmp_path):
    image = Image.fromarray(IDS % 3).convert("P")
    image.putpalette([value for color in PALETTE for value in color])
    image.save(tmp_path / "m.gif")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.gif", 3), IDS % 3)


def test_a_gif_whose_writer_left_out_unused_colors(tmp_path):
    ids = np.where(IDS == 2, 2, 0).astype(np.uint8)
    image = Image.fromarray(ids).convert("P")
    image.putpalette([value for color in PALETTE for value in color])
    image.save(tmp_path / "m.gif")
    with Image.open(tmp_path / "m.gif") as file:
        assert set(np.unique(np.asarray(file))) == {0, 1}
    np.testing.assert_array_equal(read_mask(tmp_path / "m.gif", 3, palette=PALETTE), ids)
    shared = (PALETTE[0], PALETTE[2], PALETTE[2])  # indices are all that is left
    assert set(np.unique(read_mask(tmp_path / "m.gif", 3, palette=shared))) == {0, 1}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_label_map_is_for_ids_and_not_for_colors(tmp_path, mode):
    classes = np.array([[0, 1, 2]], np.uint8)
    label_map = (2, 0, 1, *[255] * 253)
    pixels = np.array(PALETTE, np.uint8)[classes] if mode != "LA" else np.array([[[1], [2], [0]]])
    alpha = np.full((1, 3, 1), 255)
    pixels = np.concatenate([pixels, alpha], 2) if "A" in mode else pixels
    Image.fromarray(pixels.astype(np.uint8), mode).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 3, label_map, PALETTE), classes)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_lossy_mask(tmp_path, suffix):
    form = {"jpg": "jpeg", "webp": "webp", "png": "jpeg"}[suffix]  # the name says nothing
    Image.fromarray(IDS).save(tmp_path / f"m.{suffix}", form)
    with pytest.raises(InputError) as error:
        read_mask(tmp_path / f"m.{suffix}", 3)
    one_line(error, f"m.{suffix}", f"is a {form.upper()} file", "change the values", "PNG")


def test_lossy_tiff_mask(tmp_path):
    Image.fromarray(np.kron(IDS, np.ones((8, 8), np.uint8))).save(
        tmp_path / "m.tif", compression="jpeg"
    )
    with pytest.raises(InputError) as error:
        read_mask(tmp_path / "m.tif", 3)
    one_line(error, "m.tif", "TIFF with JPEG compression")


def test_floating_point_mask(tmp_path):
    Image.fromarray(IDS.astype(np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(InputError) as error:
        read_mask(tmp_path / "m.tif", 3)
    one_line(error, "m.tif", "floating-point", "8-bit gray PNG")


def colored(ids: np.ndarray, ignore=(0, 0, 0)) -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[:3], table[255] = PALETTE, ignore
    return table[ids]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_of_the_class_list(tmp_path, mode):
    Image.fromarray(colored(IDS, (9, 9, 9))).convert(mode).save(tmp_path / "m.png")
    found = read_mask(tmp_path / "m.png", 3, None, PALETTE, (9, 9, 9))
    np.testing.assert_array_equal(found, IDS)


def test_unknown_color_and_its_place(tmp_path):
    pixels = colored(IDS % 3)
    pixels[1, 2] = (0, 129, 0)
    pixels[1, 3] = (1, 2, 3)
    Image.fromarray(pixels).save(tmp_path / "m.png")
    with pytest.raises(InputError) as error:
        read_mask(tmp_path / "m.png", 3, None, PALETTE)
    one_line(error, "m.png", "color (0, 129, 0) at x 2, y 1 is of no class", "palette PNG")


def test_color_of_two_classes(tmp_path):
    Image.fromarray(colored(IDS % 3)).save(tmp_path / "m.png")
    with pytest.raises(InputError) as error:
        read_mask(tmp_path / "m.png", 3, None, (PALETTE[0], PALETTE[1], PALETTE[1]))
    one_line(error, "color (0, 128, 0) at x 1, y 0 is of several classes")


def test_transparent_colors_are_no_classes(tmp_path):
    image = Image.fromarray(colored(IDS % 3)).convert("RGBA")
    image.putpixel((3, 1), (128, 0, 0, 254))
    image.save(tmp_path / "m.png")
    with pytest.raises(InputError) as error:
        read_mask(tmp_path / "m.png", 3, None, PALETTE)
    one_line(error, "transparent pixel at x 3, y 1")


def test_gray_with_an_opaque_layer(tmp_path):
    Image.fromarray(np.stack([IDS, np.full_like(IDS, 255)], 2), "LA").save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 3), IDS)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((30, 20), "height and width are swapped"),
        ((10, 15), "the image is 2 times the mask: resize the mask with nearest neighbor"),
        ((40, 60), "the image is 0.5 times the mask"),
        ((20, 29), "make them the same size"),
    ],
)
def test_likely_cause_of_another_size(tmp_path, size, words):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    with pytest.raises(InputError) as error:
        check_size(tmp_path / "m.png", size, tmp_path / "a.png", (20, 30))
    one_line(error, f"m.png is {size[1]} x {size[0]} but image", words)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_mask_of_an_image_that_exif_turns(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
    upright = read_image(tmp_path / f"a.{suffix}").size[::-1]
    with pytest.raises(InputError) as error:
        check_size(tmp_path / "m.png", (20, 30), tmp_path / f"a.{suffix}", upright)
    one_line(error, "EXIF orientation turns it")


STORED = np.array([[[200, 100, 50, 0], [200, 100, 50, 77], [1, 2, 3, 255]]], np.uint8)


@pytest.mark.parametrize("extra", [None, [0], [2]])
def test_fourth_band_of_a_tiff(tmp_path, extra):
    """GDAL marks infrared as alpha, or does not mark it."""
    path = tiff(tmp_path / "a.tif", STORED, extra)
    np.testing.assert_array_equal(np.asarray(read_image(path)), STORED[..., :3])
    wide = tiff(tmp_path / "b.tif", STORED.astype(np.uint16) << 8, extra)
    np.testing.assert_array_equal(np.asarray(read_image(wide)), STORED[..., :3])
    assert header(path).stored_band and header(wide).stored_band
    assert not header(tiff(tmp_path / "c.tif", STORED[..., :3])).stored_band


def test_tiff_whose_colors_are_multiplied_by_its_alpha(tmp_path):
    path = tiff(tmp_path / "a.tif", np.array([[[0, 0, 0, 0], [9, 9, 9, 255]]], np.uint8), [1])
    assert np.asarray(read_image(path)).tolist() == [[[255] * 3, [9] * 3]]


TWELVE = np.arange(24, dtype=np.uint16).reshape(2, 4, 3) * 178  # up to 4094


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("extra", [None, [0], [2]])
def test_twelve_bits_and_a_fourth_band(tmp_path, extra, deflate):
    infrared = np.full_like(TWELVE[..., :1], 4000)
    stored = np.concatenate([TWELVE, infrared], axis=2)
    path = tiff(tmp_path / "a.tif", stored, extra, deflate=deflate)
    np.testing.assert_array_equal(np.asarray(read_image(path)), TWELVE >> 4)


@pytest.mark.parametrize("kind", ["gray png", "gray tif", "png", "tif", "deflate tif"])
def test_twelve_bits_in_sixteen(tmp_path, kind):
    expected = (TWELVE >> 4).astype(np.uint8)
    if "gray" in kind:
        path = tmp_path / f"a.{kind[-3:]}"
        Image.fromarray(TWELVE[..., 0]).save(path)
        expected = np.repeat(expected[..., :1], 3, axis=2)
    elif kind == "png":
        path = png(tmp_path / "a.png", 16, [row.astype(">u2").tobytes() for row in TWELVE], 4, 2)
    else:
        path = tiff(tmp_path / "a.tif", TWELVE, deflate=kind != "tif")
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("deflate", [False, True])
def test_bands_apart(tmp_path, deflate, bits):
    """As geographic programs write them; of 16 bits Pillow reads those that are compressed."""
    stored = TWELVE >> 4 if bits == 8 else TWELVE << bits - 12
    stored = stored.astype(np.uint8) if bits == 8 else stored
    path = tiff(tmp_path / "a.tif", stored, deflate=deflate, apart=True)
    if bits == 8 or (bits == 16 and deflate):
        np.testing.assert_array_equal(np.asarray(read_image(path)), TWELVE >> 4)
    else:
        with pytest.raises(InputError, match=r"bands of 16 bits lie apart.*INTERLEAVE=PIXEL"):
            read_image(path)


@pytest.mark.parametrize("suffix", ["gif", "jfif", "ppm", "jp2", "webp"])
def test_images_of_other_suffixes(tmp_path, suffix):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, 16:] = 200, 100, 0
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    found = np.asarray(read_image(tmp_path / f"a.{suffix}")).astype(int)
    assert np.abs(found - pixels)[:, [4, 28]].max() <= 8


def test_large_color_profiles_and_texts(tmp_path):
    info = PngImagePlugin.PngInfo()
    for number in range(3):
        info.add_text(f"history{number}", "x" * 30_000_000, zip=True)
    noise = np.random.default_rng(0).bytes(3_000_000)
    Image.fromarray(IDS).save(tmp_path / "m.png", pnginfo=info, icc_profile=noise)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 3), IDS)
    assert read_image(tmp_path / "m.png").size == (4, 2)


@pytest.mark.parametrize("suffix", ["tif", "gif", "png"])
def test_masks_of_several_pages_are_refused(tmp_path, suffix) -> None:
    """Which page is the mask is not known; a smaller one is a preview."""
    path, first = tmp_path / f"mask.{suffix}", Image.fromarray(IDS)
    first.save(path, save_all=True, append_images=[Image.fromarray(IDS[::-1].copy())])
    with pytest.raises(InputError) as error:
        read_mask(path, 3)
    one_line(error, path, "holds 2 pages: save the one with the class ids")


def test_a_preview_in_a_mask_is_passed_over(tmp_path) -> None:
    path = tmp_path / "mask.tif"
    Image.fromarray(IDS).save(path, save_all=True, append_images=[Image.fromarray(IDS[:1, :2])])
    assert np.array_equal(read_mask(path, 3), IDS)
