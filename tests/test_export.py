"""Exported files against `Predictor`: every head and kind of backbone in both formats."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from data_folders import write_image, write_mask
from PIL import Image
from torch import Tensor, nn

import cac_fast.train
from cac_fast.train import checkpoint, export, exporting
from cac_fast.train.errors import InputError
from cac_fast.train.exportable import Exportable, PoolByProducts
from cac_fast.train.inference import Predictor
from cac_fast.train.networks import build_network, upsample_logits
from cac_fast.train.networks.segmenter import DilatedConv2d
from cac_fast.train.networks.upsampled import conv_of_upsampled

onnxruntime = pytest.importorskip("onnxruntime")

CLASSES = ("road", "blue sky", "car", "tree", "größe")
PALETTE = [[128, 64, 128], [70, 130, 180], [0, 0, 142], [0, 90, 0], [1, 2, 3]]
CASES = {
    "onnx": [
        ("logits", "deeplabv3plus", "resnet18"),
        ("labels", "lraspp", "vgg16_bn"),
        ("logits", "lraspp", "mobilenet_v2"),
        ("logits", "pspnet", "timm/test_resnet"),
        ("labels", "pspnet", "vgg16_bn"),
        ("labels", "deeplabv3plus", "mobilenet_v2"),
    ],
    "torch": [
        ("labels", "deeplabv3plus", "vgg16_bn"),
        ("logits", "pspnet", "mobilenet_v2"),
        ("logits", "deeplabv3plus", "timm/resnet18"),
        ("logits", "lraspp", "resnet18"),
        ("labels", "pspnet", "resnet18"),
    ],
}
SIZES = [(3, 97, 61), (1, 9, 9), (2, 40, 72), (1, 20, 170)]
ONLY_IN_TRAINING = "projector", "weak.classifier.1", "teacher"


class Exported(NamedTuple):
    """A file, how it came to be, and what it is to be equal to."""

    file: Path
    format: str
    result: str
    network: str
    backbone: str
    printed: str
    predictor: Predictor
    run: exporting.Graph


def opened(file: Path, kind: str, result: str) -> exporting.Graph:
    """What gives the file's result as its user gets it."""
    if kind == "torch":
        return torch.export.load(file).module()
    session = onnxruntime.InferenceSession(file)
    return lambda batch: torch.from_numpy(session.run([result], {"image": batch.numpy()})[0])


def calibrated(network: str, backbone: str) -> nn.Module:
    """Random weights, batch norms that have seen images: untrained ones would shrink all to 0."""
    torch.manual_seed(0)
    net = build_network(network, backbone, len(CLASSES), dropout=False).train()
    with torch.no_grad():
        for _ in range(4):
            net(torch.randn(2, 3, 64, 64))
        net.classifier[1].weight.mul_(10)
    return net.eval()


def write_run(folder: Path, network: str, backbone: str) -> Path:
    """A run's last.pt, with what training keeps beside the network."""
    net = calibrated(network, backbone)
    beside = {f"{name}.weight": torch.ones(2) for name in ONLY_IN_TRAINING}
    state = {
        "network": net.state_dict(),
        "backbone": net.backbone.description(),
        "method": beside,
        "config": {"network": network, "backbone": backbone},
        "classes": list(CLASSES),
        "palette": PALETTE,
        "iteration": 3,
        "best": None,
    }
    folder.mkdir()
    checkpoint.write(folder / "last.pt", state)
    return folder


def images(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    colors = torch.rand(batch, 3, 1 + height // 8, 1 + width // 8, generator=generator)
    return (255 * nn.functional.interpolate(colors, (height, width))).to(torch.uint8)


@pytest.fixture(
    scope="module",
    params=[(kind, *case) for kind, cases in CASES.items() for case in cases],
    ids="-".join,
)
def exported(request, tmp_path_factory) -> Exported:
    kind, result, network, backbone = request.param
    folder = tmp_path_factory.mktemp("exported")
    run = write_run(folder / "run", network, backbone)
    photo, file = folder / "photo.png", folder / "file" / "net"
    Image.fromarray(images(1, 45, 70)[0].permute(1, 2, 0).numpy()).save(photo)
    file.parent.mkdir()
    options = ["--checkpoint", run, "--format", kind, "--output", file, "--image", photo]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *texts, **_: printed.extend(texts))
        code = export.main([str(option) for option in [*options, "--result", result]])
    text = " ".join(map(str, printed))
    assert code == 0, text
    predictor = cac_fast.train.load(run)
    graph = opened(file, kind, result)
    return Exported(file, kind, result, network, backbone, text, predictor, graph)


# --- files ----------------------------------------------------------------------------------


def test_equals_the_predictor_at_every_size(exported):
    for size in SIZES:
        batch = images(*size)
        expected = torch.stack([exported.predictor.logits(image) for image in batch])
        assert expected.std() > 0.1
        found = exported.run(batch)
        if exported.result == "logits":
            assert (found.dtype, found.shape) == (torch.float32, expected.shape)
            largest = expected.abs().max()
            assert (found - expected).abs().max() < 1e-4 * largest, size
        else:
            assert (found.dtype, found.shape) == (torch.uint8, (size[0], *size[1:]))
            labels = np.stack([exported.predictor.predict(image) for image in batch])
            assert (found.numpy() == labels).mean() >= 0.999, size
            assert len(np.unique(labels)) > 1 or size[1] == 9


def test_holds_what_its_user_needs_to_know(exported):
    if exported.format == "torch":
        files = {"cac_fast.json": ""}
        torch.export.load(exported.file, extra_files=files)
        text = files["cac_fast.json"]
    else:
        session = onnxruntime.InferenceSession(exported.file)
        text = session.get_modelmeta().custom_metadata_map["cac_fast"]
        (image,), (result,) = session.get_inputs(), session.get_outputs()
        assert (image.name, image.type) == ("image", "tensor(uint8)")
        assert image.shape == ["batch", 3, "height", "width"]
        assert result.name == exported.result
    about = json.loads(text)
    half = exported.backbone == "timm/test_resnet"
    assert about["mean"] == pytest.approx([0.5] * 3 if half else [0.485, 0.456, 0.406])
    assert about["std"] == pytest.approx([0.5] * 3 if half else [0.229, 0.224, 0.225])
    assert about["classes"] == list(CLASSES)
    assert about["palette"] == PALETTE
    assert about["ignore"] == 255
    assert about["result"] == exported.result
    assert (about["network"], about["backbone"]) == (exported.network, exported.backbone)
    assert about["version"] == cac_fast.__version__
    assert about["commit"] is None or len(about["commit"].removesuffix("-dirty")) == 40


def test_is_one_file_without_what_only_training_needs(exported):
    assert list(exported.file.parent.iterdir()) == [exported.file]
    content = exported.file.read_bytes()
    assert b"classifier" in content
    for name in (*ONLY_IN_TRAINING, str(Path(exporting.__file__).parent)):
        assert name.encode() not in content
    assert str(exported.file) in exported.printed
    assert "pixels have another label" in exported.printed


# --- the graph, before it is exported -------------------------------------------------------


class Conv(nn.Module):
    """The smallest network: one convolution."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Branching(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class Parts(nn.Module):
    """What heads are made of and exporters do not take as it is, on maps at 1/4 and 1/8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shrink = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        self.dilated = DilatedConv2d(8, 8, 6)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.weight = nn.Parameter(torch.randn(3, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        high = self.dilated(self.shrink(x))
        size = [-(-side // 4) for side in x.shape[-2:]]
        bins = conv_of_upsampled(self.pool(high), self.weight, size, align_corners=False)
        finer = conv_of_upsampled(high, self.weight, size, align_corners=True)
        return upsample_logits(bins + finer, x.shape[-2:])


def predictor_of(network: nn.Module, classes: int = 3) -> Predictor:
    palette = [(index % 256, 0, 0) for index in range(classes)]
    return Predictor(network, [str(index) for index in range(classes)], palette).eval()


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (9, 33), (32, 64), (17, 16), (61, 99), (40, 9)])
@pytest.mark.parametrize("multiple", [8, 16])
def test_pads_as_the_predictor_does(size, multiple):
    predictor = predictor_of(Conv(3))
    predictor.multiple = multiple
    batch = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    expected = torch.stack([predictor.logits(image) for image in batch])
    with torch.no_grad():
        found = Exportable(predictor, "logits")(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("classes", "dtype"), [(255, torch.uint8), (300, torch.int32)])
def test_labels_are_wide_enough(classes, dtype):
    predictor = predictor_of(Conv(classes), classes)
    with torch.no_grad():
        predictor.network.conv.bias[-1] = 100
        labels = Exportable(predictor, "labels")(torch.zeros(1, 3, 8, 9, dtype=torch.uint8))
    assert (labels.dtype, labels.shape) == (dtype, (1, 8, 9))
    assert (labels == classes - 1).all()


@pytest.mark.parametrize("kind", exporting.FORMATS)
def test_what_heads_are_made_of_is_the_same_in_the_file(kind, tmp_path):
    small = images(1, 9, 47)[0]
    found = exporting.export(
        predictor_of(Parts()), {"result": "logits"}, tmp_path / "net", kind, [small]
    )
    assert found.is_rounding, found


def test_convolutions_of_upsampled_maps_are_plain_operators_in_a_file():
    sizes = {"x": {2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}}
    options = {"dynamic_shapes": sizes, "prefer_deferred_runtime_asserts_over_guards": True}
    program = torch.export.export(Parts(), (torch.zeros(1, 3, 61, 99),), **options)
    operators = [str(node.target) for node in program.graph.nodes]
    assert operators.count("aten.conv2d.default") == 4
    assert not any("matmul" in name or "unfold" in name for name in operators)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(6, 12), (5, 7), (13, 41), (4, 4), (1, 3), (2, 6)])
def test_pools_by_products_are_adaptive_means(bins, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = nn.AdaptiveAvgPool2d(bins)(x)
    torch.testing.assert_close(PoolByProducts(bins)(x), expected, rtol=0, atol=1e-14)


# --- the check ------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, graph: exporting.Graph) -> None:
    """Let exports write nothing but a name, and read it as `graph`."""

    def write(predictor: Predictor, about: dict, path: Path) -> None:
        path.write_text("a graph")

    monkeypatch.setitem(exporting._KINDS, "torch", (write, lambda path: graph))


def shifted(by: float, result: str, where: int = 0):
    """A graph of `Conv` whose logits of class 0 are off in one column, by a part of the largest."""

    def run(batch: Tensor) -> Tensor:
        logits = torch.stack([PREDICTOR.logits(image) for image in batch])
        logits[:, 0, :, where] += by * logits.abs().max()
        return logits if result == "logits" else logits.argmax(1).to(torch.uint8)

    return run


torch.manual_seed(0)
PREDICTOR = predictor_of(Conv(3))


@pytest.mark.parametrize(
    ("by", "result", "is_rounding"),
    [
        (0.0, "logits", True),
        (5e-5, "logits", True),
        (3e-4, "logits", False),
        (float("nan"), "logits", False),
        (0.0, "labels", True),
        (1e-5, "labels", True),
        (2.0, "labels", False),
    ],
)
def test_a_difference_is_noticed_and_leaves_no_file(by, result, is_rounding, monkeypatch, tmp_path):
    pretend(monkeypatch, shifted(by, result))
    found = exporting.export(PREDICTOR, {"result": result}, tmp_path / "net", "torch")
    assert found.is_rounding == is_rounding
    assert [path.name for path in tmp_path.iterdir()] == (["net"] if is_rounding else [])


def test_one_wrong_size_is_enough(monkeypatch, tmp_path):
    """At the smallest size alone, which has a hundredth of the pixels."""

    def run(batch: Tensor) -> Tensor:
        return shifted(2.0 if batch.shape[2] < 32 else 0.0, "labels")(batch)

    pretend(monkeypatch, run)
    assert not exporting.export(
        PREDICTOR, {"result": "labels"}, tmp_path / "net", "torch"
    ).is_rounding


def test_a_file_that_fails_at_a_size_is_none(monkeypatch, tmp_path, capfd):
    def run(batch: Tensor) -> Tensor:
        if batch.shape[2] == 205:
            raise ValueError("Dim 2 is 64\nand more")
        return shifted(0.0, "labels")(batch)

    pretend(monkeypatch, run)
    found = exporting.export(PREDICTOR, {"result": "labels"}, tmp_path / "net", "torch")
    assert not found.is_rounding and list(tmp_path.iterdir()) == []
    (line,) = capfd.readouterr().err.splitlines()
    assert "fails on images (1, 3, 205, 331): ValueError: Dim 2 is 64" in line


def test_what_the_predictor_is_given_is_compared_too(monkeypatch, tmp_path):
    def run(batch: Tensor) -> Tensor:
        return shifted(2.0 if batch.shape[2] == 50 else 0.0, "logits")(batch)

    pretend(monkeypatch, run)
    about, image = {"result": "logits"}, images(1, 50, 60)[0]
    assert exporting.export(PREDICTOR, about, tmp_path / "net", "torch").is_rounding
    assert not exporting.export(PREDICTOR, about, tmp_path / "net", "torch", [image]).is_rounding


def test_an_image_of_the_run_is_compared_unless_one_is_named(monkeypatch, tmp_path, capsys):
    data, shown = tmp_path / "data", []
    write_image(data / "images/val/a.png", 30, 1100)
    write_image(data / "images/train/b.png", 20, 24)
    write_mask(data / "masks/train/b.png", 20, 24)
    (data / "classes.txt").write_text("0 a 0 0 0\n1 b 9 9 9\n2 c 99 9 9\n")

    def exported(predictor, about, output, kind, pixels):
        shown.append([tuple(image.shape) for image in pixels])
        output.touch()
        return exporting.Difference(0.0, 0, 0, 1)

    monkeypatch.setattr(export, "export", exported)
    run = write_run(tmp_path / "run", "lraspp", "mobilenet_v2")
    state = checkpoint.read(run / "last.pt")
    words = ["--checkpoint", str(run), "--format", "torch", "--output", str(tmp_path / "net")]

    def printed(*more, **settings) -> str:
        state["config"] |= settings
        checkpoint.write(run / "last.pt", state)
        assert export.main([*words, *more]) == 0
        return capsys.readouterr().out

    assert "made-up images alone (--image FILE" in printed()
    own = {"dataset": "folder", "data_dir": str(data)}
    assert str(data / "images/val/a.png") in printed(**own)
    assert "b.png" in printed("--image", str(data / "images/train/b.png"))
    (data / "images/val/a.png").unlink()
    assert "b.png" in printed()
    (data / "images/train/b.png").write_bytes(b"no image")
    assert "made-up images alone" in printed()
    assert "made-up images alone" in printed(dataset="json:loads")
    with monkeypatch.context() as patch:  # a folder that may not be entered
        patch.setattr(Path, "is_dir", refuse)
        assert "made-up images alone" in printed(**own)
    gone = tmp_path / "gone"  # where the toy city would be drawn
    assert "made-up images alone" in printed(dataset="toycity", data_dir=str(gone))
    assert not gone.exists()
    assert shown == [[], [(3, 30, 1024)], [(3, 20, 24)], [(3, 20, 24)], *[[]] * 4]


def refuse(path: Path) -> bool:
    if path.name == "data":
        raise PermissionError(path)
    return os.path.isdir(path)


def test_the_command_ends_with_1_and_keeps_a_former_file(monkeypatch, tmp_path, capsys):
    run = write_run(tmp_path / "run", "lraspp", "mobilenet_v2")
    pretend(monkeypatch, lambda batch: torch.zeros(len(batch), *batch.shape[2:]))
    (tmp_path / "net").write_text("a former export")
    options = f"--checkpoint {run} --format torch --output {tmp_path / 'net'}"
    assert export.main(options.split()) == 1
    assert "is not the network: " in capsys.readouterr().err
    assert (tmp_path / "net").read_text() == "a former export"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "run"]


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_extra_one_line_says_how_to_install_it(package, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    options = f"--checkpoint {tmp_path} --format onnx --output {tmp_path / 'net'}"
    assert export.main(options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"needs {package} " in line and "cac_fast[export]" in line
    exporting.check_packages("torch")


@pytest.mark.parametrize("kind", exporting.FORMATS)
def test_a_network_that_branches_on_values_is_refused_in_one_line(kind, tmp_path):
    with pytest.raises(InputError, match="cannot be exported for every size") as caught:
        exporting.export(predictor_of(Branching(3)), {"result": "logits"}, tmp_path / "net", kind)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_is_refused_in_one_line(monkeypatch, tmp_path):
    def save(*arguments: object, **more: object) -> None:
        raise ValueError("node ceil\nand more")

    monkeypatch.setattr(torch.export, "save", save)
    with pytest.raises(InputError, match="ValueError: node ceil") as caught:
        exporting.export(PREDICTOR, {"result": "logits"}, tmp_path / "net", "torch")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_and_a_run_that_is_not_there(tmp_path, capsys):
    for run, file in (("none", tmp_path / "net"), (tmp_path, tmp_path / "none" / "net")):
        assert export.main(f"--checkpoint {run} --format torch --output {file}".split()) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
