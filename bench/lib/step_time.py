"""Seconds of a training step, without and with the unlabeled images, of a command's settings.

    python bench/lib/step_time.py FILE.json ARGUMENTS OF train/main.py

Nothing of it is kept but the FILE: {"labeled": seconds, "both": seconds, or None where the method
has no views of them}. The steps are those at the end of a run, when every loss takes part. A method
that needs labels of the unlabeled images gets made-up ones unless the arguments name some; any
method gets them with `--pseudo-labels made-up`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cac_fast.train import config, distributed
from cac_fast.train.engine import Trainer
from lib.made_up import with_labels

STEPS, WARM_UP = 10, 2


def step_seconds(trainer: Trainer, both: bool) -> float:
    """Mean of ten steps after two, data included."""
    trainer.use_unlabeled(both)
    device = trainer.world.device
    begin = 0.0
    for number, step in enumerate(trainer.stream.steps(0, WARM_UP + STEPS, both)):
        trainer.optimize(step)
        if number == WARM_UP - 1:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / STEPS


def main() -> None:
    """Measure and write the file.

    Raises:
        InputError: as a training with these settings would.
    """
    file, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        words = with_labels(arguments, Path(folder) / "made-up")
        settings = config.parse([*words, "--output", folder])
        with distributed.world(settings.run.device) as world:
            trainer = Trainer(settings, world)
            trainer.iteration = trainer.iterations - 1
            found = {"labeled": step_seconds(trainer, both=False), "both": None}
            if trainer.method.views:
                found["both"] = step_seconds(trainer, both=True)
    Path(file).write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.exit(distributed.run_command(main))
