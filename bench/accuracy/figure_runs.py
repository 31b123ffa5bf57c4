"""What the figures share: trained runs with their names, the data they saw, images chosen."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFont

from cac_fast.train import checkpoint, load
from cac_fast.train.config import Config, compared
from cac_fast.train.data.images import IGNORE
from cac_fast.train.data.layouts import Sample, SegmentationData, open_data
from cac_fast.train.errors import InputError
from cac_fast.train.inference import Predictor, check_classes
from cac_fast.train.log import read_metrics
from cac_fast.train.pictures import shortened
from cac_fast.train.registry import LAYOUTS

REPEATED = frozenset(
    "seed data_list data_dir labeled unlabeled output cache workers device".split()
)
"""Settings in which runs of one name may differ; lists must be as long."""


class Run(NamedTuple):
    """A trained network: what it is called, its checkpoint and settings."""

    name: str
    path: Path
    config: Config
    predictor: Predictor


class Log(NamedTuple):
    """What a run wrote while it trained: the lines of its metrics.jsonl."""

    name: str
    folder: Path
    config: Config
    lines: list[dict[str, Any]]


class Drawn(NamedTuple):
    """A figure, and the numbers in it, for `--json`."""

    image: Image.Image
    numbers: dict[str, Any]


def names_of(paths: Sequence[Path], captions: Sequence[str] | None) -> list[str]:
    """The captions, or the folders' names.

    Raises:
        InputError: there are not as many captions as runs.
    """
    if captions is None:
        return [(path.parent if path.is_file() else path.resolve()).name for path in paths]
    if len(captions) != len(paths):
        raise InputError(f"--captions gives {len(captions)} names for {len(paths)} runs: one each")
    return list(captions)


def open_runs(
    paths: Sequence[Path], captions: Sequence[str] | None, state: str | None = None
) -> list[Run]:
    """The networks of run folders (their best state) or of checkpoints.

    state: the file name of the checkpoint to take in place of these.

    Raises:
        InputError: one cannot be read, or they know other classes than the first.
    """
    runs = []
    for path, name in zip(paths, names_of(paths, captions), strict=True):
        if state is not None:
            path = (path if path.is_dir() else path.parent) / state
        predictor = load(path)
        if runs and predictor.classes != runs[0].predictor.classes:
            raise InputError(
                f"{path} knows other classes than {paths[0]}: compare runs on one data set"
            )
        file = checkpoint.find(path)
        with known_settings(file):
            config = Config.of(**checkpoint.read(file)["config"])
        runs.append(Run(name, file, config, predictor))
    return runs


@contextmanager
def known_settings(path: Path) -> Iterator[None]:
    """Raise InputError where the settings in `path` cannot be taken."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} holds no settings of this program ({type(error).__name__}: {error}): give a "
            "run of train/main.py"
        ) from error


def open_logs(paths: Sequence[Path], captions: Sequence[str] | None) -> list[Log]:
    """What run folders hold of the training. Without captions a seed at the end of a folder's name
    is left out, so that the runs of several seeds have one name.

    Raises:
        InputError: a folder holds no run, or runs of one name differ in more than the seed.
    """
    logs: list[Log] = []
    for path, name in zip(paths, names_of(paths, captions), strict=True):
        folder = path.parent if path.is_file() else path
        settings, lines = folder / "config.json", read_metrics(folder / "metrics.jsonl")
        if not settings.is_file() or not lines:
            raise InputError(f"{folder} holds no run that has trained: give its folder")
        if captions is None:
            name = re.sub(r"[-_]?seed\d+$", "", name) or name
        with known_settings(settings):
            config = Config.of(**json.loads(settings.read_text()))
        for other in (log for log in logs if log.name == name):
            check_seeds_alone(other, folder, config)
        logs.append(Log(name, folder, config, lines))
    return logs


def check_seeds_alone(other: Log, folder: Path, config: Config) -> None:
    """Raise InputError if two runs of one name have other settings than those of a repetition."""
    here, there = config.flat(), other.config.flat()
    different = [
        key
        for key in sorted(here.keys() - REPEATED)
        if compared(key, here[key]) != compared(key, there[key])
    ]
    for key in ("labeled", "unlabeled"):
        lengths = {list_length(here[key]), list_length(there[key])}
        if len(lengths - {None}) == 2:
            different.append(key)
    for key in different:
        raise InputError(
            f"{folder} and {other.folder} are both called {other.name}, but differ in {key} "
            f"({here[key]!r}, {there[key]!r}): tell them apart by --captions"
        )


def list_length(path: str | None) -> int | None:
    """How many lines a list of images has, 0 where there was no list; None if it is gone."""
    if path is None:
        return 0
    return len(Path(path).read_text().splitlines()) if Path(path).is_file() else None


def by_name(logs: Sequence[Log]) -> dict[str, list[Log]]:
    """The runs of each name, in order."""
    return {name: [log for log in logs if log.name == name] for name in (log.name for log in logs)}


def data_of(config: Config, data_dir: Path | None) -> SegmentationData:
    """The data that a run saw, at `data_dir` if they were moved there.

    Raises:
        InputError: as of `open_data`, or the run's layout is code outside the working folder.
    """
    LAYOUTS.check_own(config.data.dataset)
    return open_data(config.data.dataset, data_dir or config.data.data_dir)


def data_of_run(run: Run, data_dir: Path | None) -> SegmentationData:
    """The data that a network is shown, as `data_of`.

    Raises:
        InputError: as `data_of`, or their classes are not the network's.
    """
    data = data_of(run.config, data_dir)
    check_classes(run.predictor.classes, data.classes, run.path)
    return data


def with_masks(data: SegmentationData, split: str) -> list[Sample]:
    """The images of a split that have a mask.

    Raises:
        InputError: there is none.
    """
    samples = [sample for sample in data.splits.get(split, ()) if sample.mask is not None]
    if not samples:
        raise InputError(f"the {split} split of {data.root} holds no image with a mask")
    return samples


def sample_called(samples: Sequence[Sample], name: str) -> Sample:
    """The sample of that name.

    Raises:
        InputError: there is none.
    """
    found = next((sample for sample in samples if sample.name == name), None)
    if found is None:
        raise InputError(f"--image {name}: the split holds no such image with a mask")
    return found


def with_truth(
    samples: Sequence[Sample], data: SegmentationData, count: int | None = None
) -> list[Sample]:
    """The first `count` samples, or all, whose mask has a pixel of a class.

    Raises:
        InputError: there is none.
    """
    known = (sample for sample in samples if (data.read_mask(sample.mask) != IGNORE).any())
    found = list(islice(known, count))
    if not found:
        raise InputError(f"the masks of {data.root} that are to be shown are {IGNORE} all over")
    return found


def drawn_by_seed(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """So many different samples, in the order of the draw; all of them if there are fewer."""
    places = np.random.default_rng(seed).permutation(len(samples))[:count]
    return [samples[place] for place in places]


def fitted(text: str, width: int) -> str:
    """A text that a sheet can show in so many pixels; the end of one that is too long."""
    composed = unicodedata.normalize("NFC", text)
    return shortened(composed, width, ImageFont.load_default(15))


def picture_of(figure: Any) -> Image.Image:
    """A matplotlib figure as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
