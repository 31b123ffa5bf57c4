"""What predict takes in Python and on the command line."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import one_line, write_image
from PIL import Image
from torch import nn

from cac_fast.train.errors import InputError
from cac_fast.train.inference import Predictor
from cac_fast.train.predict import find_images

COLORS = ((0, 0, 0), (255, 0, 0), (0, 0, 255))


@pytest.fixture
def predictor() -> Predictor:
    """The class of a pixel is its largest channel."""
    return Predictor(nn.Identity(), ("red", "green", "blue"), COLORS)


def photo(height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("shape", [(40, 48), (40, 3), (3, 48)])
def test_every_form_of_an_image_gives_the_same(tmp_path, predictor, shape):
    pixels = photo(*shape)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    expected = predictor.predict(torch.from_numpy(pixels).permute(2, 0, 1))
    assert expected.shape == shape and len(np.unique(expected)) == 3
    picture = Image.fromarray(pixels)
    forms = [pixels, pixels[::-1][::-1], path, str(path), picture, np.asarray(picture)]
    if 3 not in shape:
        forms += [pixels.transpose(2, 0, 1), torch.from_numpy(pixels)]
    warnings.simplefilter("error")  # pytest takes it back
    for form in forms:
        np.testing.assert_array_equal(predictor.predict(form), expected)
    several = predictor.predict(forms, tile=64)
    assert len(several) == len(forms)
    for one in several:
        np.testing.assert_array_equal(one, expected)
    assert predictor.predict([]) == []


@pytest.mark.parametrize(
    "image",
    [
        photo().astype(np.float32) / 255,
        photo()[..., 0],
        photo()[None],
        np.zeros((8, 8, 4), np.uint8),
        torch.zeros(3, 8, 8),
        torch.zeros(8, 8, 4, dtype=torch.uint8),
        "nowhere.jpg",
    ],
)
def test_other_forms_are_refused_by_name(predictor, image):
    kind = "PIL image" if isinstance(image, np.ndarray) else "uint8|PIL"
    with pytest.raises(ValueError, match=kind):
        predictor.predict(image)
    with pytest.raises(TypeError, match="PIL image, an array or a tensor, not int"):
        predictor.predict(3)


def below(*given: Path, output: Path = Path("none")) -> list[str]:
    return [path.as_posix() for _, path in find_images(given, output)[0]]


@pytest.fixture
def photos(tmp_path) -> Path:
    for name in ("a.jpg", "day/b.png", "day/c.gif", "day/d.jp2"):
        write_image(tmp_path / "photos" / name)
    for name in ("a.txt", "e.heic", "day/f.HEIC", ".hidden.jpg"):
        (tmp_path / "photos" / name).write_text("")
    return tmp_path / "photos"


def test_a_folder_counts_what_it_passes_over(photos):
    assert below(photos) == ["a.jpg", "day/b.png", "day/c.gif", "day/d.jp2"]
    assert find_images([photos], Path("none"))[1] == Counter({".heic": 2, ".txt": 1})
    assert below(photos, output=photos / "day") == ["a.jpg"]


def test_files_and_patterns(photos, monkeypatch):
    assert below(photos / "day/b.png") == ["b.png"]
    assert below(photos / "a.jpg", photos / "day/b.png") == ["a.jpg", "day/b.png"]
    assert below(photos / "**/*.jpg") == ["a.jpg"]
    assert below(photos / "*/[bc].*") == ["day/b.png", "day/c.gif"]
    (photos / "b[1].jpg").write_bytes((photos / "a.jpg").read_bytes())
    assert below(photos / "b[1].jpg") == ["b[1].jpg"]  # a name, though it looks like a pattern
    monkeypatch.chdir(photos)
    assert below(Path("a.jpg"), photos / "day/b.png") == ["a.jpg", "day/b.png"]
    assert below(Path("*.jpg")) == ["a.jpg", "b[1].jpg"]


def test_patterns_of_folders_count_a_file_once(photos):
    assert find_images([photos / "**"], Path("none"))[1] == Counter({".heic": 2, ".txt": 1})
    assert below(photos / "**") == below(photos)


@pytest.mark.parametrize("pattern", ["**/*.png", "**/*", "**", "*", "out*", "*/more/*.png"])
def test_patterns_pass_over_earlier_predictions(photos, pattern):
    write_image(photos / "out/day/b.png")
    write_image(photos / "out/more/b.png")
    write_image(photos / "outer/more/k.png")
    found = below(photos / pattern, output=photos / "out")
    assert "outer/more/k.png" in found
    assert not [name for name in found if name.startswith("out/")]


def test_patterns_beside_the_predictions(photos):
    assert below(photos / "*.jpg", output=photos) == ["a.jpg"]
    with pytest.raises(InputError, match="is the folder of the images"):
        find_images([photos / "**"], photos)


def test_nothing_to_predict(photos):
    for path, words in (
        (photos / "*.bmp", ("no pattern",)),
        (photos / "none", ("not a folder",)),
        (photos / "e*", ("no image", ".heic 1")),
    ):
        with pytest.raises(InputError) as error:
            find_images([path], Path("none"))
        one_line(error, path, *words)
