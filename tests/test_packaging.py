from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cac_fast

ROOT = Path(__file__).parent.parent


def run(*command: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """What setup.py declares now, which an older editable install would not show."""
    folder = tmp_path_factory.mktemp("metadata")
    run("setup.py", "--quiet", "egg_info", "--egg-base", str(folder), folder=ROOT)
    return Distribution.at(folder / "cac_fast.egg-info")


def read_pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def test_versions_agree(metadata: Distribution) -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = re.search(r"^version: (.+)$", citation, re.MULTILINE)[1]
    assert metadata.version == cited == cac_fast.__version__


def test_constraints_pin_what_setup_asks_for(metadata: Distribution) -> None:
    pins = read_pins("constraints.txt")
    requirements = [Requirement(text) for text in metadata.requires]
    assert {requirement.name for requirement in requirements} >= {"torch", "torchvision", "pytest"}
    for requirement in requirements:
        version = pins.get(canonicalize_name(requirement.name), "not pinned")
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_oldest_versions_are_those_that_setup_asks_for(metadata: Distribution) -> None:
    pins = read_pins("constraints-oldest.txt")
    requirements = [Requirement(text) for text in metadata.requires]
    lowest = {r.name: str(r.specifier) for r in requirements if r.name in ("torch", "torchvision")}
    assert lowest == {name: f">={pins[name].removesuffix('.0')}" for name in lowest}


def test_loss_alone_needs_torch_and_numpy(metadata: Distribution) -> None:
    always = [text for text in metadata.requires if "extra ==" not in text]
    assert sorted(Requirement(text).name for text in always) == ["numpy", "torch"]


def test_import_from_another_folder_leaves_the_trainer_alone(tmp_path: Path) -> None:
    program = "import cac_fast, sys; print(cac_fast.__file__, *sys.modules)"
    path, *modules = run("-c", program, folder=tmp_path).split()
    assert Path(path) == ROOT / "cac_fast" / "__init__.py"
    assert {"torchvision", "PIL", "tensorboard", "cac_fast.train"}.isdisjoint(modules)


def test_mapped_packages_import_from_another_folder(tmp_path: Path) -> None:
    program = "from cac_fast import kernels, train; print(*kernels.__path__, *train.__path__)"
    paths = run("-c", program, folder=tmp_path).split()
    assert [Path(path) for path in paths] == [ROOT / "kernels", ROOT / "train"]


@pytest.mark.parametrize("folder", ["cac_fast", "kernels", "train"])
def test_every_folder_of_modules_is_a_package(folder: str) -> None:
    folders = {path.parent for path in (ROOT / folder).rglob("*.py")}
    assert folders
    assert [path for path in folders if not (path / "__init__.py").is_file()] == []


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    options = ["egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder)]
    run("setup.py", "--quiet", *options, folder=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def modules(folder: Path) -> set[str]:
    """What `folder` holds of cac_fast, as a wheel names it."""
    names = {"cac_fast": "cac_fast", "kernels": "cac_fast/kernels", "train": "cac_fast/train"}
    return {
        str(name / path.relative_to(folder / place))
        for place, name in names.items()
        for path in (folder / place).rglob("*")
        if path.suffix in {".py", ".css", ".js"}
    }


def test_sdist_holds_all_that_is_built(sdist: Path) -> None:
    kinds = {".cpp", ".h", ".cu", ".cuh", ".py"}
    csrc = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.suffix in kinds}
    assert len(csrc) > 20
    assert {path for path in csrc if not (sdist / path).is_file()} == set()
    assert modules(sdist) == modules(ROOT)


def test_wheel_is_built_from_the_sdist_in_isolation(sdist: Path, tmp_path: Path) -> None:
    """With what pyproject.toml asks for alone: no torch, so that nothing compiled is in it."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(sdist)]
    # Where the CUDA part must be built, a build without torch is an error, as it should be.
    outside = {"PYTHONPATH", "PIP_NO_BUILD_ISOLATION", "CAC_FAST_CUDA"}
    kept = {name: value for name, value in os.environ.items() if name not in outside}
    environment = kept | {"PIP_RETRIES": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("setuptools, which the build asks for, cannot be had here")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("cac_fast-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        reasons = {f"cac_fast/{name}.txt" for name in ("_C", "_C_cuda")}
        assert names == modules(ROOT) | reasons
        for name in reasons:
            assert "--no-build-isolation" in file.read(name).decode()
