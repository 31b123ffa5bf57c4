"""Batch norm over two processes against PyTorch's own over the whole batch."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import two_ranks
from torch import Tensor, nn

from cac_fast.train.distributed import World
from cac_fast.train.networks import synchronize_batch_norm
from cac_fast.train.networks.recompute import recompute

CHANNELS = 5
KINDS = ["contiguous", "channels last", "compiled in one graph"]


def network() -> nn.Module:
    """Two norms, one of them inside; parameters that are not the first ones."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS))
    result = nn.Sequential(nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3), inner).double()
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return result


def batch() -> Tensor:
    """The two halves differ in mean and spread."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(4, CHANNELS, 6, 7, dtype=torch.float64, generator=rng)
    x[2:] = 3 * x[2:] + 2
    return x


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, its gradient by the input, then those of the parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y**3).sum().backward()
    return [y, x.grad, *(parameter.grad for parameter in model.parameters())]


def as_rank(world: World, folder: Path) -> None:
    rank, found = world.rank, {}
    for kind in KINDS:
        model = network()
        synchronize_batch_norm(model, dist.new_group())
        half = batch()[2 * rank :][:2]
        if kind == "channels last":
            half = half.contiguous(memory_format=torch.channels_last)
        whole = kind == "compiled in one graph"
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if whole else model
        results = step(call, half)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        found[kind] = results[:2], results[2:], model.state_dict()
    model = network().float()
    synchronize_batch_norm(model, None)
    with torch.autocast("cpu", torch.bfloat16):
        found["bfloat16"] = step(model[1], batch()[2 * rank :][:2].float())[:2]
    models = [network(), network()]
    for model, again in zip(models, (False, True), strict=True):
        synchronize_batch_norm(model, None)
        run = partial(recompute, model, model) if again else model
        y = run(batch()[2 * rank :][:2].requires_grad_())
        (y**3).sum().backward()
    tensors = [[*(p.grad for p in model.parameters()), *model.buffers()] for model in models]
    found["recomputed"] = all(map(torch.equal, *tensors))
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found of its half of the batch."""
    folder = tmp_path_factory.mktemp("ranks")
    two_ranks.run(as_rank, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_equal_the_whole(ranks: list[dict], kind: str) -> None:
    model = network()
    y, x_gradient, *gradients = step(model, batch())
    halves = [rank[kind] for rank in ranks]
    for whole, parts in ((y, [h[0][0] for h in halves]), (x_gradient, [h[0][1] for h in halves])):
        torch.testing.assert_close(torch.cat(parts), whole)
    for _, found, state in halves:
        for mine, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, msg=name)


def test_under_autocast(ranks: list[dict]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(network().float()[1], batch().float())[:2]
    for place, whole in enumerate(expected):
        found = torch.cat([rank["bfloat16"][place] for rank in ranks])
        assert found.dtype == whole.dtype
        assert (found - whole).norm() < 0.02 * whole.norm()


def test_recomputation_changes_nothing(ranks: list[dict]) -> None:
    assert all(rank["recomputed"] for rank in ranks)


def test_evaluation_uses_the_running_statistics() -> None:
    model = network()
    step(model, batch())
    synchronized = copy.deepcopy(model.eval())
    synchronize_batch_norm(synchronized, None)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronized.modules())
    assert torch.equal(synchronized(batch()), model(batch()))  # what was in that mode stays there


def test_takes_over_the_very_tensors() -> None:
    model = network()
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    synchronize_batch_norm(model, None)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        model[0].eval()(torch.zeros(2, CHANNELS))
