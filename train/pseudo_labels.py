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
from cac_fast.train.methods import Method
from cac_fast.train.progress import show_progress
from cac_fast.train.registry import METHODS
from cac_fast.train.run_folder import RunFolder

KEY = "pseudo labels"
"""Of their digest in a checkpoint."""


def check_sources(kind: type[Method], config: Config) -> None:
    """Raise InputError for a source of labels that the method does not take, or lacks."""
    sources = ("pseudo_labels",)
    given = [name for name in sources if getattr(config.data, name) is not None]
    for name in given:
        if name not in kind.label_sources:
            methods = {each: METHODS.load(each) for each in METHODS.names}
            takers = [each for each, it in methods.items() if name in it.label_sources]
            raise InputError(
                f"--{name.replace('_', '-')}: --method {config.loss.method} takes no labels of "
                f"unlabeled images: leave it out, or use --method {' or '.join(takers)}"
            )


def open_labels(
    config: Config,
    inputs: Inputs,
    world: World,
    folder: RunFolder,
    former: dict[str, Any] | None,
) -> PseudoLabels | None:
    """The labels of the unlabeled images, None for a run without. All ranks call it together.

    former: the state that the run goes on from.

    Raises:
        InputError: they cannot be used, or are not those of the former state.
    """
    source = config.data.pseudo_labels
    labels = None
    if source is not None:
        cache = None if config.data.cache is None else Path(config.data.cache)
        given = Path(source), inputs.unlabeled, PixelReader(inputs.data, cache)
        show = show_progress("checking pseudo labels")
        labels = world.on_main(lambda: read_pseudo_labels(*given, show))
    if former is not None and former["inputs"].get(KEY, "") != digest(labels):
        raise InputError(
            f"{folder.path} holds a run with other pseudo labels: use another --output, or "
            "--restart to start over"
        )
    return labels


def digest(labels: PseudoLabels | None) -> str:
    """What tells labels from others; empty for none."""
    return "" if labels is None else labels.digest
