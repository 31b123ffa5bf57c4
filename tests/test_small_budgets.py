"""CAC's settings for small budgets: labels of an averaged copy, a ramp of lambda, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_folders import one_line
from small_training import assert_same_bits, losses
from test_methods import SMOOTH, one_step, run, trainer, use_class
from torch import nn

from cac_fast.train import checkpoint
from cac_fast.train.errors import InputError
from cac_fast.train.methods.cac import CAC

AVERAGED = "--averaged-labels"
BOTH = [(), ("--forward", "joint")]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    use_class(CAC, monkeypatch)


@pytest.mark.parametrize("forward", BOTH, ids=" ".join)
def test_a_copy_that_is_the_network_changes_nothing(forward, folder_data: Path, tmp_path: Path):
    """Where neither dropout nor batch statistics tell training from evaluation."""
    given = *SMOOTH, "--threshold", "0.1", *forward
    plain = run(folder_data, tmp_path / "plain", *given)
    same = run(folder_data, tmp_path / "same", *given, AVERAGED, "--ema-decay", "0")
    other = run(folder_data, tmp_path / "other", *given, AVERAGED, "--ema-decay", "0.9")
    assert losses(same, "loss_dc") == pytest.approx(losses(plain, "loss_dc"), rel=1e-6)
    assert losses(same, "active") == losses(plain, "active") and max(losses(same, "active")) > 0
    assert losses(other, "loss_dc") != losses(plain, "loss_dc")


@pytest.mark.parametrize("forward", BOTH, ids=" ".join)
def test_the_loss_gets_the_copys_logits(
    forward, folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = AVERAGED, "--warmup", "0", "--accumulate", "2", *forward
    trained = trainer(folder_data, tmp_path / "run", *given)
    method = trained.method
    met = []
    start = method.dc_loss.start

    def watched(*arguments: Any) -> Any:
        met.extend(arguments[2:4])
        return start(*arguments)

    monkeypatch.setattr(method.dc_loss, "start", watched)
    for steps in (1, 2):
        trained.use_unlabeled(True)
        (step,) = trained.stream.steps(trained.iteration, trained.iteration + 1, True)
        copy = method.teacher.copy
        assert not copy.training
        with torch.no_grad():
            images = (step.unlabeled[name] for name in ("image_1", "image_2"))
            wanted = [method.averaged_logits(of_view) for of_view in images]
            whole = copy.features(step.unlabeled["image_2"])
            assert method.at_stride_8(whole).shape[-2:] == wanted[1].shape[-2:]
        trained.optimize(step)
        trained.iteration += 1
        assert len(met) == 2 * steps
        torch.testing.assert_close(met[-2:], wanted)
    assert all(weight.grad is None for weight in copy.parameters())
    assert trained.network is method.network is not copy


def test_interrupted_run_ends_with_the_same_bits(folder_data: Path, tmp_path: Path):
    given = AVERAGED, "--ema-decay", "0.5", "--dc-ramp", "2", "--save-every", "1"
    whole = run(folder_data, tmp_path / "whole", *given)
    trained = trainer(folder_data, tmp_path / "run", *given)
    trained.stop.received = 15
    with pytest.raises(SystemExit):
        trained.run()
    lines = run(folder_data, tmp_path / "run", *given)
    assert losses(lines, "loss") == losses(whole, "loss")
    one, other = (checkpoint.read(tmp_path / at / "last.pt") for at in ("whole", "run"))
    assert_same_bits(one["method"], other["method"])
    assert any(name.startswith("teacher.") for name in one["method"])


def test_dropout_of_labeled_images_alone(folder_data: Path, tmp_path: Path):
    trained = trainer(folder_data, tmp_path / "run", "--warmup", "0", "--no-unlabeled-dropout")
    drops = [layer for layer in trained.network.modules() if isinstance(layer, nn.Dropout)]
    seen = {layer: [] for layer in drops}
    for layer in drops:
        layer.register_forward_hook(lambda layer, *_: seen[layer].append(layer.training))
    one_step(trained, unlabeled=True)
    assert list(seen.values()) == [[False, False, True]] * 2  # both crops, then the labeled images
    assert all(layer.training for layer in drops)
    with pytest.raises(InputError) as error:
        trainer(folder_data, tmp_path / "run", "--no-unlabeled-dropout", "--forward", "joint")
    one_line(error, "--no-unlabeled-dropout", "--forward separate")


def test_a_ramp_of_lambda(folder_data: Path, tmp_path: Path):
    given = "--dc-ramp", "3", "--dc-weight", "0.2", "--warmup", "1"
    method = trainer(folder_data, tmp_path / "run", *given).method
    seen = []
    for method.iteration in range(1, 6):
        seen.append(method.weight)
    assert seen == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])
    lines = run(folder_data, tmp_path / "run", *given)
    for line, weight in zip(lines[1:6], seen, strict=True):
        assert line["loss"] == pytest.approx(line["loss_ce"] + weight * line["loss_dc"])
    method.iteration = 0  # in the warm-up, where a probe may ask
    assert method.weight == 0
    assert "teacher" not in dict(method.named_children())
    given = "--dc-weight", "0.2", "--warmup", "3"
    assert trainer(folder_data, tmp_path / "no ramp", *given).method.weight == 0.2
