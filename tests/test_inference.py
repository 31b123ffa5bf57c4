"""Predictor: padding, normalization, tiles, loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cac_fast.train
from cac_fast.train import checkpoint
from cac_fast.train.errors import InputError
from cac_fast.train.inference import Predictor, pad_image, windows
from cac_fast.train.networks import build_network
from cac_fast.train.preprocessing import IMAGENET_MEAN, IMAGENET_STD

CLASSES = ("a", "b", "c")
PALETTE = ((0, 0, 0), (255, 0, 0), (0, 0, 255))


class Recorder(nn.Module):
    """Its input as logits; keeps what it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x


class Strided(nn.Module):
    """A network on a grid of 8 pixels that sees 3 x 3 cells, so that tiles change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 8, 8, stride=8)
        self.around = nn.Conv2d(8, 3, 3, padding=1, padding_mode="replicate")
        self.sizes: list[tuple[int, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(x.shape[-2:]))
        logits = self.around(torch.relu(self.cells(x)))
        return logits.repeat_interleave(8, 2).repeat_interleave(8, 3) + x


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def strided() -> Predictor:
    torch.manual_seed(0)
    return Predictor(Strided(), CLASSES, PALETTE)


def test_logits_are_of_the_normalized_image_mirrored_to_a_multiple_of_8() -> None:
    network = Recorder()
    image = photo(45, 63)
    logits = Predictor(network, CLASSES, PALETTE).logits(image)
    mean, std = (np.array(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    padded = np.pad(image.numpy(), ((0, 0), (0, 3), (0, 1)), mode="reflect")
    np.testing.assert_allclose(
        network.seen[0].numpy(), (padded / 255 - mean) / std, rtol=1e-4, atol=1e-5
    )
    assert logits.shape == (3, 45, 63)
    assert torch.equal(logits, network.seen[0, :, :45, :63])


def test_an_image_that_needs_no_padding_gets_none() -> None:
    images = torch.rand(1, 3, 40, 64)
    assert torch.equal(pad_image(images), images)


def test_tiny_images_are_mirrored_as_far_as_they_go_and_then_repeated() -> None:
    row = torch.arange(3.0).view(1, 1, 1, 3)
    padded = pad_image(row)
    assert padded.shape == (1, 1, 32, 32)
    assert padded[0, 0, 17].tolist() == [0, 1, 2, 1, 0, *[0] * 27]


def test_channels_last_reaches_the_network() -> None:
    network = Recorder()
    Predictor(network, CLASSES, PALETTE, channels_last=True).logits(photo(64, 64))
    assert network.seen.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8)])
def test_an_image_of_another_form_is_refused(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(3, H, W\) of uint8"):
        Predictor(Recorder(), CLASSES, PALETTE).logits(image)


def test_predict_takes_tensors_and_pil_images_of_any_mode(strided: Predictor) -> None:
    image = photo(45, 63)
    labels = strided.predict(image)
    assert labels.dtype == np.uint8 and labels.shape == (45, 63)
    assert (labels == strided.logits(image).argmax(0).numpy()).all()
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    assert (strided.predict(pil) == labels).all()
    gray = pil.convert("L")
    assert (strided.predict(gray) == strided.predict(gray.convert("RGB"))).all()
    # Transparency is laid on white, as in training.
    veiled = pil.copy()
    veiled.putalpha(Image.linear_gradient("L").resize(pil.size))
    white = Image.new("RGBA", pil.size, "white")
    flat = Image.alpha_composite(white, veiled).convert("RGB")
    assert (strided.predict(veiled) == strided.predict(flat)).all()
    assert (strided.predict(flat) != labels).any()


@pytest.mark.parametrize("tile", [64, 100, 128])
@pytest.mark.parametrize("size", [(300, 217), (64, 500), (65, 129), (129, 128)])
@pytest.mark.parametrize("as_pil", [True, False])
def test_tiles_give_what_the_whole_image_gives(
    strided: Predictor, size: tuple[int, int], tile: int, as_pil: bool
) -> None:
    image = photo(*size)
    whole = strided.predict(image)
    strided.network.sizes.clear()
    given = Image.fromarray(image.permute(1, 2, 0).numpy()) if as_pil else image
    assert (strided.predict(given, tile) == whole).all()
    # No more than the tile goes through the network at once, whatever the image's size.
    assert len(strided.network.sizes) > 1
    assert max(max(seen) for seen in strided.network.sizes) <= -(-tile // 8) * 8


@pytest.mark.parametrize("tile", [64, 70, 500, 512, 1024, 4096])
@pytest.mark.parametrize("extra", [0, 1, 15, 16, 17, 500, 9999])
def test_windows_keep_every_pixel_once_and_away_from_inner_edges(tile: int, extra: int) -> None:
    length, margin = tile + extra, min(128, tile // 4)
    found = windows(length, tile)
    assert [
        pixel for window in found for pixel in range(window.kept_start, window.kept_stop)
    ] == list(range(length))
    for window in found:
        assert window.stop - window.start <= tile and window.start % 16 == 0
        assert window.start == 0 or window.kept_start - window.start >= margin
        assert window.stop == length or window.stop - window.kept_stop >= margin


def test_a_tile_too_small_is_refused(strided: Predictor) -> None:
    with pytest.raises(ValueError, match="at least 64"):
        strided.predict(photo(100, 100), tile=63)


@pytest.fixture(scope="module")
def state() -> dict:
    torch.manual_seed(0)
    return {
        "network": build_network("deeplabv3plus", "mobilenet_v2", len(CLASSES)).state_dict(),
        "config": {"network": "deeplabv3plus", "backbone": "mobilenet_v2"},
        "classes": list(CLASSES),
        "palette": [list(color) for color in PALETTE],
        "iteration": 1,
        "best": None,
    }


def test_load_gives_the_network_that_was_written(tmp_path, state) -> None:
    checkpoint.write(tmp_path / "best.pt", state)
    predictor = cac_fast.train.load(str(tmp_path / "best.pt"))
    assert predictor.classes == CLASSES and predictor.palette == PALETTE
    assert not any(module.training for module in predictor.modules())
    network = build_network("deeplabv3plus", "mobilenet_v2", len(CLASSES))
    network.load_state_dict(state["network"])
    image = photo(40, 50)
    with torch.no_grad():
        expected = Predictor(network.eval(), CLASSES, PALETTE).logits(image)
    assert torch.equal(predictor.logits(image), expected)
    assert not predictor.logits(image).requires_grad
    # A photograph smaller than a feature cell works too.
    assert predictor.predict(photo(5, 1)).shape == (5, 1)


def test_load_refuses_another_architecture_and_other_files(tmp_path, state) -> None:
    path = tmp_path / "best.pt"
    checkpoint.write(path, state | {"config": {"network": "pspnet", "backbone": "mobilenet_v2"}})
    with pytest.raises(InputError, match="another architecture"):
        cac_fast.train.load(path)
    checkpoint.write(path, {"iteration": 3})
    with pytest.raises(InputError, match="holds no 'config'"):
        cac_fast.train.load(path)
