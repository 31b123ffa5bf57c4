"""Class activation maps and pseudo masks, against loops and by what must hold of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from red_network import red_network
from torch import Tensor, nn

from cac_fast.train.weak import cam

IGNORE = 255


# ---- R, Q, M and mask, in numpy and float64


def loop_responses(features: np.ndarray, weight: np.ndarray) -> np.ndarray:
    result = np.zeros((len(weight), *features.shape[1:]))
    for c, y, x in np.ndindex(*result.shape):
        result[c, y, x] = max(0, sum(w * f for w, f in zip(weight[c], features[:, y, x])))  # noqa: B905
    return result


def loop_upsampled(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixels' centers at halves."""
    result = np.zeros((height, width))
    for y, x in np.ndindex(height, width):
        places = []
        for place, new, old in ((y, height, plane.shape[0]), (x, width, plane.shape[1])):
            center = min(max((place + 0.5) * old / new - 0.5, 0), old - 1)
            low = min(int(center), old - 1)
            places.append(((low, 1 - center + low), (min(low + 1, old - 1), center - low)))
        for (row, part), (column, share) in itertools.product(*places):
            result[y, x] += part * share * plane[row, column]
    return result


def loop_mask(
    maps: np.ndarray, ids: list[int], background: int | None, high: float, low: float
) -> np.ndarray:
    result = np.zeros(maps.shape[1:], np.uint8)
    for y, x in np.ndindex(*result.shape):
        best = None
        for c in range(len(maps)):
            if best is None or maps[c, y, x] > maps[best, y, x]:
                best = c
        if maps[best, y, x] > high:
            result[y, x] = ids[best]
        else:
            below = background is not None and maps[best, y, x] <= low
            result[y, x] = background if below else IGNORE
    return result


def hand_made(
    size: tuple[int, int], scales: tuple[float, ...]
) -> tuple[Callable[[Tensor], Tensor], dict[tuple[int, int], Tensor]]:
    """Features that depend on the scale alone: noise in the left half of the straight view and,
    other noise, in the right half of the mirrored one."""
    rng, made = torch.Generator().manual_seed(0), {}
    for scale in scales:
        view = cam.scaled(torch.zeros(1, 3, *size), scale)
        cells = view.shape[-2] // 16, view.shape[-1] // 16
        noise = torch.randn(2, 2, *cells, generator=rng)
        noise[0, ..., cells[1] // 2 :] = noise[1, ..., : -(-cells[1] // 2)] = 0
        made[tuple(view.shape[-2:])] = noise
    return lambda views: made[tuple(views.shape[-2:])], made


def test_all_steps_equal_a_loop_in_float64() -> None:
    size, scales = (33, 90), cam.SCALES
    features, made = hand_made(size, scales)
    weight = torch.tensor([[1.0, -0.5], [-2.0, 0.25], [0.5, 0.75]])
    assert len(made) == 4
    one = next(iter(made.values()))
    expected = loop_responses(one[0].double().numpy(), weight.double().numpy())
    np.testing.assert_allclose(cam.responses(one, weight)[0].numpy(), expected, atol=1e-6)

    sums = np.zeros((3, *size))
    for both in made.values():
        for view, turned in zip(both.double().numpy(), (False, True), strict=True):
            for c, plane in enumerate(loop_responses(view, weight.double().numpy())):
                sums[c] += loop_upsampled(plane[:, ::-1] if turned else plane, *size)
    found = cam.activation_sum(features, weight, torch.zeros(3, *size), scales)
    np.testing.assert_allclose(found.numpy(), sums, atol=1e-5)

    maps = np.stack([plane / (plane.max() + 1e-5) for plane in sums])
    np.testing.assert_allclose(cam.normalized(found).numpy(), maps, atol=1e-5)
    assert np.abs(maps[..., None] - [0.3, 0.05]).min() > 1e-6  # no pixel that rounding decides
    for background in (0, None):
        mask = cam.pseudo_mask(cam.normalized(found), [1, 2, 4], background)
        np.testing.assert_array_equal(
            mask.numpy(), loop_mask(maps, [1, 2, 4], background, 0.30, 0.05)
        )
        assert {1, 2, 4, IGNORE} | ({0} if background == 0 else set()) == set(np.unique(mask))


# ---- what must hold


def test_scale_of_the_weights_changes_nothing() -> None:
    features, _ = hand_made((64, 80), cam.SCALES)
    weight = torch.tensor([[1.0, -0.5], [-2.0, 0.25]])
    image = torch.zeros(3, 64, 80)
    one, other = (
        cam.normalized(cam.activation_sum(features, factor * weight, image, cam.SCALES))
        for factor in (1, 10)
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    masks = (cam.pseudo_mask(maps, [1, 2], 0) for maps in (one, other))
    torch.testing.assert_close(*masks, atol=0, rtol=0)


def test_mirrored_image_has_the_mirrored_mask() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(3, 4, 5, generator=generator).repeat_interleave(17, 1)
    image = 255 * blocks.repeat_interleave(19, 2)
    convolution = torch.randn(4, 3, 16, 16, generator=generator)  # knows left from right
    weight = torch.randn(2, 4, generator=generator)

    def features(views: Tensor) -> Tensor:
        return nn.functional.conv2d(views / 255, convolution, stride=16)

    masks = [
        cam.pseudo_mask(
            cam.normalized(cam.activation_sum(features, weight, each, cam.SCALES)), [1, 2], 0
        )
        for each in (image, image.flip(-1))
    ]
    assert (masks[0] != masks[0].flip(-1)).any()
    torch.testing.assert_close(masks[0].flip(-1), masks[1], atol=0, rtol=0)


@pytest.mark.parametrize("scale", cam.SCALES)
@pytest.mark.parametrize("size", [(20, 700), (1, 1), (48, 64), (360, 480), (55, 40)])
def test_sides_of_scaled_images(size: tuple[int, int], scale: float) -> None:
    image = torch.full((1, 3, *size), 200.0)
    view = cam.scaled(image, scale)
    for side, original in zip(view.shape[-2:], size, strict=True):
        assert side % 16 == 0 and side >= 32
        assert side == 32 or abs(side - scale * original) <= 8
    torch.testing.assert_close(view, torch.full_like(view, 200.0), atol=1e-3, rtol=0)


def test_scaled_images_stay_in_their_range() -> None:
    edge = torch.zeros(1, 3, 40, 40)
    edge[..., 20:] = 255
    view = cam.scaled(edge, 2.0)
    assert (view.min(), view.max()) == (0, 255)


# ---- thresholds


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (("high", -1), IGNORE), (("high", 0), IGNORE), (("high", 1), 3),
        (("low", -1), 0), (("low", 0), 0), (("low", 1), IGNORE),
    ],
)  # fmt: skip
def test_borders_of_the_thresholds(steps: tuple[str, int], expected: int) -> None:
    name, ulps = steps
    value = np.float32({"high": 0.30, "low": 0.05}[name])
    value = np.nextafter(value, np.float32(np.sign(ulps) * np.inf)) if ulps else value
    maps = torch.full((1, 2, 2), float(value))
    assert cam.pseudo_mask(maps, [3], 0).unique().tolist() == [expected]
    without = expected if expected == 3 else IGNORE
    assert cam.pseudo_mask(maps, [3], None).unique().tolist() == [without]


def test_no_class_is_background_or_unknown() -> None:
    maps = torch.zeros(0, 20, 700)
    for background, expected in ((0, 0), (2, 2), (None, IGNORE)):
        mask = cam.pseudo_mask(maps, [], background)
        assert mask.shape == (20, 700) and mask.dtype == torch.uint8
        assert mask.unique().tolist() == [expected]


def test_a_class_that_never_fires_gets_no_pixel() -> None:
    sums = torch.zeros(2, 4, 4)
    sums[1, 0, 0] = 7
    maps = cam.normalized(sums)
    assert maps.isfinite().all() and not maps[0].any()
    mask = cam.pseudo_mask(maps, [1, 2], 0)
    assert mask[0, 0] == 2 and mask.flatten()[1:].unique().tolist() == [0]
    assert cam.pseudo_mask(maps[:1], [1], 0).unique().tolist() == [0]


def test_of_equal_maps_the_smaller_id_wins() -> None:
    maps = torch.full((3, 64, 64), 0.9)
    maps[0] = 0.4
    assert cam.pseudo_mask(maps, [1, 4, 6], 0).unique().tolist() == [4]


def test_weak_maps_are_judged_by_their_own_peak() -> None:
    sums = torch.tensor([[[100.0, 0, 0]], [[0, 0.01, 0]]])
    assert cam.pseudo_mask(cam.normalized(sums), [1, 2], 0).tolist() == [[1, 2, 0]]


# ---- a network that reads one channel


@pytest.mark.parametrize(("scales", "cell"), [((1.0,), 16), (cam.SCALES, 32)])
def test_red_squares_on_blue(scales: tuple[float, ...], cell: int) -> None:
    network = red_network()
    image = torch.zeros(3, 300, 260)
    image[2] = 255
    red = torch.zeros(300, 260, dtype=torch.bool)
    for top, left in ((5, 11), (170, 131)):
        red[top : top + 120, left : left + 110] = True
    image[0], image[2] = 255.0 * red, 255.0 * ~red
    with torch.no_grad():
        sums = cam.activation_sum(network.features, network.weight, image, scales)
    mask = cam.pseudo_mask(cam.normalized(sums), [1], 0)
    near = nn.functional.max_pool2d(red[None].float(), 2 * cell + 1, 1, cell)[0] > 0
    deep = nn.functional.max_pool2d((~red)[None].float(), 2 * cell + 1, 1, cell)[0] == 0
    assert deep.sum() > 1000 and (~near).sum() > 1000
    assert mask[deep].unique().tolist() == [1]
    assert mask[~near].unique().tolist() == [0]


def test_classifier_normalizes_images_itself() -> None:
    image = torch.arange(0, 256.0).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    expected = ((image[0, 0] / 255 - 0.485) / 0.229).mean()
    features = red_network().features(image.to(torch.uint8))
    torch.testing.assert_close(features[0, 0, 0, 0], expected)


def test_classifier_means_over_the_cells_of_the_image() -> None:
    network = red_network()
    image = torch.zeros(2, 3, 48, 48)
    image[0, 0, :16, :16] = 255
    shown = torch.zeros(2, 48, 48, dtype=torch.bool)
    shown[0, :32, :24] = True  # four cells, two of them in part
    shown[1] = True
    features = network.features(image)[:, 0]
    logits = network(image, shown)
    torch.testing.assert_close(logits[0, 0], features[0, :2, :2].mean())
    torch.testing.assert_close(logits[1, 0], features[1].mean())
    torch.testing.assert_close(network(image)[:, 0], features.mean((1, 2)))
    assert network(image, torch.zeros_like(shown)).tolist() == [[0], [0]]
