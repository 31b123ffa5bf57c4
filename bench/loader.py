"""Images a second and worker of the loader, on PNGs of Cityscapes' size.

    python bench/loader.py [--json FILE]

A worker is one process with one thread. Its batches are made by the trainer's own loader, with and
without the cache, and as the paper's authors do (lib/loader_baseline.py). The crops of all three
are compared before anything is timed; then all take turns, on the same images and boxes. What the
trainer does on its device instead (colors, floats) is timed too, and added where it says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

from cac_fast.train.config import Config
from cac_fast.train.data import png
from cac_fast.train.data.augment import LabeledTransform, UnlabeledTransform
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.layouts import SegmentationData, open_data
from cac_fast.train.data.loaders import PositionSampler, batches, labeled_loader, unlabeled_loader
from cac_fast.train.data.stream import Batch, Stream
from cac_fast.train.data.toycity import CLASSES
from cac_fast.train.data.toycity.scene import draw_scene
from cac_fast.train.distributed import World
from cac_fast.train.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from lib import loader_baseline, measure, report
from lib.measure import progress
from lib.report import three_digits

KINDS = ("labeled", "unlabeled")
WAYS = ("authors", "loader", "cached")
BATCH = 2
SCENES = 2, 4
"""Toy scenes in one picture, down and across."""
LEGEND = """
labeled: one crop and its labels; unlabeled: two crops; step: one image of each. n: timed batches of
{batch} images; ms: an image, median, p20, p80; img/s: by the median; cpu: milliseconds of processor
time an image, steadier than the clock's where others use the machine; vs authors: how many times
faster, the median over the turns, and of the processor times. device: colors, floats and
normalization of an image on {device}, which the trainer's process does for all workers."""


class Contender(NamedTuple):
    """One way to make one kind of batches, and the seconds of its turns: clock's, processor's."""

    kind: str
    way: str
    next_batch: Callable[[], Any]
    times: list[tuple[float, float]]

    def run(self) -> Any:
        clock, processor = time.perf_counter(), time.process_time()
        batch = self.next_batch()
        now = time.perf_counter() - clock, time.process_time() - processor
        self.times.append((now[0] / BATCH, now[1] / BATCH))
        return batch


def write_pictures(root: Path, count: int, size: tuple[int, int]) -> float:
    """Write a `folder` data set of enlarged toy scenes with sensor noise; the MB of a picture.

    Noise of two levels gives PNGs of about the bytes and decoding time of Cityscapes' own.
    """
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    lines = (f"{i} {name} {i} 0 0\n" for i, name in enumerate(CLASSES))
    (root / "classes.txt").write_text("".join(lines))
    height, width = size[0] // SCENES[0], size[1] // SCENES[1]
    total = 0
    for number in range(count):
        rows, labels = [], []
        for _ in range(SCENES[0]):
            scenes = [
                draw_scene(rng, "brick", misleading=False, varied_light=True)
                for _ in range(SCENES[1])
            ]
            large = [Image.fromarray(s.image).resize((width, height)) for s in scenes]
            ids = [Image.fromarray(s.label).resize((width, height), 0) for s in scenes]
            rows.append(np.concatenate([np.asarray(part) for part in large], axis=1))
            labels.append(np.concatenate([np.asarray(part) for part in ids], axis=1))
        picture = np.concatenate(rows) + rng.normal(0, 2, (*size, 3))
        path = root / f"images/train/{number:02d}.png"
        Image.fromarray(picture.round().clip(0, 255).astype(np.uint8)).save(path)
        Image.fromarray(np.concatenate(labels)).save(root / f"masks/train/{number:02d}.png")
        total += path.stat().st_size
        progress(f"picture {number + 1} of {count}")
    return total / count / 1e6


def stream(
    data: SegmentationData, kind: str, way: str, cache: Path, crop: int, colors: bool
) -> Iterator[Batch]:
    """Endless batches of one kind, made one way, in this process."""
    samples = data.splits["train"]
    base = max(Image.open(samples[0].image).size)
    if way == "authors":
        crops = {
            "labeled": loader_baseline.LabeledCrops,
            "unlabeled": loader_baseline.UnlabeledCrops,
        }
        dataset = crops[kind](samples, crop, base, colors)
        yield from DataLoader(dataset, batch_sampler=PositionSampler(0, BATCH, 0, 1))
        return
    options = {"seed": 0, "batch_size": BATCH, "cache": cache if way == "cached" else None}
    if kind == "labeled":
        scale = loader_baseline.LABELED_SCALE
        transform = LabeledTransform(crop, scale, base, jitter=colors)
        loader = labeled_loader(samples, data, transform, **options)
    else:
        ranges = loader_baseline.UNLABELED_SCALE, base, loader_baseline.IOU_RANGE
        transform = UnlabeledTransform(crop, *ranges, photometric=colors)
        loader = unlabeled_loader(samples, data, transform, **options)
    yield from batches(loader)


def problem(data: SegmentationData, cache: Path, crop: int) -> str | None:
    """How the crops of the three ways differ, all colors left alone; None if they do not."""
    for kind in KINDS:
        ways = [islice(stream(data, kind, way, cache, crop, False), 2) for way in WAYS]
        for authors, ours, cached in zip(*ways, strict=True):
            for name in ("image", "image1", "image2", "label"):
                if name not in ours:
                    continue
                if not torch.equal(ours[name], cached[name]):
                    return f"{kind}: the cache changes {name}"
                theirs = authors[name]
                if name == "label":
                    # A center on the border of two source pixels may go either way: 2% at most
                    # in pictures of 64 rows.
                    if (theirs != ours[name]).float().mean() > 0.05:
                        return f"{kind}: the labels differ"
                    continue
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
                levels = (255 * (theirs * std + mean) - ours[name]).abs()
                # Each library rounds after both of its passes, by weights of other precision.
                if levels.max() > 2.01 or levels.mean() > 0.1:
                    return f"{kind}: {name} differs by {levels.max():.3g} levels of 255"
    return None


def take_turns(contenders: list[Contender], on_device: Stream, minutes: float) -> dict[str, Any]:
    """Round-robin, so that what slows the machine down for a while hits all alike.

    Returns the device's seconds an image by kind, clock's and processor's.
    """
    device: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    target = on_device.world.device
    begin, turn = time.monotonic(), 0
    while turn < 3 or time.monotonic() - begin < 60 * minutes:
        turn += 1
        for contender in contenders:
            batch = contender.run()
            if contender.way == "cached":
                batch = {name: value for name, value in batch.items() if torch.is_tensor(value)}
                processor = time.process_time()
                call = partial(on_device.to_device, batch)
                _, took = measure.host_and_wall(call, target)
                processor = time.process_time() - processor
                device[contender.kind].append((took / BATCH, processor / BATCH))
        parts = [f"{c.kind[0]} {c.way} {1e3 * c.times[-1][0]:.0f}" for c in contenders]
        progress(f"turn {turn}, {time.monotonic() - begin:.0f} s: {', '.join(parts)} ms")
    return device


def make_rows(
    contenders: list[Contender], device: dict[str, list[tuple[float, float]]]
) -> list[dict[str, Any]]:
    """A row for each kind and way, a step of both kinds, and the same with the device's part."""
    times = {(c.kind, c.way): np.array(c.times) for c in contenders}
    extra = {kind: np.array(values) for kind, values in device.items()}
    for way in WAYS:
        times["step", way] = times["labeled", way] + times["unlabeled", way]
    extra["step"] = extra["labeled"] + extra["unlabeled"]
    rows = []
    for kind in (*KINDS, "step"):
        theirs = times[kind, "authors"]
        for way in WAYS:
            rows.append(_row(kind, way, times[kind, way], theirs))
            if way != "authors":
                rows.append(_row(kind, f"{way} + device", times[kind, way] + extra[kind], theirs))
        rows.append(_row(kind, "device", extra[kind], theirs))
    return rows


def _row(kind: str, way: str, times: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    clock, processor = times.T
    milliseconds = measure.percentiles(clock)
    row = {
        "kind": kind,
        "way": way,
        "runs": len(times),
        **milliseconds,
        "images_per_s": (2e3 if kind == "step" else 1e3) / milliseconds["median_ms"],
        "cpu_ms": 1e3 * float(np.median(processor)),
    }
    if way != "device":
        ratios = np.median(theirs / times, axis=0)
        row |= {"faster_than_authors": float(ratios[0]), "cpu_faster": float(ratios[1])}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as Markdown."""
    head = ["", "n", "ms", "p20", "p80", "img/s", "cpu", "vs authors", "cpu"]
    names = "median_ms p20_ms p80_ms images_per_s cpu_ms".split()
    lines = [head]
    for row in rows:
        ratios = [three_digits(row.get(name)) for name in ("faster_than_authors", "cpu_faster")]
        numbers = [three_digits(row[name]) for name in names]
        lines.append([f"{row['kind']}: {row['way']}", str(row["runs"]), *numbers, *ratios])
    return report.aligned(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", default=devices[0], choices=devices)
    parser.add_argument("--crop-size", type=int, default=720, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--height", type=int, default=1024, metavar="N", help="of a picture (%(default)s)"
    )
    parser.add_argument(
        "--pictures", type=int, default=6, metavar="N", help="how many (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=1.5, help="for timing (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows, device, versions")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Measure and report; 1 where the crops differ."""
    options = parse(arguments)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    facts = measure.facts(device) | {
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "imagecodecs": version("imagecodecs") if png.spng_decode is not None else None,
        "threads": 1,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root, cache = Path(folder) / "data", Path(folder) / "cache"
        megabytes = write_pictures(root, options.pictures, (options.height, 2 * options.height))
        data = open_data("folder", root)
        samples = data.splits["train"]
        PixelReader(data, cache).fill(samples, samples)
        progress("comparing the crops")
        if wrong := problem(data, cache, options.crop_size):
            print(f"nothing was timed: {wrong}")
            return 1
        contenders = [
            Contender(
                kind, way, stream(data, kind, way, cache, options.crop_size, True).__next__, []
            )
            for kind in KINDS
            for way in WAYS
        ]
        on_device = Stream(
            Config.of(dataset="folder", data_dir=str(root)), World(0, 1, device), data, [], []
        )
        rows = make_rows(contenders, take_turns(contenders, on_device, options.minutes))
    print(LEGEND.format(batch=BATCH, device=facts["device"]) + f"\n\n{table(rows)}")
    record = {
        "command": measure.command_line("bench/loader.py", arguments),
        **facts,
        "gpu": measure.gpu_state(device),
        "picture_mb": megabytes,
        "rows": rows,
    }
    measure.write_record(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
