"""The runs behind a table of the paper: their settings, what they need first, how far they are."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accuracy.arms import needs_teacher
from accuracy.paper_tables import NEGATIVES, Row, Settings, Table
from accuracy.record import content_digests
from accuracy.runs import list_folder, val_curve
from accuracy.table_classify import SEEN, described, settings_of
from cac_fast.train import checkpoint, config, registry
from cac_fast.train.config import FREE, Config, compared
from cac_fast.train.data.layouts import SegmentationData
from cac_fast.train.errors import InputError
from cac_fast.train.log import read_metrics
from cac_fast.train.settings import FIELDS
from cac_fast.train.weak.labels import FROM_MASKS, read_labels

BACKBONE = "{backbone}"
"""In `--weights`: the backbone of a row."""


@dataclass(frozen=True)
class Run:
    """A command that leaves a folder.

    program: of the project. words: its options but for those of `needs` and `--output`.
    settings: of a training; None of a classification. key: hash of what it computes.
    needs: option, run that comes first, and what of its folder the option takes.
    """

    program: str
    words: tuple[str, ...]
    settings: Config | None
    key: str
    needs: tuple[tuple[str, Run, str], ...] = ()

    def folder(self, options: argparse.Namespace) -> Path:
        """Where it lies."""
        kind = "classify" if self.settings is None else self.settings.loss.method
        seed = "" if self.settings is None else f"-seed{self.settings.run.seed}"
        return options.runs / f"{kind.replace(':', '_')}{seed}-{self.key}"

    def command(self, options: argparse.Namespace) -> list[str]:
        """The options of its program."""
        needs = [
            word
            for option, run, part in self.needs
            for word in (option, str(run.folder(options) / part))
        ]
        return [*self.words, *needs, "--output", str(self.folder(options))]


class Cell(NamedTuple):
    """A number of the paper and our runs for it by seed; without any, `note` says why."""

    row: str
    column: str
    paper: float | None
    runs: dict[int, Run]
    note: str = ""


def flags(settings: Settings) -> list[str]:
    """Settings as options of `train/main.py`."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def all_rows(table: Table) -> list[Row]:
    """The table's rows, and one for each further method of the registry and network."""
    known = {row.method for row in table.rows}
    values = (None,) * len(table.columns)
    joined = [
        Row(f"{method} {name}", values, method, network)
        for name, network in table.joins.items()
        for method in registry.METHODS.entries
        if method not in known
    ]
    return [*table.rows, *joined]


def key_of(settings: Config, data: SegmentationData, *more: str) -> str:
    """A hash of what a run computes: its settings without paths, seed included, the names of the
    data, what its lists hold, and `more`.

    Settings at their default are left out, so that a setting which is new changes no hash.
    """
    flat = {
        name: compared(name, value)
        for name, value in settings.flat().items()
        if name not in FREE and value != FIELDS[name].default
    }
    lists = [path for path in (settings.data.labeled, settings.data.unlabeled) if path]
    digests = content_digests(data, {"lists": [Path(path) for path in lists]})
    text = json.dumps([flat, digests, more], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _list_words(
    table: Table, share: str, seed: int, options: argparse.Namespace, data: SegmentationData
) -> list[str]:
    given = config.parse([*options.data, *options.rest]).data
    chosen = given.labeled is not None or given.labeled_share is not None
    if chosen and table.list_by_seed:
        raise InputError("the columns of this table are shares: leave out --labeled and its like")
    if share == "full":
        return ["--labeled-share", "full"]
    number = seed if table.list_by_seed else 0
    if options.lists is not None:
        folder = list_folder(options.lists.replace("{share}", share.replace("/", "_")), number)
        names = ("labeled", "unlabeled")
        return [word for name in names for word in (f"--{name}", str(folder / f"{name}.txt"))]
    if not table.list_by_seed:
        # Without columns of shares, the call and the data may choose.
        if chosen:
            return []
        fine = data.root / "ImageSets/Segmentation/train.txt"
        if table.weakly and data.dataset == "voc" and fine.is_file():
            return ["--labeled", str(fine)]
        if data.lists is not None:
            return []
    return ["--labeled-share", share, "--data-list", str(number)]


def _capped(own: Settings, settings: Config) -> tuple[Settings, str]:
    """A row's own settings with no more negatives than a view has locations, and what to say."""
    most = settings.optim.batch_size * (settings.data.crop_size // 8) ** 2
    asked = own.get("negatives_per_view", 0)
    if asked <= most:
        return own, ""
    return {**own, "negatives_per_view": most}, f"n {asked} capped at {most}, all there are"


def _base(table: Table, row: Row, dataset: str) -> dict[str, Any]:
    """A row's network and negatives, before what a call says."""
    preset = registry.LAYOUTS.entry(dataset).preset
    base = {
        name: value
        for name, value in row.network.items()
        # The data's own backbone must not make equal what the table compares.
        if name not in preset or len({r.network[name] for r in table.rows if r.method}) > 1
    }
    if row.method == "cac":
        base |= NEGATIVES.get(dataset, {})
    return base


def _own_weights(asked: Config) -> list[str]:
    """The option for the row's own file, where `--weights` has a place for its backbone."""
    weights = asked.model.weights
    if weights is None or BACKBONE not in weights:
        return []
    return ["--weights", weights.replace(BACKBONE, asked.model.backbone.replace("/", "_"))]


def training(
    table: Table,
    row: Row,
    lists: list[str],
    seed: int,
    options: argparse.Namespace,
    data: SegmentationData,
) -> tuple[Run, str]:
    """A row's run of one seed, before what it needs, and what its table must say of it."""
    first = [
        *flags(_base(table, row, options.dataset)),
        *options.data,
        *lists,
        *options.rest,
        "--method",
        str(row.method),
    ]
    asked = config.parse(first)
    first += _own_weights(asked)
    own, note = _capped(row.own, asked)
    words = [*first, *flags(own), "--seed", str(seed)]
    settings = config.parse(words)
    return Run("train/main.py", tuple(words), settings, key_of(settings, data)), note


def _after(run: Run, data: SegmentationData, option: str, first: Run, part: str = "") -> Run:
    """The run that takes `part` of the folder of another one."""
    assert run.settings is not None
    key = key_of(run.settings, data, option, first.key)
    return Run(run.program, run.words, run.settings, key, ((option, first, part),))


def _classification(
    settings: Config, options: argparse.Namespace, data: SegmentationData
) -> tuple[Run, str]:
    """What writes the pseudo masks of a training, of its images and with its backbone; and what
    its table must say of it."""
    flat = settings.flat()
    chosen = {name: flat[name] for name in SEEN if flat[name] is not None}
    plain = [*options.data, *flags(chosen)]
    words = [*plain, *options.classify]
    asked, default = settings_of(words), settings_of(plain)
    told = options.image_labels
    if told is not None:
        words += ["--image-labels", told]
    if told not in (None, FROM_MASKS):
        labels = read_labels(Path(told), data)
        told = sorted((image.name, of_image) for image, of_image in labels.items())
    # As in `key_of`: what is the default has no part in the key.
    own = {name: asked[name] for name in asked if name not in FREE and asked[name] != default[name]}
    more = ["classify", str(told), *([json.dumps(own, sort_keys=True)] if own else [])]
    key = key_of(Config.of(dataset=settings.data.dataset, **chosen), data, *more)
    return Run("train/classify.py", tuple(words), None, key), described(asked)


def cells(table: Table, options: argparse.Namespace, data: SegmentationData) -> list[Cell]:
    """All cells of a table.

    Raises:
        InputError: a setting or list cannot be used.
    """
    found = []
    for row in all_rows(table):
        for index, column in enumerate(table.columns):
            place = row.name, column, row.values[index]
            if row.method is None and row.values[index] is None:
                continue
            if reason := _missing(row, column in table.weakly, options):
                found.append(Cell(*place, {}, reason))
                continue
            runs, note = {}, ""
            for seed in options.seeds:
                lists = _list_words(table, table.shares[index], seed, options, data)
                run, note = training(table, row, lists, seed, options, data)
                if needs_teacher(str(row.method)):
                    first = row._replace(method="supervised")
                    teacher, _ = training(table, first, lists, seed, options, data)
                    run = _after(run, data, "--teacher", teacher)
                    assert teacher.settings is not None
                    steps = teacher.settings.optim.iterations
                    note = "; ".join(filter(None, [note, f"behind {steps} steps of its teacher"]))
                if column in table.weakly:
                    assert run.settings is not None
                    masks, said = _classification(run.settings, options, data)
                    note = "; ".join(filter(None, [note, said]))
                    run = _after(run, data, "--pseudo-labels", masks, "masks")
                runs[seed] = run
            found.append(Cell(*place, runs, note))
    return found


def _missing(row: Row, weakly: bool, options: argparse.Namespace) -> str:
    """Why a cell has no runs; nothing if it has some."""
    if row.method is None:
        return "the paper's number alone"
    if row.method not in registry.METHODS.entries:
        return f"no method {row.method} here"
    backbone = row.network.get("backbone", "").partition("/")[0]
    if backbone not in registry.BACKBONES.entries:
        return f"no backbone {backbone} here"
    if weakly and options.dataset != "voc" and options.image_labels is None:
        return "needs --image-labels"
    return ""


def ordered(chosen: list[Cell], seeds: list[int]) -> dict[str, Run]:
    """All runs of cells by their keys: seed after seed, each behind those that it needs."""
    found: dict[str, Run] = {}

    def add(run: Run) -> None:
        for _, first, _ in run.needs:
            add(first)
        found.setdefault(run.key, run)

    for seed in seeds:
        for cell in chosen:
            if seed in cell.runs:
                add(cell.runs[seed])
    return found


def labels(all_cells: list[Cell]) -> dict[str, str]:
    """What a run is called: the cells that it is for, or those of the runs that need it."""
    own: dict[str, list[str]] = {}
    needed: dict[str, list[str]] = {}
    for cell in all_cells:
        for seed, run in cell.runs.items():
            name = f"{cell.row} {cell.column} seed {seed}"
            own.setdefault(run.key, []).append(name)
            for _, first, _ in run.needs:
                needed.setdefault(first.key, []).append(f"for {name}")
    return {key: " = ".join(names) for key, names in (needed | own).items()}


def check_weights(
    runs: Mapping[str, Run], names: Mapping[str, str], options: argparse.Namespace
) -> None:
    """Raise InputError if the weights that a run begins with are not there.

    runs: by their keys; names: what each is called.
    """
    for key, run in runs.items():
        path = None if run.settings is None else run.settings.model.weights
        # A run that has begun goes on from its own state.
        if path in (None, "timm") or (run.folder(options) / "last.pt").is_file():
            continue
        if not checkpoint.find(Path(path)).is_file():
            raise InputError(
                f"--weights {path} of {names[key]} does not exist: put the file there, correct "
                "--weights, or choose other rows with --rows"
            )


def iteration_of(run: Run, options: argparse.Namespace) -> int:
    """The last iteration that a training has noted; 0 of one that has not begun."""
    lines = read_metrics(run.folder(options) / "metrics.jsonl")
    return lines[-1]["iteration"] if lines else 0


def is_done(run: Run, options: argparse.Namespace) -> bool:
    """Whether a run is over, its last evaluation included.

    Raises:
        InputError: its folder holds a run with other settings, as the defaults have changed.
    """
    folder = run.folder(options)
    if run.settings is None:
        return (folder / "finished.json").is_file()
    curve = val_curve(read_metrics(folder / "metrics.jsonl"))
    over = bool(curve) and curve[-1][0] == run.settings.optim.iterations
    if not over or not (folder / "last.pt").is_file():
        return False
    former = json.loads((folder / "config.json").read_text())
    changed = config.differences(run.settings, former)
    if changed:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(changed[:3])}): give another "
            "folder of --runs"
        )
    return True
