"""Weights of timm's encoders: from files, from timm, and files that are refused."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest
import torch
from small_training import assert_same_bits
from timm_encoders import built, counters_aside, every_backbone
from torch import nn

from cac_fast.train.errors import InputError
from cac_fast.train.networks import load_backbone_weights

timm = pytest.importorskip("timm")


@functools.cache
def classifier(backbone: str) -> dict[str, torch.Tensor]:
    """The state_dict of timm's network, every tensor random."""
    torch.manual_seed(1)
    state = timm.create_model(backbone).state_dict()
    return {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in state.items()}


def one_word(name: str) -> str:
    """A tensor's name whether or not timm has taken the layers out of their containers."""
    return re.sub(r"[._]", " ", name.removeprefix("net."))


FORMS = {
    "pth": lambda state: state,
    "DDP": lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}, "epoch": 3},
    "safetensors": lambda state: state,
}


def save(tmp_path: Path, content: object, form: str = "pth") -> Path:
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@every_backbone
@pytest.mark.parametrize("form", FORMS)
def test_weights_there_and_back(tmp_path, backbone, form):
    network = built("lraspp", backbone)
    head = [parameter.clone() for parameter in network.head.parameters()]
    for tensor in network.backbone.state_dict().values():
        tensor.zero_()
    path = save(tmp_path, FORMS[form](classifier(backbone)), form)
    state = torch.get_rng_state()
    report = load_backbone_weights(network, path)
    assert torch.equal(torch.get_rng_state(), state)
    found = counters_aside(network.backbone.state_dict())
    expected = {one_word(name): tensor for name, tensor in classifier(backbone).items()}
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[one_word(name)]), name
    assert (report.target, report.loaded) == ("backbone", len(found))
    assert (report.skipped, report.missing) == ([], [])
    assert all(map(torch.equal, head, network.head.parameters()))


class Code:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def half(state: dict) -> dict:
    return dict(list(state.items())[: len(state) // 2])


WRONG = {
    "half of it": (half, r"of another architecture: \d+ of the \d+ tensors .* first "),
    "one is not there": (
        lambda state: {n: t for n, t in state.items() if n != "bn1.bias"},
        r": 1 of the 100 tensors .* first bn1\.bias;",
    ),
    "unknown prefix": (
        lambda state: {f"net2.{n}": t for n, t in state.items()},
        "of another architecture: 100 of the 100",
    ),
    "another shape": (
        lambda state: state | {"layer4.0.conv1.weight": torch.zeros(512, 256, 1, 1)},
        r": 1 of the 100 tensors .* first layer4\.0\.conv1",
    ),
    "another encoder": (lambda state: classifier("convnext_atto"), "of another architecture"),
    "nothing": (lambda state: {}, "of another architecture: 100"),
    "a list": (lambda state: list(state.values()), "holds a list"),
    "a module": (lambda state: nn.Linear(1, 1), "more than tensors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_files_are_refused(tmp_path, wrong):
    change, message = WRONG[wrong]
    network = built("lraspp", "resnet18")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        load_backbone_weights(network, save(tmp_path, change(classifier("resnet18"))))
    assert "\n" not in str(caught.value)
    assert_same_bits(network.state_dict(), before)


@every_backbone
def test_a_file_of_another_width_is_refused(tmp_path, backbone):
    other = {
        "resnet18": "test_resnet",
        "mobilenetv3_small_050": "mobilenetv3_small_075",
        "convnext_atto": "convnext_femto",
    }[backbone]
    state = timm.create_model(other).state_dict()
    with pytest.raises(InputError, match="of another architecture"):
        load_backbone_weights(built("lraspp", backbone), save(tmp_path, state))


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_truncated_and_missing_files_are_refused(tmp_path, form):
    network = built("lraspp", "resnet18")
    path = save(tmp_path, {"conv1.weight": torch.randn(64, 3, 7, 7)}, form)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot be read") as caught:
        load_backbone_weights(network, path)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match="not found"):
        load_backbone_weights(network, path)


def test_code_in_a_file_does_not_run(tmp_path):
    path = save(tmp_path, classifier("resnet18") | {"code": Code(tmp_path / "made")})
    with pytest.raises(InputError, match="more than tensors"):
        load_backbone_weights(built("lraspp", "resnet18"), path)
    assert not (tmp_path / "made").exists()


def test_timms_own_weights_come_through_its_loader(monkeypatch):
    network = built("lraspp", "resnet18")
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf",
        lambda *source, **options: dict(classifier("resnet18")),
    )
    report = load_backbone_weights(network, "timm")
    assert (report.loaded, report.missing) == (100, [])
    for name, tensor in counters_aside(network.backbone.net.state_dict()).items():
        assert torch.equal(tensor, classifier("resnet18")[name])


def test_without_a_network_one_line_says_so(monkeypatch):
    def unreachable(*source: object, **options: object) -> None:
        raise OSError("no connection\nand more")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(InputError, match=r"--weights timm.*no connection.*give a file") as caught:
        load_backbone_weights(built("lraspp", "resnet18"), "timm")
    assert "\n" not in str(caught.value)
