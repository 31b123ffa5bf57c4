"""What can be named, and how code outside the project is found or its absence is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data_folders import one_line, write_folder
from small_training import ROOT

from cac_fast.train import config
from cac_fast.train.data.layouts import open_data
from cac_fast.train.errors import InputError
from cac_fast.train.methods import method_class
from cac_fast.train.networks import build_network
from cac_fast.train.registry import BACKBONES, LAYOUTS, METHODS, NETWORKS, Entry, Registry
from cac_fast.train.settings import FIELDS

REGISTRIES = [LAYOUTS, NETWORKS, BACKBONES, METHODS]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.option)
def test_entries(registry: Registry) -> None:
    for name in registry.names:
        assert callable(registry.load(name)), name
        assert name in registry.describe() and registry.entries[name].help in registry.describe()


def test_presets_are_settings() -> None:
    for entry in (*LAYOUTS.entries.values(), *METHODS.entries.values()):
        assert entry.preset.keys() <= FIELDS.keys()
        for where, more in entry.cases:
            assert where.keys() | more.keys() <= FIELDS.keys()


def test_later_cases_of_a_preset_win() -> None:
    cases = ({"a": 1}, {"x": 2}), ({"a": 1, "b": 1}, {"x": 3}), ({"b": 2}, {"y": 4})
    entry = Entry("m:f", "", preset={"x": 1}, cases=cases)
    found = [entry.preset_for({"a": a, "b": b}) for a, b in ((0, 0), (1, 0), (1, 1), (0, 2))]
    assert found == [{"x": 1}, {"x": 2}, {"x": 3}, {"x": 1, "y": 4}]


def test_help_and_mistakes_come_without_what_is_named() -> None:
    code = (
        "import sys\n"
        "import cac_fast.train.config, cac_fast.train.options\n"
        "slow = 'torchvision', 'PIL', 'cac_fast.train.networks', 'cac_fast.train.data.images'\n"
        "assert not set(slow) & sys.modules.keys(), sys.modules.keys() & set(slow)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_entry_with_a_prefix_is_given_the_rest() -> None:
    entry = Entry("builtins:dict", "any")
    named = Registry("--backbone", {"a": Entry("builtins:str", "one"), "b/NAME": entry})
    assert named.load("b/c:d").args == ("c:d",) and named.entry("b/") is entry
    for name in ("b", "a/x", "c/x"):
        with pytest.raises(InputError) as error:
            named.load(name)
        one_line(error, f"--backbone: invalid choice: '{name}'", "a, b/NAME")


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(InputError) as error:
        LAYOUTS.load("citscapes")
    one_line(error, "--dataset", "'citscapes'", "did you mean cityscapes?", "module:name")


def test_code_of_the_working_folder(working_folder: Path) -> None:
    (working_folder / "inner").mkdir()
    (working_folder / "inner/mine.py").write_text("def name(): return 3\n")
    assert METHODS.load("inner.mine:name")() == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone:Net", ["no gone.py in {folder}", "no module gone"]),
        ("gone.deep:Net", ["no gone/deep.py in {folder}"]),
        ("mine.deep:Net", ["no mine/deep.py in {folder}"]),
        ("mine:Nett", ["{folder}/mine.py holds no 'Nett'", "did you mean Net?"]),
        ("mine:", ["{folder}/mine.py holds no ''"]),
        (":Net", ["module  cannot be imported"]),
        ("broken:Net", ["NameError", "nowhere", "{folder}/broken.py line 2"]),
        ("typo:Net", ["SyntaxError", "typo.py, line 1"]),
        ("needs:Net", ["No module named 'not_installed'", "{folder}/needs.py line 1"]),
    ],
)
def test_code_that_cannot_be_had(working_folder: Path, name: str, words: list[str]) -> None:
    (working_folder / "mine.py").write_text("class Net: pass\n")
    (working_folder / "broken.py").write_text("x = 1\nnowhere\n")
    (working_folder / "typo.py").write_text("def (:\n")
    (working_folder / "needs.py").write_text("import not_installed\n")
    with pytest.raises(InputError) as error:
        NETWORKS.load(name)
    one_line(error, f"--network {name}: ", *(word.format(folder=working_folder) for word in words))


def test_all_that_is_named_can_be_ones_own(working_folder: Path) -> None:
    write_folder(working_folder / "data")
    (working_folder / "mine.py").write_text(
        "from cac_fast.train.data.layouts.folder import open_folder as layout\n"
        "from cac_fast.train.networks.lraspp import lraspp as network\n"
        "from cac_fast.train.networks.backbones import MobileNetBackbone\n"
        "def backbone(*strides): return MobileNetBackbone('mobilenet_v2', *strides)\n"
    )
    assert open_data("mine:layout", working_folder / "data").classes == ("sky", "wet road", "car")
    with pytest.raises(InputError, match="mine:layout needs its folder: give --data-dir"):
        open_data("mine:layout", None)
    network = build_network("mine:network", "mine:backbone", 3)
    assert network.feature_channels == 128 + 32


@pytest.mark.parametrize("place", ["mine.py", "mine/__init__.py", "inner/mine.py"])
def test_a_file_names_code_of_the_working_folder_alone(working_folder: Path, place: str) -> None:
    path = working_folder / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("def net(): pass\n")
    name = place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for fine in (f"{name}:net", "lraspp"):
        NETWORKS.check_own(fine)
    (working_folder / "torch").mkdir()
    (working_folder / "torch/hub.py").write_text("def load(): pass\n")
    for name, file in (("json:loads", "json.py"), ("torch.hub:load", "torch/hub.py")):
        with pytest.raises(InputError) as error:
            NETWORKS.check_own(name)
        one_line(error, f"--network {name}: ", "working folder alone", file)
    with pytest.raises(InputError, match="working folder alone"):
        NETWORKS.check_own("antigravity:geohash")
    assert "antigravity" not in sys.modules  # it opens a browser


def test_ones_own_code_returns_what_is_used(working_folder: Path) -> None:
    (working_folder / "mine.py").write_text("def nothing(*arguments): pass\n")
    with pytest.raises(InputError) as error:
        build_network("mine:nothing", "resnet18", 3)
    one_line(error, "--network mine:nothing: it returns a NoneType, not a Segmenter")
    with pytest.raises(InputError) as error:
        build_network("pspnet", "mine:nothing", 3)
    one_line(error, "--backbone mine:nothing: it returns a NoneType, not an Encoder")
    with pytest.raises(InputError) as error:
        open_data("mine:nothing", working_folder)
    one_line(error, "--dataset mine:nothing: it returns a NoneType, not a SegmentationData")


def test_ones_own_module_comes_before_the_commands_files(working_folder: Path) -> None:
    """Python looks first where the command's file is, and that folder has a pictures.py too."""
    (working_folder / "pictures.py").write_text("from nowhere import x\n")
    words = "--dataset pictures:x --data-dir . --labeled-share 1/2 --output lists".split()
    done = subprocess.run(
        [sys.executable, ROOT / "train/split.py", *words], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"No module named 'nowhere', {working_folder}/pictures.py line 1" in done.stderr


def test_a_method_is_a_method(working_folder: Path) -> None:
    (working_folder / "mine.py").write_text("class Net: pass\n")
    with pytest.raises(InputError) as error:
        method_class(config.parse(["--dataset", "toycity", "--method", "mine:Net"]))
    one_line(error, "--method mine:Net: ", "no subclass of cac_fast.train.methods.Method")
