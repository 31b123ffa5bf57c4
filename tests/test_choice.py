"""Which back end "auto" takes: checked once, none silently, nothing where it must not check."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from rows_contract import flat
from stand_ins import Table, failing, silently, slow, wrong_gradient, wrong_loss
from test_ops import operands
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cac_fast import VerificationError, choice, directional_contrastive_loss, ops, proven
from cac_fast.backend import BACKENDS, eager

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def loss(backend: str = "auto", **more: Any) -> Tensor:
    return ops.dc_loss_rows(**operands(dtype=torch.float32) | more, backend=backend)[0]


def expected() -> Tensor:
    return flat(eager.dc_loss_rows)(*operands(dtype=torch.float32).values())[0]


# ---- the first use


def test_right_one_is_checked_once(table: Table) -> None:
    with silently():
        for _ in range(3):
            assert torch.equal(loss(), expected())
    assert (table.calls["cpp"], table.calls["eager"]) == (4, 0)
    anchors, *_, temperature = table.given[0]
    assert (anchors.dtype, *anchors.shape, temperature) == (torch.float32, 200, 16, 0.1)


def test_each_dtype_and_dim_is_checked(table: Table) -> None:
    for dtype, d in ((torch.float32, 16), (torch.bfloat16, 16), (torch.float32, 20)):
        for _ in range(2):
            ops.dc_loss_rows(**operands(dtype=dtype, d=d))
    checks = [(given[0].dtype, given[0].shape[1]) for given in table.given[::3]]
    assert checks == [(torch.float32, 16), (torch.bfloat16, 16), (torch.float32, 20)]
    assert table.calls["cpp"] == 9


def test_nothing_is_asked_once_it_is_chosen(table: Table) -> None:
    loss()
    table.calls.clear()
    loss()
    assert table.calls == {"cpp": 1}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (failing, r"'cpp' fails on cpu \(MemoryError: out of shared memory\)$"),
        (wrong_loss, "'cpp' is wrong on cpu: its loss is 1.0e-02 off"),
        (wrong_gradient, "'cpp' is wrong on cpu: its gradient is 1.0e-02 off"),
    ],
)
def test_falls_back_with_one_warning(table: Table, rows: Any, said: str) -> None:
    table.put("cpp", rows)
    with pytest.warns(RuntimeWarning, match=f"falls back on its back end 'eager': .*{said}") as got:
        assert torch.equal(loss(), expected())
    assert len(got) == 1
    with silently():
        assert torch.equal(loss(), expected())
    assert (table.calls["cpp"], table.calls["eager"]) == (1, 3)


def test_one_warning_names_all_that_are_passed_over(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_candidates", lambda _: ["triton", "cpp", "eager"])
    table.put("triton", failing)
    table.put("cpp", wrong_loss)
    with pytest.warns(RuntimeWarning, match="'triton' fails .*; back end 'cpp' is wrong") as got:
        loss()
    assert len(got) == 1


def test_error_names_all_where_none_is_right(table: Table) -> None:
    table.put("cpp", failing)
    table.put("eager", wrong_loss)
    said = "'cpp' fails .*; back end 'eager' is wrong .*; name one, or set CAC_FAST_CHECK=0$"
    for _ in range(2):  # nothing is remembered
        with pytest.raises(VerificationError, match=said):
            loss()


def test_named_back_end_is_taken_as_it_is(table: Table) -> None:
    table.put("cpp", failing)
    with silently(), pytest.raises(MemoryError):
        loss("cpp")
    table.put("cpp", wrong_loss)
    with silently():
        assert torch.equal(loss("cpp"), expected() * 1.01)
    assert (table.calls["cpp"], table.calls["eager"]) == (2, 0)


def test_check_can_be_left_out(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAC_FAST_CHECK", "0")
    table.put("cpp", wrong_loss)
    for calls in (1, 2):
        assert torch.equal(loss(), expected() * 1.01)
        assert table.calls["cpp"] == calls


def test_random_state_is_left_alone(table: Table) -> None:
    before = torch.get_rng_state()
    loss()
    assert table.calls["cpp"] == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_defaults_of_the_caller_do_not_matter(table: Table) -> None:
    anchors = torch.ones(4, 16)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with silently(), torch.device("meta"), torch.inference_mode():
            choice.choose_backend("auto", anchors)
    finally:
        torch.set_default_dtype(default)
    assert table.calls["cpp"] == 1


def test_threads_check_once(table: Table) -> None:
    table.put("cpp", slow)
    threads = [threading.Thread(target=loss) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert table.calls["cpp"] == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 17, 512])
@pytest.mark.parametrize("temperature", [1e-6, 0.01, 0.07, 1e3])
def test_no_false_alarm(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dim: int, temperature: float
) -> None:
    """Sizes and temperatures at which 16 bits leave nothing of some gradients included."""
    for name in ("cpp", "eager"):
        if BACKENDS[name].load().unavailable():
            continue
        monkeypatch.setattr(choice, "_chosen", {})
        monkeypatch.setattr(choice, "_candidates", lambda _, name=name: [name])
        choice.choose_backend("auto", torch.empty(1, dim, dtype=dtype), temperature)


# ---- where it must not check


def test_empty_input_is_not_checked(table: Table) -> None:
    ops.dc_loss_rows(**operands(a=0))
    ops.dc_loss_rows(**operands(d=0))
    assert table.calls["cpp"] == 0
    assert not choice._chosen


CAPTURING = [(torch.cuda, "is_initialized"), (torch.cuda, "is_current_stream_capturing")]
COMPILING = [(torch.compiler, "is_compiling")]


@pytest.mark.parametrize("states", [CAPTURING, COMPILING], ids=["capture", "compilation"])
def test_first_candidate_unchecked_or_the_former_choice(
    table: Table, states: list[tuple[Any, str]]
) -> None:
    def meanwhile() -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            for module, state in states:
                patch.setattr(module, state, lambda: True)
            given = operands(dtype=torch.float32)
            return flat(choice.choose_backend("auto", given["anchors"]))(*given.values())[0]

    table.put("cpp", wrong_loss)
    assert torch.equal(meanwhile(), expected() * 1.01)
    assert table.calls["cpp"] == 1
    with pytest.warns(RuntimeWarning, match="falls back"):
        loss()
    assert torch.equal(meanwhile(), expected())
    assert table.calls["cpp"] == 2


def test_tracing(table: Table) -> None:
    torch.compiler.reset()
    seen: list[int] = []

    def stop(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(table.calls["cpp"])
        return graph.forward

    def step(anchors: Tensor, given: dict[str, Any]) -> Tensor:
        return directional_contrastive_loss(anchors, **given, threshold=0.2)

    given = operands(dtype=torch.float32)
    given |= dict.fromkeys(("anchor_confidence", "positive_confidence"), torch.rand(12))
    anchors = given.pop("anchors").requires_grad_()
    del given["active"], given["temperature"]
    torch.compile(step, fullgraph=True, backend=stop)(anchors, given)
    assert seen == [0]
    assert table.calls["cpp"] == 2  # when it ran


def test_fake_tensors(table: Table) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = {k: mode.from_tensor(v) if k != "temperature" else v for k, v in operands().items()}
        assert ops.dc_loss_rows(**given)[0].shape == (12,)
        choice.choose_backend("auto", given["anchors"])
    assert not table.given
    assert not choice._chosen


def test_a_temperature_that_needs_other_kernels_is_checked_by_itself(table: Table) -> None:
    given = operands(dtype=torch.float32)
    for temperature in (0.1, 0.5, 0.01, 0.005):
        choice.choose_backend("auto", given["anchors"], temperature)
    assert sorted(offset for *_, offset in choice._chosen) == [False, True]


# ---- candidates


@pytest.fixture
def gpu(table: Table, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Anchors as on an sm_90."""
    for name in ("triton", "cuda", "triton:gluon"):
        table.put(name)
    monkeypatch.setattr(proven, "architecture", lambda _: "sm_90")
    with FakeTensorMode():
        return torch.empty(4, 16, device="cuda")


def test_triton_then_plain_pytorch_until_a_path_is_proven(
    gpu: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for proofs in ((), (proven.Proof("sm_80", "cuda", "a.json"),)):
        monkeypatch.setattr(proven, "PROOFS", proofs)
        assert choice._candidates(gpu) == ["triton", "eager"]


def test_proven_paths_come_first(gpu: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [("sm_80", "triton"), ("sm_90", "triton:gluon"), ("sm_90", "triton"), ("sm_90", "cuda")]
    proofs = tuple(proven.Proof(*line, "a.json") for line in lines)
    monkeypatch.setattr(proven, "PROOFS", proofs)
    assert choice._candidates(gpu) == ["triton:gluon", "triton", "cuda", "eager"]
    monkeypatch.setattr(proven, "PROOFS", proofs[1:2])
    assert choice._candidates(gpu) == ["triton:gluon", "triton", "eager"]


def test_other_devices_have_plain_pytorch(table: Table) -> None:
    anchors = torch.empty(4, 16, device="meta")
    assert choice._candidates(anchors) == ["eager"]
    assert choice.choose_backend("auto", anchors) is BACKENDS["eager"].load().rows
    assert not table.calls["eager"]
