"""Batches: a function of seed and position alone, and bad files on their way to the user."""

from __future__ import annotations

import os
from itertools import islice

import pytest
import torch
from data_folders import DATA, needs_camvid, one_line, write_folder, write_image, write_mask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cac_fast.overlap import overlap_from_crops
from cac_fast.train.data.augment import LabeledTransform, UnlabeledTransform
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.loaders import (
    LABELED,
    UNLABELED,
    PositionSampler,
    batches,
    check_samples,
    item_index,
    labeled_loader,
    position_rng,
    unlabeled_loader,
)
from cac_fast.train.errors import InputError

ONCE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)


@pytest.fixture
def folder(tmp_path):
    return open_data("folder", write_folder(tmp_path / "data", labeled=5, unlabeled=3))


def labeled_of(data):
    return [sample for sample in data.splits["train"] if sample.mask is not None]


def take(data, kind: str, count: int, samples=None, crop: int = 16, **options) -> list[dict]:
    """The first `count` batches."""
    options = {"seed": 0, "batch_size": 4, **options}
    if kind == "labeled":
        samples = labeled_of(data) if samples is None else samples
        loader = labeled_loader(samples, data, LabeledTransform(crop), **options)
    else:
        samples = data.splits["train"] if samples is None else samples
        loader = unlabeled_loader(samples, data, UnlabeledTransform(crop), **options)
    return list(islice(batches(loader), count))


def rows(found: list[dict]) -> list[dict]:
    """The items of some batches one by one."""
    return [
        {name: values[i] for name, values in batch.items()}
        for batch in found
        for i in range(len(batch["name"]))
    ]


def equal(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        one.keys() == two.keys()
        and all(
            torch.equal(one[name], two[name])
            if torch.is_tensor(one[name])
            else one[name] == two[name]
            for name in one
        )
        for one, two in zip(first, second, strict=True)
    )


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_every_pass_is_a_permutation(n, epoch, seed):
    indices = [item_index(seed, LABELED, epoch * n + i, n) for i in range(n)]
    assert sorted(indices) == list(range(n))


def test_passes_streams_and_seeds_differ():
    orders = {
        tuple(item_index(seed, stream, epoch * 30 + i, 30) for i in range(30))
        for seed in (0, 1)
        for stream in (LABELED, UNLABELED)
        for epoch in (0, 1)
    }
    assert len(orders) == 8
    draws = {
        position_rng(seed, stream, position).integers(2**60)
        for seed in (0, 1)
        for stream in (LABELED, UNLABELED)
        for position in range(10)
    }
    assert len(draws) == 40


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 50))
def test_ranks_share_out_every_step(batch_size, world_size, start):
    if batch_size < world_size:
        with pytest.raises(InputError) as error:
            PositionSampler(start, batch_size, 0, world_size)
        one_line(error, batch_size, world_size)
        return
    steps = zip(
        *(PositionSampler(start, batch_size, rank, world_size) for rank in range(world_size)),
        strict=False,
    )
    for step, parts in enumerate(islice(steps, 3), start=start):
        positions = [position for part in parts for position in part]
        assert positions == list(range(step * batch_size, (step + 1) * batch_size))
        sizes = {len(part) for part in parts}
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
@ONCE
@given(world_size=st.integers(1, 4), start=st.integers(0, 3))
def test_ranks_and_restarts_draw_the_same(folder, kind, world_size, start):
    whole = rows(take(folder, kind, 4))
    parts = [
        take(folder, kind, 4 - start, rank=rank, world_size=world_size, start_iteration=start)
        for rank in range(world_size)
    ]
    joined = [item for step in zip(*parts, strict=True) for item in rows(list(step))]
    assert equal(joined, whole[4 * start :])


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_the_same(folder, kind, workers):
    assert equal(rows(take(folder, kind, 4)), rows(take(folder, kind, 4, workers=workers)))


def test_seed_changes_what_is_drawn(folder):
    first, second = (rows(take(folder, "labeled", 2, seed=seed)) for seed in (0, 1))
    assert not equal(first, second)


def test_an_image_is_augmented_anew_in_every_pass(folder):
    samples = labeled_of(folder)[:1]
    first, second = rows(take(folder, "labeled", 1, samples, batch_size=2))
    assert first["name"] == second["name"] == "t00"
    assert not torch.equal(first["image"], second["image"])


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generator_is_left_alone(folder, workers):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    take(folder, "unlabeled", 2, workers=workers)
    assert torch.equal(before, torch.get_rng_state())


def test_shapes(folder):
    (batch,) = take(folder, "labeled", 1, crop=24)
    assert batch["image"].shape == (4, 3, 24, 24) and batch["label"].shape == (4, 24, 24)
    assert batch["image"].dtype == batch["label"].dtype == torch.uint8
    (batch,) = take(folder, "unlabeled", 1, crop=24, with_truth=True)
    assert batch["image1"].shape == batch["image2"].shape == (4, 3, 24, 24)
    assert batch["truth1"].shape == (4, 3, 3) and batch["skipped"].tolist() == [0] * 4
    assert "skipped_files" not in batch and len(batch["name"]) == 4


def test_truth_does_not_change_what_is_drawn(folder):
    plain, with_truth = (
        rows(take(folder, "unlabeled", 3, with_truth=flag)) for flag in (False, True)
    )
    for item in with_truth:
        item.pop("truth1"), item.pop("truth2")
    assert equal(plain, with_truth)


@pytest.mark.parametrize("mask", ["none", "size", "value", "broken"])
def test_truth_is_unknown_without_a_usable_mask(folder, mask):
    sample = folder.splits["train"][0 if mask != "none" else -1]
    if mask == "size":
        write_mask(sample.mask, 10, 10)
    elif mask == "value":
        write_mask(sample.mask, value=77)
    elif mask == "broken":
        sample.mask.write_bytes(b"")
    (batch,) = take(folder, "unlabeled", 1, [sample], with_truth=True)
    assert (batch["truth1"] == 255).all() and (batch["truth2"] == 255).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_unlabeled_image_is_skipped_and_counted(folder, workers, capsys):
    samples = folder.splits["train"]
    good = rows(take(folder, "unlabeled", 6))
    broken = samples[2]
    broken.image.write_bytes(broken.image.read_bytes()[:300])
    found = rows(take(folder, "unlabeled", 6, workers=workers))
    assert broken.name not in {item["name"] for item in found}
    for before, after in zip(good, found, strict=True):
        if before["name"] == broken.name:
            assert after.pop("skipped") == 1
        else:
            assert equal([before], [after])
    assert sum(item["name"] == broken.name for item in good) == 3
    (line,) = capsys.readouterr().err.splitlines()  # once, though it was met three times
    assert line.startswith("warning: skipped: ") and str(broken.image) in line


def test_replacements_do_not_depend_on_workers(folder):
    for sample in folder.splits["train"][:5]:
        sample.image.write_bytes(b"")
    first, second = (rows(take(folder, "unlabeled", 6, workers=workers)) for workers in (0, 2))
    assert equal(first, second) and max(int(item["skipped"]) for item in first) > 1


def test_one_good_image_among_ten_is_found(tmp_path):
    data = open_data("folder", write_folder(tmp_path, labeled=0, unlabeled=10))
    for sample in data.splits["train"][1:]:
        sample.image.write_bytes(b"")
    assert {item["name"] for item in rows(take(data, "unlabeled", 5))} == {"t00"}


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("workers", [0, 2])
def test_all_unlabeled_images_corrupt(tmp_path, count, workers):
    data = open_data("folder", write_folder(tmp_path, labeled=0, unlabeled=count))
    for sample in data.splits["train"]:
        sample.image.write_bytes(b"")
    with pytest.raises(InputError) as error:
        take(data, "unlabeled", 1, workers=workers)
    one_line(error, f"{min(count, 10)} unlabeled images", data.root)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["image", "missing", "value", "size"])
def test_bad_labeled_file_is_one_plain_line(folder, workers, fault):
    sample = labeled_of(folder)[3]
    if fault == "image":
        sample.image.write_bytes(sample.image.read_bytes()[:300])
    elif fault == "missing":
        os.remove(sample.mask)
    elif fault == "value":
        write_mask(sample.mask, value=77)
    else:
        write_mask(sample.mask, 10, 20)
    with pytest.raises(InputError) as error:
        take(folder, "labeled", 2, workers=workers)
    message = one_line(error, sample.image if fault == "image" else sample.mask)
    assert type(error.value) is InputError and "Traceback" not in message
    if fault == "size":
        assert "is 20 x 10 but image" in message and "is 32 x 24:" in message


def test_no_samples(folder):
    with pytest.raises(InputError) as error:
        take(folder, "labeled", 1, samples=[])
    one_line(error, "empty")


def test_check_samples_reads_all_and_reports_progress(folder):
    seen = []
    check_samples(
        labeled_of(folder), PixelReader(folder), lambda done, total: seen.append((done, total))
    )
    assert seen == [(i, 5) for i in range(1, 6)]
    check_samples(labeled_of(folder), PixelReader(folder))


def test_check_samples_names_the_first_and_counts_the_rest(folder):
    samples = labeled_of(folder)
    write_mask(samples[1].mask, 10, 20)
    write_mask(samples[3].mask, value=9)
    samples[4].image.write_bytes(b"")
    with pytest.raises(InputError) as error:
        check_samples(samples, PixelReader(folder))
    one_line(error, f"mask {samples[1].mask} is 20 x 10 but image", "32 x 24", "2 more")
    with pytest.raises(InputError) as error:
        check_samples(samples[3:4], PixelReader(folder))
    assert "more such" not in one_line(error, samples[3].mask, "id 9,")
    with pytest.raises(InputError) as error:
        check_samples(samples[4:], PixelReader(folder))
    one_line(error, samples[4].image)


def test_check_samples_minds_the_exif_orientation(folder):
    from PIL import Image

    sample = labeled_of(folder)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = write_image(sample.image, height=32, width=24)
    with Image.open(turned) as image:
        image.save(turned, exif=exif)
    check_samples([sample], PixelReader(folder))
    assert rows(take(folder, "labeled", 1, [sample], batch_size=1))[0]["name"] == sample.name


@needs_camvid
def test_real_frames_pair_up():
    data = open_data("folder", DATA / "camvid")
    samples = data.splits["train"][:6]
    check_samples(samples, PixelReader(data))
    (batch,) = take(data, "unlabeled", 1, samples, crop=128, batch_size=6, with_truth=True)
    names = ("offset", "flip1", "flip2", "valid1", "valid2")
    overlap = overlap_from_crops(*(batch[name] for name in names), (16, 16))
    paired = overlap.partner1 >= 0
    truth1, truth2 = batch["truth1"].flatten(1), batch["truth2"].flatten(1)
    assert torch.equal(truth1[paired], truth2.gather(1, overlap.partner1.clamp(min=0))[paired])
    assert (overlap.counts >= 0.1 * 256 * 2 / 1.1 - 1).all()  # IoU 0.1: 0.1 / 1.1 * 2 of a crop
