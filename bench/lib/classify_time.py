"""Seconds of a step of `train/classify.py`, and how many steps it makes, of a command's settings.

    python bench/lib/classify_time.py FILE.json ARGUMENTS OF train/classify.py

Nothing of it is kept but the FILE: {"step": seconds, "steps": number}. No mask is made.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cac_fast.train import classify, distributed
from cac_fast.train.log import read_metrics
from cac_fast.train.weak.training import ClassifierRun

STEPS, WARM_UP = 10, 2


def main() -> None:
    """Measure ten steps after two, data included, and write the file.

    Raises:
        InputError: as a classification with these settings would.
    """
    file, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        config, data, labels = classify.open_all(classify.parse([*arguments, "--output", folder]))
        steps = config.optim.iterations
        total = WARM_UP + STEPS
        every = {"iterations": total, "eval_every": total, "save_every": total}
        config = config.changed(**every, log_every=WARM_UP)
        # Evaluations are left out.
        data = replace(data, splits={**data.splits, "val": ()})
        with distributed.world(config.run.device) as world:
            ClassifierRun(config, world, data, labels).train()
        _, *lines = read_metrics(Path(folder) / "metrics.jsonl")
    step = statistics.mean(config.optim.batch_size / line["images_per_s"] for line in lines)
    Path(file).write_text(json.dumps({"step": step, "steps": steps}) + "\n")


if __name__ == "__main__":
    sys.exit(distributed.run_command(main))
