"""A step of every method: two processes with half of the batch each, against one with all of it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_cct
import test_cps
import test_fixmatch
import test_judged
import test_mean_teacher
import test_s4gan
import test_self_training
import torch
import two_ranks
from small_training import CPU
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_methods import tiny_network

from cac_fast.train import config
from cac_fast.train.distributed import World
from cac_fast.train.methods import Method, cct, method_class, s4gan
from cac_fast.train.networks import synchronize_batch_norm

CASES: dict[str, ModuleType] = {
    "cct": test_cct,
    "cps": test_cps,
    "cps --cutmix": test_cps,
    "ecs": test_judged,
    "fixmatch --confidence 0.3": test_fixmatch,
    "fixmatch --confidence 0.3 --strong-views 2 --forward separate": test_fixmatch,
    "gct": test_judged,
    "mean_teacher": test_mean_teacher,
    "mean_teacher --strong-views 1 --forward joint": test_mean_teacher,
    "s4gan --confidence 0.4": test_s4gan,
    "self_training --pseudo-labels x --normalize-pseudo-loss": test_self_training,
}
"""The method and its options, and the tests that have batches of four images for it."""

SHARES = "flawed", "kept", "confident", "agreement"
"""Kept in float32."""


def still(name: str, world: World, patch: pytest.MonkeyPatch) -> Method:
    """In float64 and without draws, but with statistics of batches."""
    patch.setattr(s4gan, "DROPOUT", 0.0)
    patch.setattr(cct, "PERTURBATIONS", test_cct.STILL)
    settings = config.parse(
        ["--dataset", "toycity", "--crop-size", "32", "--method", *name.split()]
    )
    torch.manual_seed(0)
    networks = lambda: tiny_network("", "", 3, dropout=False)  # noqa: E731
    model = method_class(settings)(networks, world, settings, torch.float64).double()
    model.iteration = settings.optim.iterations
    with torch.no_grad():
        if hasattr(model, "judge"):
            model.judge.layers[-1].bias += 0.3
        if hasattr(model, "teacher"):
            for weight in model.teacher.parameters():
                weight += 0.3 * torch.randn_like(weight)
    return model


def step_of(name: str, model: Method, wrapped: nn.Module, rank: int | None) -> dict[str, Any]:
    labeled, unlabeled = CASES[name].batches()
    if rank is not None:
        labeled, unlabeled = part(labeled, rank), part(unlabeled, rank)
    losses = wrapped(labeled, unlabeled)
    losses["loss"].backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    statistics = {name: value for name, value in model.named_buffers() if "running" in name}
    scalars = {name: value.detach() for name, value in losses.items()}
    return {"losses": scalars, "gradients": gradients, "statistics": statistics}


def part(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}


def as_rank(world: World, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for number, name in enumerate(CASES):
            model = still(name, world, patch)
            synchronize_batch_norm(model, None)
            found = step_of(name, model, DistributedDataParallel(model), world.rank)
            torch.save(found, folder / f"{number}-{world.rank}")


def test_two_processes_take_the_step_of_one(tmp_path, monkeypatch):
    """In float64; padding and missing labels are not shared equally."""
    two_ranks.run(as_rank, tmp_path)
    for number, name in enumerate(CASES):
        model = still(name, CPU, monkeypatch)
        one = step_of(name, model, model, None)
        first, second = (torch.load(tmp_path / f"{number}-{rank}") for rank in (0, 1))
        assert first["losses"] != second["losses"]
        for key, value in one["losses"].items():
            mean = (first["losses"][key] + second["losses"][key]) / 2
            rel = 1e-6 if key in SHARES else 1e-10
            assert mean.item() == pytest.approx(value.item(), rel=rel), (name, key)
            assert value > 0, (name, key)
        for found in (first, second):
            for of in ("gradients", "statistics"):
                assert_close(found[of], one[of], f"{name}: {of}")


def assert_close(found: dict[str, Tensor | None], one: dict[str, Tensor | None], of: str) -> None:
    there = {key for key, value in one.items() if value is not None}
    assert there == {key for key, value in found.items() if value is not None}, of
    for key in there:
        torch.testing.assert_close(
            found[key],
            one[key],
            rtol=1e-8,
            atol=1e-12,
            msg=lambda text, key=key: f"{of} {key}: {text}",
        )
