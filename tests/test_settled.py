"""`settle_backend`: one choice for all ranks, in the library and at the start of a training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_training import CPU
from stand_ins import Table, failing, silently, wrong_gradient
from test_choice import loss
from test_step import Backbone, Head

from cac_fast import VerificationError, choice, settle_backend
from cac_fast.train import config
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.methods import build_method
from cac_fast.train.methods.cac import CAC
from cac_fast.train.networks import Segmenter
from cac_fast.verification import THOROUGH


def build(world: World = CPU, *options: str) -> CAC:
    settings = config.parse(["--dataset", "toycity", "--method", "cac", *options])
    network = Segmenter(Backbone(), Head(), 3, dropout=0.5)
    return build_method(settings, lambda: network, world, torch.float32)


def test_later_losses_take_what_is_settled(table: Table) -> None:
    table.put("cpp", wrong_gradient)
    with pytest.warns(RuntimeWarning, match="falls back on its back end 'eager': .*'cpp' is wrong"):
        found = settle_backend(dtype=torch.float32, dim=16, temperature=0.2)
    assert found.backend == "eager"
    for anchors, *_, temperature in table.given:
        assert (*anchors.shape, temperature) == (THOROUGH["cpu"][0], 16, 0.2)
    table.calls.clear()
    with silently():
        loss()
    assert table.calls == {"eager": 1}


def test_it_compares_even_where_first_uses_do_not(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAC_FAST_CHECK", "0")
    assert settle_backend(dim=16).backend == "cpp"
    assert table.calls["cpp"] == 1


def test_no_back_end_is_right(table: Table) -> None:
    for name, rows in (("cpp", failing), ("eager", wrong_gradient)):
        table.put(name, rows)
    with pytest.raises(VerificationError, match=r"'cpp' fails .*; back end 'eager' is wrong"):
        settle_backend(dim=16)
    assert not choice._chosen


def test_bad_choices() -> None:
    with pytest.raises(ValueError, match="temperature"):
        settle_backend(temperature=0)
    with pytest.raises(ValueError, match="dim must be at least 1"):
        settle_backend(dim=0)


# ---- at the start of a training


def test_training_settles_what_auto_means(table: Table) -> None:
    with silently():
        method = build()
    assert method.dc_loss.backend == "cpp"
    assert method.report.startswith("loss by back end cpp: gradient ")
    table.put("cpp", failing)
    with pytest.warns(RuntimeWarning, match="falls back on its back end 'eager': .*'cpp' fails"):
        method = build()
    assert method.dc_loss.backend == "eager"
    assert method.report.startswith("loss by back end eager: gradient ")


def test_training_never_falls_back_from_a_name(table: Table) -> None:
    table.put("cpp", failing)
    with silently(), pytest.raises(InputError, match=r"'cpp' fails .*use --dc-backend eager$"):
        build(CPU, "--dc-backend", "cpp")
    assert not table.calls["eager"]


def test_training_does_not_start_where_none_is_right(table: Table) -> None:
    for name in ("cpp", "eager"):
        table.put(name, failing)
    with pytest.raises(InputError, match=r"'cpp' fails .*; back end 'eager' fails .*--device cpu$"):
        build()


# ---- two processes


def as_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)  # a forked process must not use the threads of its parent
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = Table(patch)
        for name in ("cpp", "triton", "eager"):
            table.put(name)
        found["all right"] = settle_backend(dim=8).backend

        # Each rank finds another one wrong, and one is not there on rank 1.
        patch.setattr(choice, "_candidates", lambda _: ["cuda", "cpp", "triton", "eager"][rank:])
        table.put("cuda")
        table.put(("cpp", "triton")[rank], failing)
        found["one each"] = settle_backend(dim=16).backend
        loss()
        found["warnings"] = [str(warning.message) for warning in caught]
        found["later"] = choice._chosen[torch.device("cpu"), torch.float32, 16, False]

        world = World(rank, 2, torch.device("cpu"))
        found["training"] = build(world).dc_loss.backend
        for name in ("eager", "cpp")[rank:]:
            table.put(name, failing)
        try:
            build(world)
        except InputError as error:
            found["error"] = str(error)
    found["cuda"] = table.calls["cuda"]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_ranks_choose_alike(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(as_rank, (tmp_path,), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in ranks:
        assert found["all right"] == "cpp"
        assert found["one each"] == found["later"] == found["training"] == "eager"
        assert found["cuda"] == 0
        for name in ("cpp", "triton", "eager"):
            assert f"back end {name!r} fails" in found["error"]
    (said,), others = (found["warnings"] for found in ranks)
    assert "'eager': back end 'cpp' fails on cpu" in said
    assert "; back end 'triton' fails on cpu" in said
    assert others == []
