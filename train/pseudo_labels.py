"""Where a run's pseudo labels come from, and whether they are those that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cac_fast.train.config import Config
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.opening import Inputs
from cac_fast.train.data.pseudo import PseudoLabels, read_pseudo_labels
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.labeling import label_once
from cac_fast.train.methods import Method
from cac_fast.train.progress import show_progress
from cac_fast.train.registry import METHODS
from cac_fast.train.run_folder import RunFolder

KEY = "pseudo labels"
"""Of their digest in a checkpoint."""

SOURCES = ("pseudo_labels", "teacher")


def check_sources(kind: type[Method], config: Config) -> None:
    """Raise InputError for a source of labels that the method does not take, two, or none where it
    needs one."""
    given = [name for name in SOURCES if getattr(config.data, name) is not None]
    for name in given:
        if name not in kind.label_sources:
            methods = {each: METHODS.load(each) for each in METHODS.names}
            takers = [each for each, it in methods.items() if name in it.label_sources]
            raise InputError(
                f"{_flag(name)}: --method {config.loss.method} takes none: leave it out, or use "
                f"--method {' or '.join(takers)}"
            )
    if len(given) > 1:
        raise InputError(f"{' and '.join(map(_flag, given))} are both given: give one of them")
    if kind.needs_labels and not given:
        raise InputError(
            f"--method {config.loss.method} needs labels of the unlabeled images: give "
            f"{' or '.join(map(_flag, kind.label_sources))}"
        )


def open_labels(
    config: Config,
    inputs: Inputs,
    world: World,
    folder: RunFolder,
    former: dict[str, Any] | None,
) -> PseudoLabels | None:
    """The labels of the unlabeled images, made first where a teacher is given; None for a run
    without. All ranks call it together.

    former: the state that the run goes on from.

    Raises:
        InputError: they cannot be used, or are not those of the former state.
    """
    source, labels = config.data.pseudo_labels, None
    if config.data.teacher is not None:
        source = folder.path / "pseudo"
        world.on_main(folder.make)
        label_once(
            Path(config.data.teacher),
            source,
            inputs.unlabeled,
            inputs.data,
            world,
            config.loss.confidence,
            anew=config.run.restart and former is None,
            bound=former is not None,
        )
    if source is not None:
        cache = None if config.data.cache is None else Path(config.data.cache)
        reader = PixelReader(inputs.data, cache)
        show = show_progress("checking pseudo labels")
        labels = world.on_main(
            lambda: read_pseudo_labels(Path(source), inputs.unlabeled, reader, show)
        )
    if former is not None and former["inputs"].get(KEY, "") != digest(labels):
        raise InputError(
            f"{folder.path} holds a run with other pseudo labels: use another --output, or "
            "--restart to start over"
        )
    return labels


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def digest(labels: PseudoLabels | None) -> str:
    """What tells labels from others; empty for none."""
    return "" if labels is None else labels.digest
