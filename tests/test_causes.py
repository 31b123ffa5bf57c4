"""The probe of a comparison's runs: every number it gives, from runs of both methods."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_folders import one_line
from tiny_scenes import write_scenes

from accuracy import causes
from cac_fast.train import adapt, checkpoint, config, engine
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError

OPTIONS = (
    "--backbone mobilenet_v2 --batch-size 2 --crop-size 32 --iterations 1 --warmup 0 --workers 0 "
    "--device cpu --labeled-share 1/2 --threshold 0"
)


def test_causes(tmp_path, capsys):
    data = write_scenes(tmp_path / "data", {"train": (4, 0), "val": (1, 0), "test": (1, 0)})
    for method in ("supervised", "cac"):
        run = f"--dataset folder --data-dir {data} --output {tmp_path}/runs/{method} {OPTIONS}"
        settings = config.parse([*run.split(), "--method", method])
        trained = engine.train(settings, World(0, 1, torch.device("cpu")))
    file = tmp_path / "causes.json"
    copy = tmp_path / "runs/cac_adapted/last.pt"  # is not scored
    copy.parent.mkdir()
    source = tmp_path / "runs/cac/last.pt"
    words = ["--checkpoint", str(source), "--images", str(data / "images/val"), "--device", "cpu"]
    assert adapt.main([*words, "--output", str(copy)]) == 0
    causes.main(["--runs", str(tmp_path / "runs"), "--json", str(file)])
    cac, supervised = json.loads(file.read_text())["runs"]
    assert cac["run"] == "cac" and supervised.keys() == {
        "run",
        "val",
        "val anew",
        "test",
        "test anew",
        "classes known",
    }
    assert cac["val"] == pytest.approx(100 * trained["last"]["miou"])
    assert cac["val anew"] != cac["val"]
    assert cac["classes known"] == sum(
        iou > causes.KNOWN_FROM_IOU for iou in trained["last"]["iou"] if iou
    )
    # The threshold is 0: of a pair one end or the other learns, but for ties.
    assert cac["pairs"] > 0 and 0.9 < cac["active"] <= 1
    assert all(0 <= cac[name] <= 1 for name in ("anchor", "positive", "agree"))
    # An end knows the truth where the other does, or they do not agree.
    assert abs(cac["anchor"] - cac["positive"]) <= 1 - cac["agree"]
    assert "cac: " in capsys.readouterr().out
    names = tmp_path / "some.txt"
    names.write_text(f"{next((data / 'images/test').iterdir()).stem}\n")
    some = causes.causes(tmp_path / "runs/supervised", None, names)
    assert some.keys() == {"run", "some", "some anew", "classes known"}
    assert (some["some"], some["some anew"]) == (supervised["test"], supervised["test anew"])


def test_taught_is_of_the_steps_as_trained(tmp_path):
    data = write_scenes(tmp_path / "data", {"train": (4, 0), "val": (1, 0)})
    run = f"--dataset folder --data-dir {data} --output {tmp_path}/run {OPTIONS}"
    trainer = engine.Trainer(config.parse(run.split()), World(0, 1, torch.device("cpu")))
    trainer.method.requires_grad_()

    def taught() -> dict[str, float]:
        torch.manual_seed(0)
        return causes.taught(trainer.method, trainer.stream, known=False)

    once = taught()
    trainer.method.full_weight *= 3
    assert taught()["strength"] == pytest.approx(3 * once["strength"], rel=1e-3)
    trainer.method.eval()
    torch.manual_seed(0)
    step = next(iter(trainer.stream.steps(0, 1, with_unlabeled=True)))
    losses = trainer.method.train()(step.labeled, step.unlabeled)
    assert once["pairs"] >= losses["pairs"] > 0


def test_a_run_names_a_layout_of_the_working_folder_alone(working_folder: Path) -> None:
    state = {"config": {"dataset": "json:loads", "data_dir": "."}}
    checkpoint.write(working_folder / "last.pt", state)
    with pytest.raises(InputError) as error:
        causes.causes(working_folder, None)
    one_line(error, "--dataset json:loads", "working folder alone", "json.py")
