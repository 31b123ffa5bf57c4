"""The cache of decoded files: the same bits with and without it, and what is never used."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import one_line, write_folder, write_image
from test_loaders import equal, labeled_of, rows, take

from cac_fast.train import config, distributed
from cac_fast.train.data import cache as cache_module
from cac_fast.train.data import opening
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.layouts import Sample, open_data
from cac_fast.train.data.loaders import check_samples
from cac_fast.train.data.stream import Stream, fill_cache
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError


@pytest.fixture
def data(tmp_path):
    return open_data("folder", write_folder(tmp_path / "data", labeled=3, unlabeled=2))


@pytest.fixture
def filled(data, tmp_path) -> PixelReader:
    """All images and masks in the cache."""
    reader = PixelReader(data, tmp_path / "cache")
    reader.fill(data.splits["train"], data.splits["train"])
    return reader


def entries(reader: PixelReader) -> list[Path]:
    return sorted(reader.cache.iterdir())


def stamps(reader: PixelReader) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in entries(reader)}


def is_mapped(reader: PixelReader, path: Path) -> bool:
    return isinstance(reader.image(path), np.memmap)


@pytest.mark.parametrize("kind", ["labeled", "unlabeled"])
@pytest.mark.parametrize("workers", [0, 1])
def test_same_bits_with_and_without(data, filled, kind, workers, monkeypatch):
    options = {"with_truth": True} if kind == "unlabeled" else {}
    plain = take(data, kind, 3, crop=24, **options)
    # From here on no file is decoded, also in the worker, which is forked.
    monkeypatch.setattr(cache_module, "read_image", None)
    monkeypatch.setattr(type(data), "read_mask", None)
    cached = take(data, kind, 3, crop=24, workers=workers, cache=filled.cache, **options)
    assert equal(rows(plain), rows(cached))


def test_holds_what_decoding_gives(data, filled):
    for sample in data.splits["train"]:
        without = PixelReader(data)
        assert is_mapped(filled, sample.image)
        assert np.array_equal(filled.image(sample.image), without.image(sample.image))
        if sample.mask is not None:
            assert isinstance(filled.mask(sample.mask), np.memmap)
            assert np.array_equal(filled.mask(sample.mask), without.mask(sample.mask))
    assert len(entries(filled)) == 5 + 3


def test_whole_entries_are_kept_and_progress_is_told(data, filled):
    before, seen = stamps(filled), []
    damaged = entries(filled)[3]
    damaged.write_bytes(b"")

    def show(text):
        return lambda *done: seen.append((text.split()[0], *done))

    for _ in range(2):
        filled.fill(data.splits["train"], data.splits["train"], show)
    checks = [("checking", i, 8) for i in range(1, 9)]
    assert seen == [*checks, ("writing", 1, 1), *checks]
    after = stamps(filled)
    assert [path for path in after if after[path] != before[path]] == [damaged]


def test_check_reads_no_pixels(data, filled, monkeypatch):
    """Neither sources nor entries, nor is anything written: the cache may be read-only."""
    entry = entries(filled)[0]
    content = bytearray(entry.read_bytes())
    content[-5] ^= 1
    entry.write_bytes(content)
    (filled.cache / ".old.part").touch()
    os.utime(filled.cache / ".old.part", (1, 1))

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("unlink", "rename", "replace", "write_bytes", "read_bytes"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(PixelReader, "_write", refuse)
    monkeypatch.setattr(cache_module, "read_image", refuse)
    filled.fill(data.splits["train"], data.splits["train"])
    check_samples(data.splits["train"][:2], filled)


def test_what_reads_back_differently_is_not_kept(data, tmp_path, monkeypatch):
    reader = PixelReader(data, tmp_path / "cache")
    flush = os.fsync

    def lose(file):
        os.pwrite(file, b"\xaa\x55", 1000)
        flush(file)

    monkeypatch.setattr(cache_module.os, "fsync", lose)
    with pytest.raises(InputError) as error:
        reader.fill(data.splits["train"], [])
    one_line(error, reader.cache, "reads back differently")
    assert entries(reader) == []


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "version", "shape"])
def test_damaged_entry_is_written_again(data, filled, damage):
    path = data.splits["train"][0].image
    good = PixelReader(data).image(path)
    entry = filled._entry(path)
    content = bytearray(entry.read_bytes())
    if damage == "version":
        content[7] ^= 1
    elif damage == "shape":
        content[8] += 1
    entry.write_bytes(
        {"cut": content[:-1], "longer": content + b"x", "empty": b""}.get(damage, content)
    )
    assert not is_mapped(filled, path)
    assert np.array_equal(filled.image(path), good)
    before = stamps(filled)
    filled.fill(data.splits["train"], data.splits["train"])
    after = stamps(filled)
    assert [p for p in after if after[p] != before[p]] == [entry]
    assert is_mapped(filled, path) and np.array_equal(filled.image(path), good)


@pytest.mark.parametrize("change", ["pixels", "time"])
def test_stale_entry_is_not_used_and_written_again(data, filled, change):
    path = data.splits["train"][1].image
    if change == "pixels":
        write_image(path, seed=99)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not is_mapped(filled, path)
    count = len(entries(filled))
    filled.fill(data.splits["train"], data.splits["train"])
    assert is_mapped(filled, path) and len(entries(filled)) == count
    assert np.array_equal(filled.image(path), PixelReader(data).image(path))


def test_a_mask_depends_on_the_classes(data, filled):
    other = replace(data, classes=data.classes[:2], palette=data.palette[:2])
    with pytest.raises(InputError):
        PixelReader(other, filled.cache).mask(data.splits["train"][0].mask)


def test_unreadable_files_get_no_entry(data, tmp_path):
    sample = data.splits["train"][0]
    sample.image.write_bytes(sample.image.read_bytes()[:300])
    data.splits["train"][1].image.unlink()
    reader = PixelReader(data, tmp_path / "cache")
    reader.fill(data.splits["train"], [])
    assert len(entries(reader)) == 3
    with pytest.raises(InputError) as error:
        reader.image(sample.image)
    one_line(error, sample.image)


def test_full_disk_is_one_line_and_is_resumed(data, tmp_path, monkeypatch):
    reader = PixelReader(data, tmp_path / "cache")
    written = []

    def replace_once(draft, entry):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(entry)
        os.rename(draft, entry)

    monkeypatch.setattr(cache_module.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(cache_module.os, "replace", replace_once)
    with pytest.raises(InputError) as error:
        reader.fill(data.splits["train"], [])
    one_line(error, reader.cache, "No space left", "after 2 of 5 files", "--cache")
    assert entries(reader) == sorted(written)  # and no draft
    monkeypatch.undo()
    before = stamps(reader)
    reader.fill(data.splits["train"], [])
    assert len(entries(reader)) == 5 and before.items() <= stamps(reader).items()


def test_folder_that_cannot_be(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as error:
        PixelReader(data, tmp_path / "file").fill(data.splits["train"], [])
    one_line(error, tmp_path / "file", "after 0 of 5", "--cache")


def test_old_drafts_are_removed(data, filled, monkeypatch):
    old, young = filled.cache / ".a.part", filled.cache / ".b.part"
    old.touch()
    young.touch()
    os.utime(old, (1, 1))
    # What another run renamed after it was listed: here it is gone from the start.
    monkeypatch.setattr(Path, "glob", lambda *_: [filled.cache / ".gone.part", old, young])
    filled.fill([], [])
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("name", [b"\xff\xfe.png", "\u753b".encode() * 80 + b".png"])
def test_any_file_name(data, tmp_path, name):
    """A name that is no UTF-8, and one that leaves no room for more."""
    path = write_image(tmp_path / "image.png").rename(tmp_path / os.fsdecode(name))
    reader = PixelReader(data, tmp_path / "cache")
    reader.fill([Sample("image", path, None)], [])
    assert is_mapped(reader, path)


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_first_rank_of_each_machine_fills(local_rank, monkeypatch):
    """And an error of any of them is everyone's."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    filled, others = [], []
    monkeypatch.setattr(distributed, "_patient_group", contextlib.nullcontext)
    monkeypatch.setattr(World, "all_gather_objects", lambda _, message, group: [message, *others])
    world = World(2, 4, torch.device("cpu"))
    world.on_each_machine(lambda: filled.append(True))
    assert bool(filled) == (local_rank == "0")
    others[:] = [None, "no room", None]
    with pytest.raises(InputError, match="no room"):
        world.on_each_machine(lambda: None)


def test_masks_of_unlabeled_images_are_never_opened(tmp_path):
    root = write_folder(tmp_path / "data", labeled=4, unlabeled=0)
    names = [f"t{i:02d}" for i in range(4)]
    for name in names[2:]:  # opening it would wait for a writer for ever
        mask = root / f"masks/train/{name}.png"
        mask.unlink()
        os.mkfifo(mask)
    data = open_data("folder", root)
    reader = PixelReader(data, tmp_path / "cache")
    reader.fill(data.splits["train"], labeled_of(data)[:2])
    found = take(data, "unlabeled", 2, cache=reader.cache)
    assert {name for batch in found for name in batch["name"]} == set(names)


@pytest.mark.parametrize("method, count", [("cac", 7 + 4), ("supervised", 4 + 4)])
def test_a_run_fills_its_cache_and_reads_the_same(folder_data, tmp_path, method, count):
    found = []
    for cache in (None, str(tmp_path / "cache")):
        settings = config.Config.of(
            dataset="folder",
            data_dir=str(folder_data),
            method=method,
            batch_size=2,
            crop_size=32,
            workers=0,
        )
        settings = settings.changed(cache=cache)
        data, labeled, unlabeled = read = opening.open_lists(settings)
        if cache is not None:
            fill_cache(settings, data, labeled, unlabeled if method == "cac" else [])
        world = World(0, 1, torch.device("cpu"))
        steps = Stream(settings, world, *read).steps(0, 2, method == "cac")
        found.append([step.labeled | (step.unlabeled or {}) for step in steps])
    assert len(list((tmp_path / "cache").iterdir())) == count
    assert equal(*found)
