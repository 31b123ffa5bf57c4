"""What the classification for Table 5's pseudo masks is asked to do."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from cac_fast.train import classify
from cac_fast.train.errors import InputError

SEEN = (
    "labeled",
    "unlabeled",
    "labeled_share",
    "data_list",
    "workers",
    "backbone",
    "weights",
    "device",
)
"""Settings that a classification has of the training that learns its masks."""
GIVEN = frozenset(("dataset", "data_dir", "image_labels", "output", "restart", *SEEN))
"""Options of `train/classify.py` that `--classify` cannot hold."""


def words_of(text: str, data: Sequence[str]) -> list[str]:
    """The options in `--classify`, checked; data: those that name the data.

    Raises:
        InputError: `text` cannot be split, or `train/classify.py` would refuse an option, or has
            it of the table.
    """
    try:
        words = shlex.split(text)
        for word in words:
            option = word.partition("=")[0]
            if option.removeprefix("--").removeprefix("no-").replace("-", "_") in GIVEN:
                raise InputError(f"{option} is of the table and its rows, leave it out")
        settings_of([*data, *words])
    except (ValueError, InputError) as error:
        raise InputError(f"--classify '{text}': {error}") from None
    return words


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """The settings of a classification with the options `words`, those of its maps among them, by
    their flat names; `epochs` is None where `iterations` counts, and the other way round.

    Raises:
        InputError: an option that it has not, or a value that cannot be used.
    """
    options = classify.parse([*words, "--output", "."])
    config, iterations = classify.settings_of(options)
    classify.limits_of(options)
    epochs = classify.EPOCHS if options.epochs is None else options.epochs
    maps = {name: value for name, value in vars(options).items() if name.startswith("cam_")}
    length = {"iterations": iterations, "epochs": epochs if iterations is None else None}
    return {**config.flat(), **maps, **length}


def described(settings: dict[str, Any]) -> str:
    """How long a classification is and what it sees, for the plan and the table."""
    count = settings["epochs"] or settings["iterations"]
    unit = "epochs" if settings["epochs"] else "iterations"
    base = settings["base_size"]
    parts = [
        f"{count} {unit[:-1] if count == 1 else unit}",
        f"batches of {settings['batch_size']}",
        f"crops of {settings['crop_size']}",
        *([] if base is None else [f"base size {base}"]),
        f"learning rate {settings['learning_rate']:g}",
    ]
    return f"masks of a classification: {', '.join(parts)}"
