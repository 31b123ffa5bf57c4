"""The sweep of tile sizes: what it tries, that each is checked, what it proposes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

import tiles
from cac_fast.kernels import configs
from lib.side_by_side import side_by_side

ROOT = Path(__file__).resolve().parents[1]

# The command under Triton's interpreter, with a small case, all of it in one process. Of the lines
# to try one has a size that no kernel can have, one a wrong result.
SMALL = """
import sys
sys.path.insert(0, "bench")
import tiles
from cac_fast.kernels import dc_loss
tiles.standard_cases = lambda device: [
    tiles.Case("small", 40, 90, "disjoint", "float32", 1.0, channels=16)
]
tiles.REPEATS = 2
tiles.side_by_side = lambda calls, seconds: [(call(), "") for call in calls]
usual, rows = tiles.around, dc_loss.dc_loss_rows
def around(present):
    return [*usual(present)[:2], present._replace(tile=24), present._replace(tile=16)]
def wrong(*given):
    loss, gradient = rows(*given)
    tile = tiles.configs.find("gfx", "ieee", 16).tile
    return loss, gradient * (1.001 if tile == 16 else 1)
tiles.around, dc_loss.dc_loss_rows = around, wrong
sys.exit(tiles.main(sys.argv[1:]))
"""


def test_sweep_under_the_interpreter(tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    done = subprocess.run(
        [sys.executable, "-c", SMALL, "--json", str(file)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr  # as a result is wrong
    record = json.loads(file.read_text())
    present = configs.find("gfx", "ieee", 16)
    first, second, impossible, wrong = record["rows"]
    assert first["line"] == present._asdict()
    for row in (first, second):
        assert row["status"] == "ok"
        rate = 4 * 40 * 90 * 16 / (row["median_ms"] / 1e3) / 1e12
        assert row["effective_tflops"] == pytest.approx(rate)
    # So its line is the one that was launched.
    assert impossible["status"].startswith("failed: ")
    assert wrong["status"].startswith("wrong: error of the gradient")
    assert "median_ms" not in impossible and "median_ms" not in wrong
    for row in record["rows"]:
        assert row["name"] in done.stdout
    (proposal,) = record["proposals"]
    assert done.stdout.splitlines()[-1] == proposal
    assert proposal.startswith(
        ("triton: keep 128: Config(64, ", "triton: propose 128: Config(64, ")
    )


def test_lines_around_the_present_one() -> None:
    present = configs.Config(128, 128, 8, 3, 1)
    lines = tiles.around(present)
    assert lines[0] == present
    assert configs.Config(64, 128, 4, 2, 2) in lines
    assert len(lines) == len(set(lines)) == 8
    smallest = tiles.around(configs.Config(16, 16, 1, 1, 1))
    assert all(min(line[:4]) >= 1 and line.tile >= 16 <= line.block for line in smallest)


class Specialized(NamedTuple):
    tile: int
    block: int
    stages: int
    registers: int


def test_lines_of_warps_with_roles_ask_for_no_more_than_there_is() -> None:
    present = Specialized(128, 128, 6, 240)
    lines = tiles.around(present)
    assert lines[0] == present
    assert len(lines) == len(set(lines)) == 7
    for line in lines:
        assert line.block * line.stages <= present.block * present.stages
        assert line.registers <= present.registers and line.registers % 8 == 0


def test_every_line_of_the_tables_finds_its_place_again() -> None:
    device = tiles.torch.device("cpu")
    case = tiles.Case("small", 40, 90, "disjoint", "bfloat16", channels=100)
    present = configs.find("gfx", "half", 128)
    other = present._replace(stages=9)
    with (
        pytest.raises(RuntimeError),
        tiles.in_its_table(tiles.Candidate("triton", other), case, device),
    ):
        assert configs.find("gfx", "half", 128) == other
        raise RuntimeError
    assert configs.find("gfx", "half", 128) == present


def test_resources_are_those_of_the_inner_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(**numbers: int | None) -> SimpleNamespace:
        return SimpleNamespace(**numbers, metadata=SimpleNamespace(shared=99_000))

    kernels = {"masked": compiled(n_regs=240, n_spills=0), "loading": compiled(n_regs=None)}
    module = SimpleNamespace(
        dc_loss_partial=SimpleNamespace(device_caches={0: (kernels, {})}),
        dc_loss_combine=SimpleNamespace(device_caches={0: ({"": compiled(n_regs=255)}, {})}),
    )
    monkeypatch.setitem(sys.modules, "cac_fast.kernels.any", module)
    assert tiles.resources() == {"registers": 240, "spills": 0, "shared": 99_000}


def row(*milliseconds: float) -> dict[str, float]:
    return dict(zip(("median_ms", "p20_ms", "p80_ms"), milliseconds, strict=True))


def test_the_present_line_stays_unless_another_is_clearly_faster() -> None:
    present = row(1.0, 0.98, 1.02)
    assert tiles.fastest([present, row(0.97, 0.96, 0.99)]) == 0
    assert tiles.fastest([present, row(1.1, 1.1, 1.1), row(0.9, 0.89, 0.91)]) == 2
    assert tiles.fastest([{}, row(1.1, 1.1, 1.1), row(1.2, 1.2, 1.2)]) == 1


def test_what_crashes_or_hangs_costs_its_result_alone() -> None:
    found = side_by_side([partial(dict, status="ok"), partial(os._exit, 3)], 120)
    assert found == [({"status": "ok"}, ""), (None, "exit code 3")]
    begin = time.monotonic()
    assert side_by_side([partial(time.sleep, 600)], 0.5) == [(None, "not done in 0.5 s")]
    assert time.monotonic() - begin < 60
