"""`--weights` of a table whose rows have several backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_folders import one_line
from tabled import Programs

from cac_fast.train.errors import InputError

REST = "--batch-size 2 --crop-size 64 --workers 0 --device cpu --iterations 4".split()
BACKBONES = {"CAC VGG-16": "vgg16", "CAC R50": "resnet50"}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Programs:
    return Programs(monkeypatch, tmp_path)


def weights_of(command: list[str]) -> str:
    """The last `--weights` of a command, which is the one that counts."""
    return command[len(command) - command[::-1].index("--weights")]


def test_each_backbone_gets_its_own_file(programs: Programs) -> None:
    files = {name: programs.folder / f"{name}.pth" for name in BACKBONES.values()}
    rest = [*REST, "--weights", str(programs.folder / "{backbone}.pth")]
    words = ["--seeds", "0", "--image-labels", "from-masks"]
    # The file of a row that this call does not train need not be there.
    files["vgg16"].touch()
    assert programs.fill(5, *words, "--rows", "CAC VGG-16", rest=rest) == 0
    files["vgg16"].unlink()
    files["resnet50"].touch()
    assert programs.fill(5, *words, "--rows", "CAC R50", rest=rest) == 0
    found = [(command[0], weights_of(command)) for _, command in programs.calls]
    assert found == [
        (program, str(path))
        for path in files.values()
        for program in ("train/main.py", "train/classify.py", "train/main.py")
    ]
    # Both calls fill one table.
    cells = {(cell["row"], cell["column"]): cell for cell in programs.record(5)["cells"]}
    for row in BACKBONES:
        for column in ("semi", "weakly"):
            assert cells[row, column]["seeds"] == [0]
    # A run is the same whether its file is named or comes of the pattern.
    for row, backbone in BACKBONES.items():
        named = [*REST, "--weights", f"elsewhere/{backbone}.pth"]
        keys = [
            [cell.runs[0].key for cell in programs.plan(5, *words, rest=each) if cell.row == row]
            for each in (rest, named)
        ]
        assert keys[0] == keys[1] and len(set(keys[0])) == 2


def test_a_file_that_is_not_there_is_named_before_anything_is_trained(programs: Programs) -> None:
    (programs.folder / "resnet50.pth").touch()
    rest = [*REST, "--weights", str(programs.folder / "{backbone}.pth")]
    with pytest.raises(InputError) as error:
        programs.fill(5, "--seeds", "0", "--columns", "semi", rest=rest)
    one_line(error, programs.folder / "vgg16.pth", "CAC VGG-16 semi seed 0", "--rows")
    assert programs.calls == []


def test_a_backbone_of_timm_has_no_folder_of_its_own(programs: Programs) -> None:
    rest = [*REST, "--backbone", "timm/resnet18", "--weights", "w/{backbone}.safetensors"]
    (run,) = (
        c.runs[0] for c in programs.plan(5, "--seeds", "0", rest=rest) if c.runs and "R50" in c.row
    )
    assert run.settings.model.weights == "w/timm_resnet18.safetensors"
