"""bench/gpu.sh: its plan fits each call's time, and what fails keeps nothing else from running."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import dc_loss
import train_step
from accuracy import compare
from cac_fast.train import config

ROOT = Path(__file__).resolve().parents[1]

SECONDS = {"loss": 420, "bench": 550, "train": 590}
# Asking for the GPU and the back ends: at the beginning, and once more after a build.
ASKING = 20
# For a command that must be killed.
RESERVE = 10
NAMES = ["triton", "triton:gluon", "cuda", "cuda:sm_90a"]

# In place of Python: says which GPU there is, writes down what else it is asked for, and fails
# where FAILS, a pattern, fits the command; `CAC_FAST_CUDA=...` comes before it.
PYTHON = """#!/usr/bin/env bash
command="CAC_FAST_CUDA=${CAC_FAST_CUDA-} $*"
if [[ $command == *get_device_name* ]]; then
    echo "$GPU"
    printf '%s\\n' 'versions 3.12.3 2.11.0' 'xdist True' 'backend triton' 'backend triton:gluon'
    printf '%s\\n' "backend cuda $WITHOUT" "backend cuda:sm_90a $WITHOUT" 'installed True'
    exit
fi
echo "${command//$'\\n'/ }" >> "$CALLS"
echo "at work"
if [[ $command == ${FAILS:-nothing} ]]; then
    echo "boom"
    exit "${CODE:-3}"
fi
"""
# In place of ncu and compute-sanitizer.
TOOL = """#!/usr/bin/env bash
line="${0##*/} $*"
echo "${line//$'\\n'/ }" >> "$CALLS"
"""
# In place of timeout: writes the limits down.
TIMEOUT = """#!/usr/bin/env bash
echo "$1 $2 limit $3" >> "$LIMITS"
exec "${@:4}"
"""


class Done(NamedTuple):
    """code: the exit code. text: what was said. calls: what was asked of Python, in order."""

    code: int
    text: str
    calls: list[str]


class Round:
    """The script in a folder of its own, with stubs for all that it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bench").mkdir()
        (folder / "csrc").mkdir()
        shutil.copy(ROOT / "bench/gpu.sh", folder / "bench")
        (folder / "setup.py").write_text("# builds\n")
        self.source = folder / "csrc/kernels.cu"
        self.source.write_text("// kernels\n")
        self.stub("python", PYTHON)
        self.stub("timeout", TIMEOUT)
        for name in ("ncu", "compute-sanitizer"):
            self.stub(name, TOOL)

    def stub(self, name: str, text: str) -> None:
        path = self.folder / "stubs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def __call__(self, parts: str, **environment: str) -> Done:
        calls, limits = self.folder / "calls.txt", self.folder / "limits.txt"
        calls.write_text("")
        limits.write_text("")
        stubs = self.folder / "stubs"
        known = {
            "PATH": f"{stubs}:{os.environ['PATH']}",
            "PYTHON": str(stubs / "python"),
            "PARTS": parts,
            "RESULTS": str(self.folder / "results"),
            "CALLS": str(calls),
            "LIMITS": str(limits),
            "GPU": "device h100\narch 9.0",
            "WITHOUT": "",
        }
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
        done = subprocess.run(
            ["bash", "bench/gpu.sh", "data/camvid", "weights.pth"],
            cwd=self.folder,
            env=kept | known | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        self.limits = limits.read_text().splitlines()
        return Done(done.returncode, done.stdout + done.stderr, calls.read_text().splitlines())

    def plan(self, part: str) -> list[Planned]:
        """What a dry run shows."""
        done = self(part, DRY_RUN="1", GPU="")
        assert (done.code, done.calls) == (0, [])
        assert not (self.folder / "results").exists()
        pattern = r"^== (.+?)(, beside others)?, at most (\d+)(?: of (\d+))? s: (.*)$"
        return [
            Planned(name, bool(beside), int(limit), int(asked or limit), command)
            for name, beside, limit, asked, command in re.findall(pattern, done.text, re.MULTILINE)
        ]


class Planned(NamedTuple):
    """limit: seconds at worst. asked: seconds where nothing before took all of its own."""

    name: str
    beside: bool
    limit: int
    asked: int
    command: str


@pytest.fixture
def gpu_round(tmp_path: Path) -> Round:
    return Round(tmp_path)


@pytest.mark.parametrize("part", SECONDS)
def test_the_plan_fits(gpu_round: Round, part: str) -> None:
    plan = gpu_round.plan(part)
    groups: list[list[Planned]] = []
    for each in plan:
        if each.beside and groups and groups[-1][0].beside:
            groups[-1].append(each)
        else:
            groups.append([each])
    total = sum(max(each.limit for each in group) for group in groups)
    total += ASKING * (2 if part == "loss" else 1) + RESERVE
    assert SECONDS[part] - 10 <= total <= SECONDS[part]
    # Only the tests, which come last, are cut where all else takes its time, and not to nothing.
    cut = [each for each in plan if each.limit < each.asked]
    assert cut == [each for each in plan if each.name.startswith("tests")]
    assert all(each in groups[-1] and each.limit >= 60 for each in cut)


def test_the_plan_has_everything(gpu_round: Round) -> None:
    plans = {part: {each.name: each.command for each in gpu_round.plan(part)} for part in SECONDS}
    loss, bench, train = plans.values()
    dtypes = ["bfloat16", "float16", "float32"]
    assert list(loss) == [
        "build",
        *(f"verify {name} {dtype}" for name in NAMES for dtype in dtypes),
        *("loss, fast ones", "tiles", "ncu"),
        *(f"tests {name}" for name in NAMES),
        "tests of the operator",
    ]
    assert f"--providers {','.join(NAMES)},eager " in loss["loss, fast ones"]
    # By itself, since a name is a part of its path's.
    assert "-k triton and not triton:gluon " in loss["tests triton"]
    assert "-k cuda:sm_90a " in loss["tests cuda:sm_90a"]
    assert "--clock-control none --set full -k regex:dc_loss_partial -c 4" in loss["ncu"]
    assert list(bench) == ["loss, all", "step", "memcheck"]
    assert "dense,compiled,chunked,flex" in bench["loss, all"]
    assert "--baseline --sweep-negatives 500,25.6k,1M" in bench["step"]
    assert list(train) == ["training", "profile", "tests of the trainer"]
    assert "--crop-size 720 --base-size 2048" in train["profile"]


def test_every_option_is_one_of_its_program(gpu_round: Round) -> None:
    words = {
        each.name: each.command.split(".py ", 1)[1].split()
        for part in SECONDS
        for each in gpu_round.plan(part)
        if ".py " in each.command
    }
    assert dc_loss.parse(words["loss, fast ones"]).providers == [*NAMES, "eager"]
    assert dc_loss.parse([word.replace(",flex", "") for word in words["loss, all"]])
    assert train_step.parse(words["step"]).sweep_negatives == [500, 25_600, 1_000_000]
    training = compare.parse(words["training"])
    assert (training.shares, training.seeds, training.jobs) == ("1/8", [0, 1, 2], 6)
    rest = [*training.data, *training.rest, "--output", "runs/x", "--method", "cac"]
    assert config.parse(rest).optim.iterations == 2000
    assert config.parse(words["profile"]).data.base_size == 2048


def test_all_is_run_within_limits_and_written_down(gpu_round: Round) -> None:
    done = gpu_round("loss bench train")
    assert done.code == 0, done.text
    scripts = re.findall(r"(?:bench|bench/accuracy|train)/\w+\.py", "\n".join(done.calls))
    expected = (
        "bench/dc_loss bench/tiles bench/dc_loss bench/train_step bench/accuracy/compare train/main"
    )
    assert scripts == [f"{name}.py" for name in expected.split()]
    assert sum("-m pytest" in call for call in done.calls) == 5 + 1 + 1  # per part
    # Every command, and the two questions about the GPU.
    assert len(gpu_round.limits) == len(done.calls) + 2
    assert sum(call.startswith(("ncu ", "compute-sanitizer ")) for call in done.calls) == 2
    assert all(re.fullmatch(r"-k (5|15) limit \d+", line) for line in gpu_round.limits)
    written = "".join(
        (gpu_round.folder / f"results/h100-{part}.txt").read_text() for part in SECONDS
    )
    assert "tiles | at work" in done.text
    assert all(line in written for line in done.text.splitlines())


def test_a_failed_build_costs_the_cuda_back_end_alone(gpu_round: Round) -> None:
    fails = {
        "FAILS": "CAC_FAST_CUDA= *pip install*",
        "WITHOUT": "the extension is not built: a.cu: error: no",
    }
    for again in (False, True):  # each call, the second without trying again
        done = gpu_round("loss bench", **fails)
        assert done.code == 1
        builds = [call.split()[0] for call in done.calls if "pip install" in call]
        assert builds == ([] if again else ["CAC_FAST_CUDA=", "CAC_FAST_CUDA=0"])
        assert done.text.splitlines()[-3:] == [
            "failed: build: exit code 3",
            "failed: back end cuda: the extension is not built: a.cu: error: no",
            "failed: back end cuda:sm_90a: the extension is not built: a.cu: error: no",
        ]
        assert any("--providers triton,triton:gluon,eager " in call for call in done.calls)
        assert any("train_step.py" in call for call in done.calls)
        assert not any("verify" in call and " cuda " in call for call in done.calls)


def test_built_where_sources_differ_and_not_where_their_times_do(gpu_round: Round) -> None:
    def built(**environment: str) -> bool:
        done = gpu_round("bench", **environment)
        assert done.code == 0, done.text
        return any("pip install" in call for call in done.calls)

    assert built()
    assert not built()
    os.utime(gpu_round.source, (10**9, 10**9))
    os.utime(gpu_round.folder / "setup.py")
    compiled = gpu_round.source.parent / "__pycache__/find_nvcc.pyc"  # by a build
    compiled.parent.mkdir()
    compiled.touch()
    assert not built()
    gpu_round.source.write_text("// other kernels\n")
    assert built()
    assert built(TORCH_CUDA_ARCH_LIST="8.0")


@pytest.mark.parametrize(
    ("pattern", "code", "said"),
    [
        ("*tiles.py*", 3, "tiles: exit code 3"),
        ("*bench/train_step.py*", 124, "step: over its time"),
        ("*pytest*-k triton:gluon*", 1, "tests triton:gluon: exit code 1"),
        ("*verify*cuda float32*", 137, "verify cuda float32: over its time"),
    ],
)
def test_what_fails_keeps_nothing_from_running(
    gpu_round: Round, pattern: str, code: int, said: str
) -> None:
    usual = gpu_round("loss bench train")
    done = gpu_round("loss bench train", FAILS=pattern, CODE=str(code))
    assert (usual.code, done.code) == (0, 1)
    usual_calls = [call for call in usual.calls if "pip install" not in call]
    assert sorted(done.calls) == sorted(usual_calls)
    assert done.text.splitlines()[-1] == f"failed: {said}"
    assert done.text.count("failed: ") == 1


def test_a_back_end_that_fails_its_check_is_left_out_of_the_benches(gpu_round: Round) -> None:
    gpu_round("loss", FAILS="*verify*triton bfloat16*", CODE="124")
    done = gpu_round("bench")
    assert done.code == 1
    assert any("--providers triton:gluon,cuda,cuda:sm_90a,eager," in call for call in done.calls)
    left_out = "failed: back end triton: left out of the benches, as it failed its check"
    assert done.text.splitlines()[-1] == left_out
    assert gpu_round("loss").code == gpu_round("bench").code == 0


@pytest.mark.parametrize(
    ("parts", "gpu", "code", "said"),
    [
        ("loss", "", 1, "error: no GPU is seen"),
        ("step", "device h100", 2, "error: PARTS has step: use loss, bench, train"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    gpu_round: Round, parts: str, gpu: str, code: int, said: str
) -> None:
    done = gpu_round(parts, GPU=gpu)
    assert (done.code, done.calls) == (code, [])
    assert done.text.startswith(said)
    assert done.text.count("\n") == 1


def test_a_path_for_another_architecture_is_no_failure(gpu_round: Round) -> None:
    done = gpu_round("bench", WITHOUT="needs a GPU of compute capability 9.0")
    assert done.code == 0, done.text
    assert "without the back end cuda:sm_90a: needs a GPU of compute capability 9.0" in done.text
