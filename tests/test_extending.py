"""The page on adding one's own code: its files and commands do what it says."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import ROOT, SMALL, assert_same_bits, weights
from tiny_scenes import scene

from cac_fast import verify
from cac_fast.backend import BACKENDS, Entry
from cac_fast.train import config, engine, evaluate, predict
from cac_fast.train import main as training
from cac_fast.train.log import read_metrics

PAGE = (ROOT / "docs/extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = {
    name: shlex.split(words.replace("\\\n", " "))
    for name, words in re.findall(
        r"^    python train/(\w+)\.py ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE
    )
}


@pytest.fixture
def folder(working_folder: Path) -> Path:
    """Where the commands are started: the page's files, and photos with their masks beside them."""
    for name, text in FILES.items():
        (working_folder / name).write_text(text)
    rng = np.random.default_rng(3)
    for split, images, masks in (("train", 6, 4), ("val", 2, 2)):
        (working_folder / "photos" / split).mkdir(parents=True)
        for index in range(images):
            image, mask = scene(rng, 48, 56)
            Image.fromarray(image).save(working_folder / f"photos/{split}/{index}.jpg")
            if index < masks:
                Image.fromarray(mask).save(working_folder / f"photos/{split}/{index}.png")
    return working_folder


def train(output: str, *more: str) -> list[str]:
    """The page's command, for seconds."""
    small = [word for word in SMALL if word not in ("--backbone", "mobilenet_v2")]
    return [*COMMANDS["main"], *small, "--deterministic", "--output", output, *more]


def test_page_has_one_of_each() -> None:
    assert list(FILES) == ["beside.py", "tiny.py", "addition.py", "mean_teacher.py", "dense.py"]
    assert list(COMMANDS) == ["main", "evaluate", "predict"]


def test_commands(folder: Path, monkeypatch, capsys) -> None:
    assert training.main(train("runs/whole")) == 0
    step = engine.Trainer._train_step

    def interrupted(self, *batch):
        step(self, *batch)
        if self.iteration == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine.Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.main(train("runs/own", "--save-every", "4"))
    monkeypatch.setattr(engine.Trainer, "_train_step", step)
    assert training.main(train("runs/own", "--save-every", "4")) == 0
    assert "resuming runs/own at iteration 4" in capsys.readouterr().out
    assert_same_bits(weights(folder / "runs/own/last.pt"), weights(folder / "runs/whole/last.pt"))
    lines = read_metrics(folder / "runs/own/metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["consistency"] > 0 for line in steps] == [False] * 2 + [True] * 8
    assert evaluate.main(COMMANDS["evaluate"]) == 0
    assert predict.main(COMMANDS["predict"]) == 0
    assert {path.name for path in (folder / "predictions").glob("?.png")} == {"0.png", "1.png"}

    del sys.modules["addition"]
    (folder / "addition.py").unlink()
    capsys.readouterr()
    assert predict.main(COMMANDS["predict"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(
        "error: checkpoint runs/own/best.pt was made with --network addition:addition: a name "
        "in a file stands for code of the working folder alone, and addition.py is not there"
    )


def test_a_run_is_named_after_what_it_uses() -> None:
    *words, flag, _ = COMMANDS["main"]
    assert flag == "--output"
    name = config.parse(words).run_folder.name
    assert name.startswith("beside_beside-mean_teacher_MeanTeacher-addition_addition-tiny_Tiny-")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_end(folder: Path, monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(BACKENDS, "dense", Entry("dense", "one matrix product", "dense:BACKEND"))
    found = verify("cpu", dtype, "dense")
    assert found.backend == "dense"
    assert found.gradient_error <= 1.5 * found.plain_gradient_error + 1e-5
