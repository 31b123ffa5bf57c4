"""A trained network ready for use: images in, class ids out, in the images' own size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cac_fast.train import checkpoint
from cac_fast.train.data.crops import CELL
from cac_fast.train.data.images import read_image, to_rgb
from cac_fast.train.errors import InputError
from cac_fast.train.networks import build_network
from cac_fast.train.preprocessing import Preprocessing
from cac_fast.train.registry import BACKBONES, NETWORKS

MIN_INPUT_SIDE = 32  # what the networks need, in pixels
SMALLEST_TILE = 64
LARGEST_MARGIN = 128
# The networks' largest stride: tiles start at multiples of it, on the whole image's feature grid.
STRIDE = 16

Picture = str | os.PathLike | Image.Image | np.ndarray | Tensor
"""What `predict` takes for an image."""


class Predictor(nn.Module):
    """A network with all that inference needs: class names, colors, normalization.

    Args:
        network: maps normalized images (B, 3, H, W) to logits (B, K, H, W); keeps its mode. Its
            `preprocessing` says how images are made ready (default: ImageNet's mean and std).
        classes: K names.
        palette: K colors (red, green, blue) in 0..255.
        channels_last: feed the network in that memory format.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = tuple(classes)
        self.palette = tuple(tuple(color) for color in palette)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        expected = getattr(network, "preprocessing", Preprocessing())
        self.multiple = expected.multiple
        self.register_buffer("mean", torch.tensor(expected.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(expected.std).view(3, 1, 1))

    @torch.no_grad()
    def logits(self, image: Tensor) -> Tensor:
        """Logits (K, H, W) of an RGB image (3, H, W) uint8 on any device.

        The image is padded as `pad_image` says and the logits are cropped back. They carry no
        gradient and are on the predictor's device.

        Raises:
            ValueError: `image` is no uint8 tensor (3, H, W).
        """
        _check(image)
        height, width = image.shape[1:]
        # As bytes to the device: a fourth of what floats would be.
        values = image.to(self.mean.device, non_blocking=True).to(self.mean.dtype)
        normalized = (values / 255 - self.mean) / self.std
        padded = pad_image(normalized[None], self.multiple)
        padded = padded.contiguous(memory_format=self.memory_format)
        return self.network(padded)[0, :, :height, :width]

    def predict(
        self, image: Picture | Sequence[Picture], tile: int | None = None
    ) -> np.ndarray | list[np.ndarray]:
        """Class ids (H, W) uint8 of an image, or a list of them for a list of images.

        An image is a path, a PIL image (any mode), or uint8 values as an array or tensor, (H, W, 3)
        or (3, H, W), in the order red, green, blue (OpenCV reads blue first). Of a shape that may
        be both, arrays are taken as (H, W, 3) and tensors as (3, H, W).

        With `tile`, windows of at most `tile` x `tile` pixels go through the network one at a
        time, and of the whole image only the class ids are kept. Only a window's center counts:
        pixels within min(128, `tile` // 4) of its edge lack context and are taken from its
        neighbor. A network that pools globally sees the window and not the image, so its result
        can differ from the one without tiles.

        Raises:
            ValueError: `tile` is below 64, or `image` has another form, holds floating-point
                values or is the path of no file.
            TypeError: `image` is of another type.
            InputError: a file cannot be read.
        """
        if tile is not None and tile < SMALLEST_TILE:
            raise ValueError(f"tile is {tile}: use at least {SMALLEST_TILE} pixels")
        if isinstance(image, (list, tuple)):
            return [self.predict(one, tile) for one in image]
        image = _picture(image)
        height, width = image.shape[1:] if isinstance(image, Tensor) else image.size[::-1]
        labels = np.empty((height, width), np.uint8)
        for rows in windows(height, tile):
            for columns in windows(width, tile):
                logits = self.logits(_cut(image, rows, columns))
                ids = logits.argmax(0).to(torch.uint8)[rows.kept_inside, columns.kept_inside]
                labels[rows.kept, columns.kept] = ids.cpu().numpy()
        return labels


class Window(NamedTuple):
    """Pixels [start, stop) of an axis; of the result [kept_start, kept_stop) is kept."""

    start: int
    stop: int
    kept_start: int
    kept_stop: int

    @property
    def kept(self) -> slice:
        return slice(self.kept_start, self.kept_stop)

    @property
    def kept_inside(self) -> slice:
        """`kept`, counted from the window's start."""
        return slice(self.kept_start - self.start, self.kept_stop - self.start)


def windows(length: int, tile: int | None) -> list[Window]:
    """Windows of at most `tile` pixels (None: no bound) that keep each of `length` pixels once.

    Every window starts at a multiple of 16. What is kept is min(128, tile // 4) pixels or more away
    from those ends of a window that are not ends of the axis.
    """
    if tile is None or length <= tile:
        return [Window(0, length, 0, length)]
    margin = min(LARGEST_MARGIN, tile // 4)
    step = (tile - 2 * margin) // STRIDE * STRIDE
    last = -(-(length - tile) // STRIDE) * STRIDE
    starts = [*range(0, last, step), last]
    stops = [start + tile for start in starts[:-1]] + [length]
    # Two neighbors meet in the middle of what they share.
    seams = [(start + stop) // 2 for start, stop in zip(starts[1:], stops[:-1], strict=True)]
    return [
        Window(*ends) for ends in zip(starts, stops, [0, *seams], [*seams, length], strict=True)
    ]


def pad_image(images: Tensor, multiple: int = CELL) -> Tensor:
    """Pad (B, C, H, W) floats at the bottom and right to a multiple, and to 32 at least.

    The padding is the image mirrored at its edge (without repeating the edge), and where an image
    is too small to mirror that far, the last row or column of that.
    """
    height, width = images.shape[-2:]
    down, right = _missing(height, multiple), _missing(width, multiple)
    mirrored_down, mirrored_right = min(down, height - 1), min(right, width - 1)
    images = F.pad(images, (0, mirrored_right, 0, mirrored_down), mode="reflect")
    return F.pad(images, (0, right - mirrored_right, 0, down - mirrored_down), mode="replicate")


def load(path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Load a checkpoint, a file or a run folder with its best state, for inference, in eval mode.

    Raises:
        InputError: the file is missing, truncated, or no checkpoint of this program.
    """
    path = checkpoint.find(Path(path))
    state = checkpoint.read(path)
    try:
        config, weights, classes, palette = (
            state[key] for key in ("config", "network", "classes", "palette")
        )
        names = config["network"], config["backbone"]
    except KeyError as error:
        raise InputError(
            f"checkpoint {path} holds no {error}: it is not one that training wrote"
        ) from error
    try:
        for registry, name in zip((NETWORKS, BACKBONES), names, strict=True):
            registry.check_own(name)
        network = build_network(*names, len(classes), dropout=False)
    except InputError as error:
        raise InputError(f"checkpoint {path} was made with {error}") from error
    network.backbone.adopt(state.get("backbone", {}))
    checkpoint.load_model(network, weights, path)
    return Predictor(network, classes, palette).to(device).eval()


def check_classes(trained: Sequence[str], given: Sequence[str], path: Path) -> None:
    """Raise InputError if a checkpoint's classes are not those of the data."""
    if tuple(trained) == tuple(given):
        return
    if len(trained) != len(given):
        found = f"checkpoint {path} knows {len(trained)} classes but the data has {len(given)}"
    else:
        pairs = enumerate(zip(trained, given, strict=True))
        index, (theirs, ours) = next(item for item in pairs if len(set(item[1])) > 1)
        found = f"class {index} is '{theirs}' in checkpoint {path} but '{ours}' in the data"
    raise InputError(f"{found}: give the --dataset and --data-dir it was trained for")


def _check(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"expected an image (3, H, W) of uint8, not a tensor {tuple(image.shape)} of "
            f"{image.dtype}"
        )


def _picture(image: Picture) -> Image.Image | Tensor:
    """A PIL image in RGB or a tensor (3, H, W) of uint8; raises as `predict`."""
    if isinstance(image, (str, os.PathLike)):
        if not os.path.isfile(image):
            raise ValueError(
                f"there is no image file {image}: give a path, a PIL image, an array or a tensor"
            )
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not isinstance(image, (np.ndarray, Tensor)):
        raise TypeError(
            f"expected a path, a PIL image, an array or a tensor, not {type(image).__name__}"
        )
    is_array = isinstance(image, np.ndarray)
    if is_array:
        if image.dtype != np.uint8 or image.ndim != 3 or 3 not in image.shape[::2]:
            raise ValueError(
                f"expected an array (H, W, 3) of uint8, or a PIL image, not {image.shape} of "
                f"{image.dtype}"
            )
        # PyTorch warns of what it could not write, such as a PIL image's own array.
        image = torch.from_numpy(np.require(image, requirements=("C", "W")))
    if image.ndim == 3 and image.shape[2] == 3 and (is_array or image.shape[0] != 3):
        image = image.permute(2, 0, 1)
    _check(image)
    return image


def _missing(length: int, multiple: int) -> int:
    return max(MIN_INPUT_SIDE, -(-length // multiple) * multiple) - length


def _cut(image: Image.Image | Tensor, rows: Window, columns: Window) -> Tensor:
    if isinstance(image, Tensor):
        return image[:, rows.start : rows.stop, columns.start : columns.stop]
    part = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)
