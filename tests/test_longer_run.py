"""A run made longer than it was, and what `--weights` and `--checkpoint` take of a run."""

from __future__ import annotations

import pytest
import torch
from small_training import CPU, arguments, losses, run
from tiny_scenes import write_scenes

from cac_fast.train import checkpoint, config, engine, load
from cac_fast.train.errors import InputError
from cac_fast.train.networks import build_network, load_backbone_weights


def test_a_finished_run_goes_on(folder_data, tmp_path, capsys):
    run(folder_data, tmp_path / "run")
    capsys.readouterr()
    lines = run(folder_data, tmp_path / "run", "--iterations", "14")
    said = capsys.readouterr().out
    assert "--iterations grew from 10 to 14: the learning rate follows the longer schedule" in said
    assert "and so do ramps of the loss" in said
    assert [line["iteration"] for line in lines if line["kind"] == "train"] == list(range(1, 15))
    rates = losses(lines, "lr")
    # As a log line tells the rate of the step before it.
    assert rates[10] == pytest.approx(0.001 * (1 - 10 / 14) ** 0.9)
    assert checkpoint.read(tmp_path / "run" / "last.pt")["iteration"] == 14
    run(folder_data, tmp_path / "run", "--iterations", "14")
    assert "finished already" in capsys.readouterr().out


def test_warm_up_does_not_come_back(folder_data, tmp_path):
    """By default it is 1/16 of all iterations: 2 of 32, but 40 of 640."""
    default = arguments(folder_data, tmp_path / "run")
    place = default.index("--warmup")
    del default[place : place + 2]
    trainer = engine.Trainer(config.parse([*default, "--iterations", "32"]), CPU)
    trainer.folder.prepare(new=True)
    trainer._save()
    for _ in range(2):
        trainer = engine.Trainer(config.parse([*default, "--iterations", "640"]), CPU)
        assert trainer.num_warmup == 2
        trainer._save()


def test_a_run_is_not_made_shorter(folder_data, tmp_path):
    run(folder_data, tmp_path / "run")
    with pytest.raises(InputError, match=r"iterations: 10 there, 8 here"):
        run(folder_data, tmp_path / "run", "--iterations", "8")


def test_begins_from_a_run_with_other_classes(folder_data, tmp_path, capsys):
    run(folder_data, tmp_path / "first", "--iterations", "2")
    capsys.readouterr()
    other = write_scenes(tmp_path / "other", {"train": (4, 2), "val": (2, 0)})
    (other / "classes.txt").write_text((other / "classes.txt").read_text() + "3 more 1 2 3\n")
    for weights in (tmp_path / "first", tmp_path / "first" / "best.pt"):
        options = "--iterations", "2", "--weights", str(weights), "--restart"
        run(other, tmp_path / "second", *options)
        said = capsys.readouterr().out
        assert (
            "tensors into the network, skipped 2 (classifier.1.weight, classifier.1.bias)" in said
        )


def test_every_tensor_that_fits_is_of_the_run(folder_data, tmp_path):
    run(folder_data, tmp_path / "first", "--iterations", "2")
    network = build_network("deeplabv3plus", "mobilenet_v2", 7)
    report = load_backbone_weights(network, tmp_path / "first")
    trained = checkpoint.read(tmp_path / "first" / "best.pt")["network"]
    for name, tensor in network.state_dict().items():
        if not name.startswith("classifier.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, trained[name]), name
    assert report.target == "network" and len(report.missing) == 2


def test_another_backbone_is_refused(folder_data, tmp_path):
    run(folder_data, tmp_path / "first", "--iterations", "2")
    with pytest.raises(InputError, match=r"another architecture"):
        load_backbone_weights(build_network("deeplabv3plus", "resnet18", 3), tmp_path / "first")


def test_a_run_folder_is_loaded_from_its_best_state(folder_data, tmp_path):
    run(folder_data, tmp_path / "run", "--iterations", "2")
    best = load(tmp_path / "run" / "best.pt").state_dict()
    found = load(tmp_path / "run").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in best.items())
    (tmp_path / "run" / "best.pt").unlink()
    load(tmp_path / "run")
    (tmp_path / "run" / "last.pt").unlink()
    with pytest.raises(InputError, match=r"best.pt does not exist"):
        load(tmp_path / "run")


def test_weights_of_another_run_are_another_setting(folder_data, tmp_path):
    def parse(weights: str) -> config.Config:
        return config.parse(arguments(folder_data, tmp_path, "--weights", weights))

    def differ(one: str, other: str) -> bool:
        return bool(config.differences(parse(one), parse(other).flat()))

    assert differ("runs/a/best.pt", "runs/b/best.pt")
    assert not differ("runs/a/best.pt", "/elsewhere/runs/a/best.pt")
    assert not differ("resnet50.pth", "elsewhere/resnet50.pth")
