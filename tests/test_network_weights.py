"""Loading ImageNet weights of a torchvision classifier into a backbone."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
import torchvision

from cac_fast.train.errors import InputError
from cac_fast.train.networks import Segmenter, build_network, load_backbone_weights
from cac_fast.train.registry import NETWORKS

CLASSES = 5
NAMES = ("weight", "bias")
HEADS = ("fc.", "classifier.", "features.18.")
DATA = Path(os.environ.get("CAC_FAST_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))


@functools.cache
def classifier(backbone: str) -> dict:
    """The state_dict of torchvision's network, every tensor random."""
    torch.manual_seed(1)
    state = torchvision.models.get_model(backbone, weights=None).state_dict()
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in state.items()
    }


@functools.cache
def built(network: str, backbone: str) -> Segmenter:
    """A network for the tests that do not change it, or set what they change."""
    return build_network(network, backbone, CLASSES)


def save(tmp_path: Path, content: object, **options) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(content, path, **options)
    return path


def assert_loaded(net: Segmenter, backbone: str) -> None:
    for name, tensor in net.backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, classifier(backbone)[name])


def old_names(state: dict) -> dict:
    return {name: value for name, value in state.items() if "num_batches_tracked" not in name}


FORMS = {
    "new names": lambda state: state,
    "old names": old_names,
    "DDP": lambda state: {f"module.{name}": value for name, value in state.items()},
    "state_dict": lambda state: {"epoch": 90, "arch": "any", "state_dict": state},
    "empty average": lambda state: {"ema": {"decay": 0.9, "of": {}}, "state_dict": state},
    "model_state_dict": lambda state: {
        "model_state_dict": {f"_orig_mod.backbone.{name}": value for name, value in state.items()}
    },
    "model": lambda state: {"model": {f"module.{name}": v for name, v in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("backbone", "loaded", "skipped"),
    [
        ("resnet18", 100, ["fc.weight", "fc.bias"]),
        ("mobilenet_v2", 255, None),
        ("mobilenet_v3_large", 262, [f"classifier.{i}.{n}" for i in (0, 3) for n in NAMES]),
    ],
)
def test_loads_torchvision_files(tmp_path, form, backbone, loaded, skipped):
    net = built("deeplabv3plus", backbone)
    for tensor in net.backbone.state_dict().values():
        tensor.zero_()
    head = [p.clone() for p in net.head.parameters()]
    report = load_backbone_weights(net, save(tmp_path, FORMS[form](classifier(backbone))))
    assert_loaded(net, backbone)
    assert all(map(torch.equal, head, net.head.parameters()))
    assert report.loaded == loaded
    assert report.missing == []
    assert all(name.startswith(HEADS) for name in report.skipped)
    assert skipped is None or report.skipped == skipped


def test_loads_half_precision_and_the_legacy_format(tmp_path):
    state = {name: value.half() for name, value in classifier("resnet18").items()}
    net = build_network("pspnet", "resnet18", CLASSES)
    path = save(tmp_path, state, _use_new_zipfile_serialization=False)
    load_backbone_weights(net, path)
    weight = net.backbone.layer4[0].conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["layer4.0.conv1.weight"].float())


def test_report_says_what_was_skipped_and_missing(tmp_path):
    state = old_names(classifier("resnet18"))
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    del state["bn1.bias"]
    net = build_network("pspnet", "resnet18", CLASSES)
    report = load_backbone_weights(net, save(tmp_path, state))
    assert report.loaded == 98
    assert report.skipped == ["conv1.weight", "fc.weight", "fc.bias"]
    assert report.missing == ["conv1.weight", "bn1.bias"]
    assert str(report) == (
        "loaded 98 tensors into the backbone, skipped 3 (conv1.weight, fc.weight, fc.bias), "
        "missing 2 (conv1.weight, bn1.bias)"
    )


@pytest.mark.parametrize(
    ("backbone", "other"),
    [
        ("resnet18", "mobilenet_v2"),
        ("mobilenet_v2", "resnet18"),
        ("mobilenet_v2", "mobilenet_v3_large"),
        ("mobilenet_v3_large", "mobilenet_v2"),
        ("resnet50", "resnet18"),
        ("resnet50", "resnet101"),
        ("resnet101", "resnet50"),
    ],
)
def test_another_architecture_is_an_input_error(tmp_path, backbone, other):
    net = built("deeplabv3plus", backbone)
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    path = save(tmp_path, classifier(other))
    with pytest.raises(InputError, match=r"weights\.pth' is of another architecture"):
        load_backbone_weights(net, path)
    assert all(torch.equal(value, before[n]) for n, value in net.backbone.state_dict().items())


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file_is_an_input_error(tmp_path, keep, legacy):
    state = {"conv1.weight": torch.randn(64, 3, 7, 7), "bn1.weight": torch.randn(64)}
    path = save(tmp_path, state, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(InputError, match=r"weights\.pth' cannot be read .* truncated") as caught:
        load_backbone_weights(built("pspnet", "resnet18"), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Path("x"), "more than tensors"),
        ([torch.zeros(1)], "holds a list"),
        ({}, "another architecture"),
        ({"epoch": 3}, "another architecture"),
    ],
)
def test_other_content_is_an_input_error(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load_backbone_weights(built("pspnet", "resnet18"), save(tmp_path, content))


def test_a_missing_file_is_an_input_error(tmp_path):
    net = built("pspnet", "resnet18")
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(InputError, match="not found"):
            load_backbone_weights(net, path)


@pytest.mark.skipif(not DATA.is_dir(), reason="no test data")
@pytest.mark.parametrize("network", NETWORKS.names)
def test_loads_the_real_mobilenet_v2_file(network):
    path = DATA / "weights/mobilenetv2-imagenet-fp16.pth"
    net = build_network(network, "mobilenet_v2", CLASSES)
    report = load_backbone_weights(net, path)
    assert (report.loaded, len(report.skipped), report.missing) == (255, 7, [])
    state = torch.load(path, weights_only=True)
    loaded = net.backbone.state_dict()["features.17.conv.1.0.weight"]
    assert torch.equal(loaded, state["features.17.conv.1.0.weight"].float())
