"""The trainer with methods of two networks, a second optimizer, an averaged teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from small_training import CPU, assert_same_bits, losses, stopped_after, weights
from toy_methods import TOYS, Adversarial, CrossSupervision, MeanTeacher, tiny_network

from cac_fast.train import checkpoint, config, engine, run_state
from cac_fast.train.distributed import World
from cac_fast.train.log import read_metrics
from cac_fast.train.methods import Method
from cac_fast.train.methods.teacher import frozen

OPTIONS = (
    "--dataset folder --labeled-share full --batch-size 4 --crop-size 32 --iterations 6 --warmup 2 "
    "--workers 0 --eval-every 100 --log-every 1 --learning-rate 0.02 --deterministic --device cpu"
).split()
SMOOTH = ("--freeze-bn", "--no-dropout")
"""Nothing couples the images of a batch, or draws."""

toys = pytest.mark.parametrize("name", TOYS)


def use(name: str, patch: pytest.MonkeyPatch) -> None:
    """Let trainers have this method on the tiny network."""
    use_class(TOYS[name], patch)


def use_class(kind: type[Method], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run_state, "build_network", tiny_network)
    patch.setattr(run_state, "method_class", lambda _: kind)


def trainer(data: Path, output: Path, *more: str, world: World = CPU) -> engine.Trainer:
    where = ["--data-dir", str(data), "--output", str(output)]
    return engine.Trainer(config.parse([*OPTIONS, *where, *more]), world)


def run(data: Path, output: Path, *more: str, world: World = CPU) -> list[dict[str, Any]]:
    trainer(data, output, *more, world=world).run()
    return read_metrics(output / "metrics.jsonl")


def one_step(trained: engine.Trainer, unlabeled: bool) -> set[str]:
    """Do it; the names of the top modules and buffers that it changed."""
    before = {name: value.clone() for name, value in trained.method.state_dict().items()}
    trained.use_unlabeled(unlabeled)
    (step,) = trained.stream.steps(trained.iteration, trained.iteration + 1, unlabeled)
    trained.optimize(step)
    trained.iteration += 1
    after = trained.method.state_dict()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def names(method: Method, *parts: str) -> set[str]:
    """Of all that a step with new batch statistics changes in these parts of a method."""
    return {name for name in method.state_dict() if name.partition(".")[0] in parts}


def test_a_teacher_follows_and_is_scored(folder_data, tmp_path, monkeypatch):
    use("teacher", monkeypatch)
    trained = trainer(folder_data, tmp_path / "run")
    method = trained.method
    assert isinstance(method, MeanTeacher)
    teacher, student = method.teacher.copy, method.network
    assert trained.network is teacher
    everything = names(method, "network", "teacher")
    counts = {name for name in names(method, "teacher") if name.endswith("num_batches_tracked")}
    for iteration in range(3):
        before = [value.clone() for value in teacher.state_dict().values()]
        assert one_step(trained, unlabeled=iteration > 0) == everything - counts
        keep = min(1 - 1 / (iteration + 1), 0.8)
        states = before, teacher.state_dict().values(), student.state_dict().values()
        for old, new, target in zip(*states, strict=True):
            if new.is_floating_point():
                torch.testing.assert_close(new, keep * old + (1 - keep) * target)
    assert not teacher.training and student.training
    assert all(weight.grad is None for weight in teacher.parameters())
    held = {id(w) for group in trained.optimizer.param_groups for w in group["params"]}
    assert held == {id(weight) for weight in student.parameters()}
    trained.folder.prepare(new=True)
    trained._write_best()
    kept = checkpoint.read(trained.folder.best)["network"]
    assert_same_bits(kept, teacher.state_dict())


def test_two_networks_learn(folder_data, tmp_path, monkeypatch):
    use("two", monkeypatch)
    trained = trainer(folder_data, tmp_path / "run")
    method = trained.method
    assert isinstance(method, CrossSupervision)
    pairs = zip(method.network.parameters(), method.second.parameters(), strict=True)
    assert any(not torch.equal(one, two) for one, two in pairs)
    backbones, rest = (group["params"] for group in trained.optimizer.param_groups)
    weights = [w for network in method.segmenters() for w in network.backbone.parameters()]
    assert [id(weight) for weight in backbones] == [id(weight) for weight in weights]
    assert len(backbones) + len(rest) == len(list(method.parameters()))
    for unlabeled in (False, True):
        assert one_step(trained, unlabeled) == names(method, "network", "second")
    options = "--checkpoint-activations", "--restart"
    recomputing = trainer(folder_data, tmp_path / "run", *options).method
    for network in recomputing.segmenters():
        assert all("forward" in vars(block) for block in network.backbone.blocks())
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda features, **_: compiled.append(features))
    method.compile_features()
    assert compiled == [network.features for network in method.segmenters()]


def test_a_discriminator_has_an_optimizer_and_gradients_of_its_own(
    folder_data, tmp_path, monkeypatch
):
    use("adversarial", monkeypatch)
    trained = trainer(folder_data, tmp_path / "run")
    method = trained.method
    assert isinstance(method, Adversarial)
    segmenter, discriminator = names(method, "network"), names(method, "discriminator")
    assert one_step(trained, unlabeled=False) == segmenter
    assert one_step(trained, unlabeled=True) == segmenter | discriminator
    sgd, adam = trained.optimizers
    assert isinstance(adam, torch.optim.Adam)
    of_adam = [weight for group in adam.param_groups for weight in group["params"]]
    assert of_adam == list(method.discriminator.parameters())
    held = {id(weight) for group in sgd.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in method.network.parameters()}
    factor = (1 - 1 / 6) ** 0.9
    assert adam.param_groups[0]["lr"] == pytest.approx(1e-3 * factor)
    assert sgd.param_groups[1]["lr"] == pytest.approx(0.2 * factor)

    (step,) = trained.stream.steps(2, 3, True)
    weights, random = list(method.parameters()), torch.get_rng_state()
    expected = torch.autograd.grad(method(step.labeled, step.unlabeled)["loss"], weights)
    torch.set_rng_state(random)
    trained.optimize(step)
    assert all(map(torch.equal, expected, (weight.grad for weight in weights)))
    predicted = method.logits(step.unlabeled["image_plain"]).softmax(1)
    fooled, told = method.fooled(predicted), method.told(predicted, step.labeled["label"])
    for part, loss in ((method.network, fooled), (method.discriminator, told)):
        weights = list(part.parameters())
        alone = torch.autograd.grad(loss, weights, retain_graph=True)
        both = torch.autograd.grad(fooled + told, weights, retain_graph=True)
        assert all(map(torch.equal, alone, both))
        assert max(gradient.abs().max() for gradient in alone) > 0


@toys
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_interrupted_run_ends_with_the_same_bits(
    name, precision, folder_data, tmp_path, monkeypatch
):
    """And every scalar is in the lines of metrics, and the network that is scored in best.pt."""
    use(name, monkeypatch)
    options = "--precision", precision
    whole = run(folder_data, tmp_path / "whole", *options)
    with stopped_after(4):
        run(folder_data, tmp_path / "run", *options)
    lines = run(folder_data, tmp_path / "run", *options)
    for scalar in SCALARS[name]:
        assert losses(lines[2:], scalar) == losses(whole[2:], scalar)
        assert scalar not in lines[0] and losses(lines, "loss_dc") == [0] * 6
    assert lines[-1] == whole[-1] and lines[-1]["kind"] == "val"
    one, other = (checkpoint.read(tmp_path / at / "last.pt") for at in ("whole", "run"))
    assert_same_bits(one["method"], other["method"])
    assert_same_bits(one["network"], other["network"])
    part = "teacher.copy." if "teacher.copy.classifier.1.weight" in other["method"] else "network."
    scored = {n.removeprefix(part): x for n, x in other["method"].items() if n.startswith(part)}
    assert_same_bits(checkpoint.read(tmp_path / "run" / "best.pt")["network"], scored)
    assert one["scaler"] == other["scaler"] and (one["scaler"] != {}) == (precision == "fp16")
    states = ([kept["optimizer"], *kept["optimizers"]] for kept in (one, other))
    for here, there in zip(*states, strict=True):
        assert here["param_groups"] == there["param_groups"]
        for number, values in here["state"].items():
            assert_same_bits(values, there["state"][number])


SCALARS = {
    "teacher": ("loss_mse", "pixels", "certainty"),
    "two": ("loss_cps", "alike"),
    "adversarial": ("loss_fooled", "loss_told"),
}


@toys
def test_slices_and_recomputation_change_nothing(name, folder_data, tmp_path, monkeypatch):
    use(name, monkeypatch)
    run(folder_data, tmp_path / "whole", *SMOOTH)
    more = "--accumulate", "2", "--checkpoint-activations"
    run(folder_data, tmp_path / "sliced", *SMOOTH, *more)
    assert_same_course(name, tmp_path / "whole", tmp_path / "sliced")


def assert_same_course(name: str, one: Path, other: Path) -> None:
    """The same lines and weights, but for rounding."""
    here, there = (read_metrics(folder / "metrics.jsonl") for folder in (one, other))
    for scalar in ("loss", "loss_ce"):
        assert losses(here, scalar) == pytest.approx(losses(there, scalar), rel=1e-4)
    for scalar in SCALARS[name]:
        assert losses(here[2:], scalar) == pytest.approx(losses(there[2:], scalar), rel=1e-3)
    here, there = (checkpoint.read(folder / "last.pt")["method"] for folder in (one, other))
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


@toys
def test_autocast_starts_where_fp32_does(name, folder_data, tmp_path, monkeypatch):
    use(name, monkeypatch)
    first = []
    for precision in ("fp32", "bf16"):
        options = *SMOOTH, "--iterations", "1", "--warmup", "0", "--precision", precision
        first += losses(run(folder_data, tmp_path / precision, *options))
    assert first[1] == pytest.approx(first[0], rel=1e-2) and first[0] != first[1]


@toys
def test_a_step_that_overflows_changes_no_weight(name, folder_data, tmp_path, monkeypatch):
    use(name, monkeypatch)
    trained = trainer(folder_data, tmp_path / "run", "--precision", "fp16")
    one_step(trained, unlabeled=False)  # the discriminator has no gradient
    trained.scaler.load_state_dict(trained.scaler.state_dict() | {"scale": 2.0**120})
    before = {name: weight.clone() for name, weight in trained.method.named_parameters()}
    changed = one_step(trained, unlabeled=True)
    assert trained.scaler.get_scale() == 2.0**119
    assert {item for item in changed & before.keys() if not item.startswith("teacher")} == set()
    averages = hasattr(trained.method, "teacher")  # it follows whatever the student did
    assert averages == any(item.startswith("teacher") for item in changed)


def as_rank(world: World, kind: type[Method], options: list[str], data: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use_class(kind, patch)
        patch.setitem(globals(), "OPTIONS", options)
        run(data, folder / "two", "--no-dropout", world=world)


@toys
def test_two_processes_give_the_course_of_one(name, folder_data, tmp_path, monkeypatch):
    use(name, monkeypatch)
    run(folder_data, tmp_path / "one", "--no-dropout")
    two_ranks.run(as_rank, TOYS[name], OPTIONS, folder_data, tmp_path)
    assert_same_course(name, tmp_path / "one", tmp_path / "two")


def as_rank_without_sync(world: World, data: Path, folder: Path) -> None:
    options = "--method", "mean_teacher", "--no-sync-bn", "--unsupervised-weight", "5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state, "build_network", tiny_network)
        run(data, folder / "whole", *options, world=world)
        run(data, folder / "evaluated", *options, "--eval-every", "3", world=world)
        with stopped_after(4):
            run(data, folder / "stopped", *options, world=world)
        run(data, folder / "stopped", *options, world=world)


def test_statistics_of_each_rank_reach_no_teacher(folder_data, tmp_path):
    """A checkpoint and an evaluation have rank 0's alone."""
    two_ranks.run(as_rank_without_sync, folder_data, tmp_path)
    whole = weights(tmp_path / "whole" / "last.pt")
    assert any(name.startswith("teacher") and "running" in name for name in whole)
    for other in ("evaluated", "stopped"):
        assert_same_bits(whole, weights(tmp_path / other / "last.pt"))


def test_frozen_module_passes_gradients_on():
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    found = []
    for function in (module, frozen(module)):
        inputs = torch.ones(2, 2, 3, 3).cumsum(3).requires_grad_()
        (function(inputs) ** 3).sum().backward()
        found.append(inputs.grad)
        if len(found) == 1:
            module.zero_grad(set_to_none=True)
    assert torch.equal(*found) and found[0].abs().max() > 0
    assert all(weight.grad is None for weight in module.parameters())
    assert all(weight.requires_grad for weight in module.parameters())
