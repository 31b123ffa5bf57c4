"""The compiled extension: built where it can be; where it is not, everything else works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stand_ins import change_back_end

from cac_fast import _extension, choice, ops
from cac_fast.backend import cpp

ROOT = Path(__file__).parent.parent


def test_make_setup_builds_it() -> None:
    if Path(sys.prefix).parent != ROOT or not Path(sys.prefix, ".ready").exists():
        pytest.skip("this environment was not made by make")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    assert _extension.unavailable() is None


def test_build_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a pull in an editable install: said, not an error in the middle of a loss."""
    monkeypatch.setitem(sys.modules, "cac_fast._C", SimpleNamespace())
    assert "install again" in _extension._load("_C")
    monkeypatch.setitem(sys.modules, "cac_fast._C", SimpleNamespace(interface=3))
    assert _extension._load("_C") is None


def python(program: str, folder: Path) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize(
    "blocked, said",
    [
        ("sys.modules['cac_fast._C'] = None", "the extension is not built: "),
        ("sys.meta_path.insert(0, Broken())", "the extension cannot be loaded: undefined symbol"),
    ],
)
def test_package_works_without_it(blocked: str, said: str, tmp_path: Path) -> None:
    program = f"""
import sys
class Broken:
    def find_spec(self, name, *_):
        if name == "cac_fast._C":
            raise ImportError("undefined symbol: at::somewhere")
{blocked}
import cac_fast
print(cac_fast.backends()["cpp"])
print(cac_fast.build_info() == {{"built": False, "reason": cac_fast.backends()["cpp"]}})
try:
    cac_fast.backend.check_backend("cpp")
except ValueError as error:
    print(error)
"""
    reason, described, error = python(program, tmp_path).splitlines()
    assert reason.startswith(said)
    assert described == "True"
    assert error == f"backend 'cpp' cannot be used: {reason}"


def test_auto_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    change_back_end(monkeypatch, "cpp", unavailable=lambda: "taken away by a test")
    monkeypatch.setattr(choice, "_chosen", {})
    features = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    labels = torch.arange(5)
    arguments = (features, features, features, labels, labels, labels >= 0, 0.1)
    with pytest.warns(RuntimeWarning, match="without its back end 'cpp': taken away by a test"):
        found = ops.dc_loss_rows(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ops.dc_loss_rows(*arguments)
    expected = ops.dc_loss_rows(*arguments, backend="eager")
    for mine, second, theirs in zip(found, again, expected, strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(second, theirs)


def test_auto_takes_it_on_the_cpu() -> None:
    if _extension.unavailable() is not None:
        pytest.skip(_extension.unavailable())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        anchors = torch.empty(0, 4, dtype=dtype)
        assert choice.choose_backend("auto", anchors) is cpp.dc_loss_rows
    with pytest.raises(ValueError, match="backend 'cpp' cannot be used: it works on the CPU"):
        choice.choose_backend("cpp", torch.empty(0, 4, device="meta"))
    with pytest.raises(ValueError, match=r"'cpp' cannot be used: it works on torch.float64"):
        choice.choose_backend("cpp", torch.empty(0, 4, dtype=torch.float8_e5m2))


def test_failed_build_leaves_the_rest_and_the_reason(tmp_path: Path) -> None:
    """A compiler that fails, and a torch that is not there: setup.py ends well, and says why."""
    torchless = tmp_path / "torchless" / "torch"
    torchless.mkdir(parents=True)
    (torchless / "__init__.py").write_text("raise ImportError('no torch for this test')\n")
    # It answers when asked for its version, so that only compiling fails.
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$1" in -*v*|-dump*) exec c++ "$@";; esac\n'
        'echo "a.h:1: fatal error: broken by a test" >&2\nexit 1\n'
    )
    compiler.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name != "CAC_FAST_CUDA"}
    for name, environment, said in (
        ("compiler", {"CC": str(compiler), "CXX": str(compiler)}, "a.h:1: fatal error: broken"),
        ("torch", {"PYTHONPATH": str(torchless.parent)}, "no torch for this test"),
    ):
        build = tmp_path / name
        done = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build", "--build-base", str(build)],
            cwd=ROOT,
            env={**inherited, **environment},
            check=True,
            capture_output=True,
            text=True,
        )
        assert "cac_fast._C is not built: " in done.stderr
        assert said in done.stderr
        (reason,) = build.glob("lib*/cac_fast/_C.txt")
        assert said in reason.read_text(encoding="utf-8")
        assert (reason.parent / "loss.py").is_file()
        assert not list(reason.parent.glob("_C.*.so"))
