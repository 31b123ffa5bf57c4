"""Pairs of feature cells, against a loop that gives every cell its coordinates in the image."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cac_fast import Overlap, overlap_from_crops

SIZE = (4, 5)


def random_crops(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Crops of images with padding at the bottom and right; some do not overlap at all."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, (count, *shape), generator=rng)

    corner1, corner2, image = draw(0, 6, 2), draw(0, 6, 2), draw(4, 11, 2)
    size = torch.tensor(SIZE)
    return {
        "offset": corner2 - corner1,
        "flip1": draw(0, 2).bool(),
        "flip2": draw(0, 2).bool(),
        "valid1": (image - corner1).clamp_min(0).minimum(size),
        "valid2": (image - corner2).clamp_min(0).minimum(size),
        "corner1": corner1,
        "corner2": corner2,
        "image": image,
    }


def cell_coordinates(
    corner: list[int], flip: bool, image: list[int]
) -> list[tuple[int, int] | None]:
    """Image row and column of each cell of the flipped crop, None on padding."""
    height, width = SIZE
    coordinates: list[tuple[int, int] | None] = []
    for row in range(height):
        for column in range(width):
            unflipped = width - 1 - column if flip else column
            place = (corner[0] + row, corner[1] + unflipped)
            on_image = place[0] < image[0] and place[1] < image[1]
            coordinates.append(place if on_image else None)
    return coordinates


def overlap_of(crops: dict[str, torch.Tensor]) -> Overlap:
    names = ("offset", "flip1", "flip2", "valid1", "valid2")
    return overlap_from_crops(*(crops[name] for name in names), SIZE)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_the_cells_with_equal_coordinates(seed: int) -> None:
    crops = random_crops(100, seed)
    overlap = overlap_of(crops)
    assert 0 in overlap.counts
    assert overlap.counts.max() >= 12

    for b in range(100):
        view1, view2 = (
            cell_coordinates(
                crops[f"corner{view}"][b].tolist(),
                bool(crops[f"flip{view}"][b]),
                crops["image"][b].tolist(),
            )
            for view in (1, 2)
        )
        partner1 = [view2.index(place) if place and place in view2 else -1 for place in view1]
        partner2 = [view1.index(place) if place and place in view1 else -1 for place in view2]
        assert overlap.partner1[b].tolist() == partner1
        assert overlap.partner2[b].tolist() == partner2
        assert overlap.valid1[b].tolist() == [place is not None for place in view1]
        assert overlap.valid2[b].tolist() == [place is not None for place in view2]
        assert overlap.counts[b] == sum(partner >= 0 for partner in partner1)


def test_identical_crops_pair_every_cell_with_itself() -> None:
    offset, flip = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([True])
    whole = torch.tensor([SIZE])
    overlap = overlap_from_crops(offset, flip, flip, whole, whole, SIZE)
    assert overlap.partner1.tolist() == [list(range(20))]
    assert overlap.partner2.tolist() == [list(range(20))]
    assert overlap.partner1.dtype == torch.int64
    assert overlap.valid1.dtype == torch.bool


def test_a_cell_that_is_padding_in_one_view_has_no_partner() -> None:
    offset, flip = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([False])
    valid1, valid2 = torch.tensor([[4, 5]]), torch.tensor([[1, 2]])
    for first, second in ((valid1, valid2), (valid2, valid1)):
        overlap = overlap_from_crops(offset, flip, flip, first, second, SIZE)
        assert overlap.partner1.tolist() == overlap.partner2.tolist() == [[0, 1] + [-1] * 18]


def test_nothing_waits_for_the_device() -> None:
    # Meta tensors have no values: reading one on the host would raise.
    meta = {name: tensor.to("meta") for name, tensor in random_crops(3, 0).items()}
    overlap = overlap_of(meta)
    assert overlap.partner1.device.type == "meta"
    assert overlap.counts.shape == (3,)


def test_to_moves_every_tensor() -> None:
    moved = overlap_of(random_crops(2, 0)).to("meta")
    fields = dataclasses.fields(moved)
    assert len(fields) == 4
    assert all(getattr(moved, field.name).device.type == "meta" for field in fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offset", torch.zeros(2, 3, dtype=torch.int64)),
        ("offset", torch.zeros(2, 2)),
        ("offset", torch.tensor(1)),
        ("flip1", torch.zeros(3, dtype=torch.bool)),
        ("flip2", torch.zeros(2)),
        ("valid1", torch.zeros(2, dtype=torch.int64)),
        ("valid2", torch.zeros(3, 2, dtype=torch.int64)),
    ],
)
def test_bad_tensors_are_named(name: str, value: torch.Tensor) -> None:
    crops = random_crops(2, 0)
    crops[name] = value
    with pytest.raises(ValueError, match=name):
        overlap_of(crops)


def test_bad_size_is_named() -> None:
    crops = random_crops(2, 0)
    names = ("offset", "flip1", "flip2", "valid1", "valid2")
    with pytest.raises(ValueError, match="size"):
        overlap_from_crops(*(crops[name] for name in names), (0, 4))
