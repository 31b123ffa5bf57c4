"""The loss bench: its baselines, its check, what it skips, and the command from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rows_contract import dense, flat
from stand_ins import change_back_end
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cac_fast.backend
from cac_fast import choice
from cac_fast.backend import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import baselines  # noqa: E402
import cases  # noqa: E402
import dc_loss  # noqa: E402
import measure  # noqa: E402
import providers  # noqa: E402
import report  # noqa: E402

CPU = torch.device("cpu")
SMALL = cases.Case("small", 90, 400, "voc", "float32", channels=16)
BASELINES = ("dense", "compiled", "chunked", "flex")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """A baseline with chunks of 150 negatives; compiled without a C++ compiler."""
    monkeypatch.setattr(baselines, "CHUNK", 150)
    quick = {"backend": "aot_eager", "dynamic": True}
    monkeypatch.setattr(baselines, "_compile", lambda function: torch.compile(function, **quick))
    return lambda name, operands: getattr(baselines, name)(*operands)


def exact(operands: cases.Operands) -> cases.Operands:
    features = ("anchors", "positives", "negatives")
    return operands._replace(**{name: getattr(operands, name).double() for name in features})


def assert_close(found: tuple[Tensor, Tensor], operands: cases.Operands, eps: float) -> None:
    """Relative to 80 eps; a loss is a difference of logits up to 10, so to 10 eps absolute."""
    expected = dense(*exact(operands))
    for mine, theirs, absolute in zip(found, expected, (10 * eps, 0), strict=True):
        assert not mine[~operands.active].any()
        rows = int(operands.active.sum())
        assert (mine - theirs).norm() <= 80 * eps * theirs.norm() + absolute * rows**0.5


@pytest.mark.parametrize("labels", cases.LABELS)
@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_baseline_equals_reference(run, name: str, labels: str) -> None:
    operands = cases.make_operands(replace(SMALL, labels=labels), CPU)
    operands.negative_labels[::7] = -1
    assert dense(*operands)[0].any()
    assert_close(run(name, exact(operands)), operands, 2.3e-16)
    found = run(name, operands)
    assert [values.dtype for values in found] == [torch.float32] * 2
    assert_close(found, operands, 1.2e-7)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_baseline_where_nothing_is_admitted(run, name: str) -> None:
    operands = exact(cases.make_operands(SMALL, CPU))
    nobody = operands._replace(negative_labels=torch.full((400,), -1))
    empty = operands._replace(
        negatives=operands.negatives[:0], negative_labels=operands.negative_labels[:0]
    )
    asleep = operands._replace(active=torch.zeros(90, dtype=torch.bool))
    for given in (nobody, empty, asleep):
        loss, gradient = run(name, given)
        assert loss.shape == (90,)
        assert gradient.shape == (90, 16)
        assert not loss.any()
        assert gradient.abs().max() < 1e-14


class Products(TorchDispatchMode):
    """Pairs of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.pairs.append(left.shape[0] * left.shape[1] * right.shape[1] // SMALL.channels)
        return func(*args, **(kwargs or {}))


def test_chunked_does_what_the_authors_do(run) -> None:
    operands = cases.make_operands(SMALL, CPU)
    with Products() as products:
        run("chunked", operands)
    # Forward, again in backward, and the gradient: all anchors, in chunks of 150, 150 and 100.
    assert sorted(products.pairs) == sorted(3 * [90 * 150, 90 * 150, 90 * 100])


def test_bare_products_have_the_admitted_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PRODUCT_TILES, "cpu", [(8, 32), (200, 500)])
    operands = cases.make_operands(SMALL, CPU)
    active = operands.rows(operands.active)
    admitted = active.negative_labels != active.anchor_labels.unsqueeze(1)
    assert operands.admitted == int(admitted.sum()) > 0
    for bare in (providers.Products(operands, 8, 32), providers.fastest_products(operands)):
        with Products() as products:
            bare()
        assert abs(sum(products.pairs) - 2 * operands.admitted) <= int(operands.active.sum())


def test_peak_memory_is_seen() -> None:
    if not (measure.PROC / "self/clear_refs").exists():
        pytest.skip("not Linux")
    kept = torch.ones(2_000_000)
    for size in (30, 10):

        def call(size: int = size) -> float:
            return float((torch.ones(size * 250_000) + kept[0]).sum())

        result, peak = measure.peak_extra_bytes(call, CPU)
        assert result == size * 500_000
        # The kernel counts pages in batches.
        assert 2 * size * 1e6 - 1e6 <= peak <= 2 * size * 1e6 + 4e6


PRODUCTS, *_ = providers.find_providers(CPU)


def bench(items: list[providers.Provider], minutes: float = 1.0) -> dc_loss.Bench:
    return dc_loss.Bench(CPU, [PRODUCTS, *items], repeats=2, minutes=minutes)


def statuses(rows: list[dict]) -> dict[str, str]:
    return {row["provider"]: row["status"] for row in rows}


EAGER_ROWS = flat(BACKENDS["eager"].load().rows)
EAGER = providers.backend_provider("eager", torch.device("cpu"))


def scaled_gradient(*operands: Any) -> tuple[Tensor, Tensor]:
    loss, gradient = EAGER_ROWS(*operands)
    return loss, gradient * (1 + 1e-5)


def shifted_loss(*operands: Any) -> tuple[Tensor, Tensor]:
    loss, gradient = EAGER_ROWS(*operands)
    return loss * (1 + 1e-5), gradient


def inactive_gradient(*operands: Any) -> tuple[Tensor, Tensor]:
    loss, gradient = EAGER_ROWS(*operands)
    return loss, gradient + 1e-9


def wide_gradient(*operands: Any) -> tuple[Tensor, Tensor]:
    loss, gradient = EAGER_ROWS(*operands)
    return loss, gradient.double()


def poisoned_loss(*operands: Any) -> tuple[Tensor, Tensor]:
    loss, gradient = EAGER_ROWS(*operands)
    return loss.index_fill(0, operands[5].nonzero()[-1], torch.nan), gradient


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (scaled_gradient, "error of the gradient"),
        (shifted_loss, "error of the loss"),
        (inactive_gradient, "gradient of an inactive anchor is not 0"),
        (wide_gradient, "gradient is torch.float64, not torch.float32"),
        (poisoned_loss, "loss is not finite"),
    ],
)
def test_wrong_result_is_caught(rows: Callable, reason: str) -> None:
    found = bench([EAGER, providers.provider("other", rows)]).row(SMALL)
    status = statuses(found)
    assert status["eager"] == "ok"
    assert status["other"].startswith(f"wrong: {reason}")
    assert "median_ms" not in found[-1]
    assert f"other wrong: {reason}" in report.table(found)


def test_wrong_result_in_bfloat16_is_caught() -> None:
    case = replace(SMALL, dtype="bfloat16", share=1.0)
    dense = providers.provider("dense", baselines.dense)

    def turned(*operands: Any) -> tuple[Tensor, Tensor]:
        loss, gradient = baselines.dense(*operands)
        return loss, (gradient.float() + 0.02 * gradient.float().roll(1, 1)).bfloat16()

    runner = bench([dense, providers.provider("other", turned)])
    # No probe, which takes long where bfloat16 is emulated.
    for name in ("products", "dense", "other"):
        runner.rates[name, "bfloat16"] = runner.bytes[name, "bfloat16"] = 0.0
    status = statuses(runner.row(case))
    assert status["dense"] == "ok"
    assert status["other"].startswith("wrong: error of the gradient")


def test_wrong_result_ends_the_command_with_1(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    change_back_end(monkeypatch, "eager", rows=lambda operands: scaled_gradient(*operands))
    arguments = "--device cpu --sizes 90x400 --providers eager --repeats 1".split()
    assert dc_loss.main(arguments) == 1
    assert "eager wrong: error of the gradient" in capsys.readouterr().out


def test_failing_provider_does_not_stop_the_others() -> None:
    def refuse(*operands: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("no such dtype\nand more")

    found = bench([providers.provider("other", refuse), EAGER]).row(SMALL)
    expected = "failed: NotImplementedError: no such dtype"
    assert statuses(found) == {"products": "ok", "other": expected, "eager": "ok"}


def test_backends_that_can_be_used_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    other = BACKENDS["eager"].load()
    table = {
        "eager": other,
        "missing": replace(other, unavailable=lambda: "not built"),
        "elsewhere": replace(other, refuses=lambda anchors: f"not on the {anchors.device}"),
        "float32 only": replace(
            other, refuses=lambda anchors: None if anchors.dtype == torch.float32 else "dtype"
        ),
        "16 bits only": replace(
            other, refuses=lambda anchors: None if anchors.dtype.itemsize == 2 else "dtype"
        ),
    }
    table = {
        name: SimpleNamespace(load=lambda backend=backend: backend)
        for name, backend in table.items()
    }
    for module in (providers, choice, cac_fast.backend):
        monkeypatch.setattr(module, "BACKENDS", table)
    items = providers.find_providers(CPU)
    names = [item.name for item in items]
    kinds = ["float32 only", "16 bits only"]
    assert names == ["products", "eager", *kinds, "dense", "compiled", "chunked"]
    runner = bench([items[2]])
    rate = {(name, "float16"): 0.0 for name in names}
    runner.rates, runner.bytes = dict(rate), dict(rate)
    status = statuses(runner.row(replace(SMALL, dtype="float16")))["float32 only"]
    assert status == "skipped: dtype"


def test_every_back_end_is_asked_with_anchors_like_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Where a GPU is, both of its back ends look at the features' dimensions.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("triton", "cuda"):
        change_back_end(monkeypatch, name, unavailable=lambda: None)
    names = [item.name for item in providers.find_providers(CPU)]
    assert "triton" in names
    assert "cuda" not in names


def test_row_over_its_time_is_skipped() -> None:
    runner = bench([EAGER])
    runner.rates["eager", "float32"] = 3 / SMALL.pairs
    runner.bytes["eager", "float32"] = 0.0
    assert statuses(runner.row(SMALL))["eager"] == "skipped: about 6 s for two runs, limit 0.9 s"
    # The goal row may take more.
    assert statuses(runner.row(replace(SMALL, name="goal")))["eager"] == "ok"
    # What was measured there is known from now on.
    assert statuses(runner.row(SMALL))["eager"] == "ok"


def test_row_over_the_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = providers.provider("dense", baselines.dense, None, providers.BASELINE_SLACK)
    monkeypatch.setattr(measure, "free_bytes", lambda device: 10**6)
    runner = bench([EAGER, dense])
    runner.rates["dense", "float32"], runner.bytes["dense", "float32"] = 0.0, 20.0
    small = runner.row(SMALL)
    large = runner.row(replace(SMALL, anchors=900, negatives=900))
    assert statuses(small) == {"products": "ok", "eager": "ok", "dense": "ok"}
    assert statuses(large)["eager"] == "ok"
    assert statuses(large)["dense"].startswith("skipped: about 0.0162 GB")
    arguments = runner.row(replace(SMALL, negatives=10**5))
    assert all("its arguments take" in status for status in statuses(arguments).values())


def test_nothing_runs_after_the_end() -> None:
    runner = bench([EAGER], minutes=0.0)
    reason = "skipped: the 0 minutes of the run are over"
    assert statuses(runner.row(SMALL)) == {"products": reason, "eager": reason}


def test_repetitions_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[..., Any]:
        return lambda: order.append(name)

    runner = bench([])
    runner.repeats = 3
    times = runner._take_turns({"a": call("a"), "b": call("b")}, {"a": 3, "b": 1})
    assert order == ["a", "b", "a", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 1}


def test_slow_ones_run_less_often() -> None:
    runner = bench([])
    runner.repeats = 10
    # Seconds of the first run against a budget of 12.
    assert [runner._runs(first, 12.0) for first in (0.01, 0.5, 3.0, 5.0)] == [10, 4, 2, 1]


def test_standard_rows() -> None:
    for device, main in (("cpu", "float32"), ("cuda", "bfloat16")):
        rows = cases.standard_cases(device)
        if device == "cuda":
            first = cases.Case("dense labels", 16384, 131072, "disjoint", "bfloat16", share=1.0)
            assert rows.pop(0) == first
        assert rows[0] == cases.Case("goal", 8192, 65536, "voc", main)
        goal = [row for row in rows if (row.anchors, row.negatives) == (8192, 65536)]
        assert {row.labels for row in goal} == {"uniform", "voc", "cityscapes"}
        assert {row.dtype for row in goal} == {"float32", "bfloat16"}
        table = [row.negatives for row in rows if row.name == "Table 4"]
        assert table == [500, 1000, 2000, 6400, 12800, 19200, 25600]
        assert max(row.negatives for row in rows) == 2**20
        assert (16200, 129600) in {(row.anchors, row.negatives) for row in rows}
    for shares in cases.LABELS.values():
        assert sum(shares) == pytest.approx(1, abs=1e-6)


def alike(seconds: float) -> measure.Times:
    return measure.Times(seconds, seconds, seconds)


def test_table_fits_a_terminal() -> None:
    names = ["products", "reference", "dense", "compiled", "chunked", "flex", "eager"]
    case = report.describe(replace(SMALL, anchors=16200)) | {"admitted": 10**9}
    rows = [
        case
        | {"provider": name, "status": "ok", "peak_extra_mb": 12345.0}
        | report.time_columns([alike(1.234 * number), alike(12.34)], case)
        for number, name in enumerate(names, start=1)
    ]
    report.add_ratios(rows)
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + len(names)
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 140


def test_headline_compares_across_dtypes() -> None:
    rows = []
    for dtype, took in (("float32", 0.3), ("bfloat16", 0.1)):
        case = report.describe(replace(SMALL, name="goal", dtype=dtype)) | {"admitted": 10**9}
        for name, factor in (("products", 0.5), ("eager", 1.0), ("cpp", 0.8), ("dense", 10.0)):
            memory = {"status": "ok", "peak_extra_mb": 3.0, "provider": name}
            rows.append(case | memory | report.time_columns([alike(factor * took)], case))
        report.add_ratios(rows[-4:])
    rows.append(rows[0] | {"case": "Table 4", "provider": "cpp"})
    assert report.headlines(rows)[1::2] == [
        "- goal, A 90, M 400, voc, float32: cpp 240 ms, 3.2e-06 effective TFLOP/s, 3.00 MB, "
        "1.60 /bare, 12.5x vs dense, 1.25x vs eager",
        "- goal, A 90, M 400, voc, bfloat16: cpp 80.0 ms, 9.6e-06 effective TFLOP/s, 3.00 MB, "
        "1.60 /bare, 12.5x vs dense, 1.25x vs eager, 3.75x vs eager in float32",
    ]


def test_back_ends_are_compared_with_triton() -> None:
    times = {"triton": 3.0, "cuda": 2.0}
    rows = [{"provider": name, "status": "ok", "median_ms": ms} for name, ms in times.items()]
    report.add_ratios(rows)
    assert rows[1]["faster_than"] == {"triton": 1.5}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (1234.5, "1234"), (99.94, "99.9"), (1.0, "1.00"), (0.05, "0.0500"), (5e-5, "5e-05")],
)
def test_three_digits(number: float, text: str) -> None:
    assert report.three_digits(number) == text


def test_command_from_end_to_end(tmp_path: Path) -> None:
    json_file, plot_file = tmp_path / "new" / "rows.json", tmp_path / "new" / "plot.png"
    names = "reference,eager,dense,chunked"
    command = [sys.executable, "bench/dc_loss.py", "--device", "cpu", "--repeats", "2"]
    command += ["--sizes", "96x300,96x700", "--labels", "voc,cityscapes", "--providers", names]
    command += ["--json", str(json_file), "--plot", str(plot_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    record = json.loads(json_file.read_text())
    assert record["command"].startswith("python bench/dc_loss.py --device cpu")
    assert str(tmp_path) not in json_file.read_text()
    assert {"device", "cpu", "threads", "python", "torch", "triton", "commit"} <= set(record)
    rows = record["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 4 * 5
    assert {(row["negatives"], row["labels"]) for row in rows} == {
        (m, labels) for m in (300, 700) for labels in ("voc", "cityscapes")
    }
    for row in rows:
        assert row["provider"] in done.stdout
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        rate = row["admitted"] * 4 * 128 / (row["median_ms"] / 1e3) / 1e12
        assert row["tflops"] == pytest.approx(rate)
        assert row["host_ms"] == row["wall_ms"] == row["median_ms"]
        pairs = row["active"] * row["negatives"]
        assert row["effective_tflops"] == pytest.approx(rate * pairs / row["admitted"])
        same = [row["negatives"], row["labels"]]
        eager = next(
            other["median_ms"]
            for other in rows
            if [other["negatives"], other["labels"]] == same and other["provider"] == "eager"
        )
        assert row["faster_than"]["eager"] == pytest.approx(eager / row["median_ms"])
