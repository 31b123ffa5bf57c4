"""timm's encoders: three small ones with random weights, at both output strides."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from small_training import CPU, arguments, assert_same_bits, run, weights
from timm_encoders import CHANNELS, CLASSES, built, counters_aside, every_backbone
from torch import nn

import cac_fast.train
from cac_fast.train import checkpoint, config, engine
from cac_fast.train.errors import InputError
from cac_fast.train.inference import pad_image
from cac_fast.train.networks import (
    NETWORKS,
    Segmenter,
    build_network,
    load_backbone_weights,
    synchronize_batch_norm,
)
from cac_fast.train.networks.backbones import build_backbone
from cac_fast.train.networks.encoder import Encoder
from cac_fast.train.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

timm = pytest.importorskip("timm")

STRIDES = {"deeplabv3plus": (16, 4), "lraspp": (16, 8), "pspnet": (8, 4)}

every_network = pytest.mark.parametrize("network", NETWORKS.names)


# --- shapes ---------------------------------------------------------------------------------


@every_backbone
@pytest.mark.parametrize(("output_stride", "low_stride"), STRIDES.values())
@torch.no_grad()
def test_maps_have_the_strides_and_channels_that_were_asked_for(
    backbone, output_stride, low_stride
):
    encoder = build_backbone(f"timm/{backbone}", output_stride, low_stride).eval()
    low_channels, high_channels = CHANNELS[backbone]
    rounds_down = backbone == "convnext_atto" and output_stride == 16
    multiple = encoder.preprocessing.multiple
    assert multiple == (16 if rounds_down else 8)
    for height, width in ((5 * multiple, 3 * multiple), (2 * multiple, 7 * multiple)):
        low, high = encoder(torch.randn(2, 3, height, width))
        for found, channels, stride in (
            (low, low_channels[low_stride], low_stride),
            (high, high_channels, output_stride),
        ):
            assert found.shape == (2, channels, -(-height // stride), -(-width // stride))
    assert (encoder.low_channels, encoder.high_channels) == (low.shape[1], high.shape[1])


def test_low_level_map_is_found_by_its_stride():
    """ConvNeXt has no map at 1/2, so that 1/4 is its first."""
    assert built("deeplabv3plus", "convnext_atto").backbone.options["out_indices"] == (0, -1)
    assert built("deeplabv3plus", "resnet18").backbone.options["out_indices"] == (1, -1)
    assert built("lraspp", "resnet18").backbone.options["out_indices"] == (2, -1)


@every_network
@every_backbone
def test_one_step_gives_every_parameter_a_gradient(network, backbone):
    """A parameter without one would stall DDP."""
    net = built(network, backbone).train()
    net.zero_grad()
    logits = net(torch.randn(2, 3, 32, 48))
    assert logits.shape == (2, CLASSES, 32, 48)
    F.cross_entropy(logits, torch.randint(CLASSES, (2, 32, 48))).backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert dead == []
    assert next(net.backbone.parameters()).grad.abs().sum() > 0


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"'timm/resnet81', did you mean timm/resnet18 "),
        ("resnet18.a1_in2k", r"did you mean timm/resnet18\.a1_in1k "),
        ("hf-hub:some/one", r"'timm/hf-hub:some/one': timm\.list_models\(\)"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InputError, match=message):
        build_backbone(f"timm/{name}", 16, 4)


# No such argument, an assertion without text, one with, one size only, another rounding.
@pytest.mark.parametrize(
    "name", ["densenet121", "starnet_s1", "ghostnet_100", "botnet26t_256", "mobilevitv2_050"]
)
def test_families_without_the_stride_have_one_error(name):
    message = rf"timm/{name} has no output stride 8 .* in timm {timm.__version__}; families .*resn"
    with pytest.raises(InputError, match=message) as caught:
        build_backbone(f"timm/{name}", 8, 4)
    assert "\n" not in str(caught.value)


def test_without_timm_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm/\.\.\. needs timm .*pip install timm") as caught:
        build_backbone("timm/resnet18", 16, 4)
    assert "\n" not in str(caught.value)


def test_settings_take_any_name_of_timm_and_say_so(folder_data, tmp_path):
    settings = ["--dataset", "folder", "--data-dir", str(folder_data)]
    parsed = config.parse([*settings, "--backbone", "timm/resnet18"])
    assert parsed.run_folder.parent == Path("runs")
    for wrong in ("resnet34", "timm"):
        with pytest.raises(InputError, match=r"choose from .*resnet101, timm/NAME"):
            config.parse([*settings, "--backbone", wrong])


# --- training -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CHANNELS)
def trained(request, folder_data, tmp_path_factory) -> tuple[str, list[str], Path, Path]:
    """A backbone, the options of its run, the finished run and one that stopped in the middle."""
    root = tmp_path_factory.mktemp(request.param)
    options = (
        f"--backbone timm/{request.param} --network lraspp --iterations 2 --warmup 1 "
        "--save-every 1 --deterministic"
    ).split()
    write = checkpoint.write

    def copying(path: Path, state: dict) -> None:
        write(path, state)
        if path.name == "last.pt" and state["iteration"] == 1:
            shutil.copytree(path.parent, root / "stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", copying)
        run(folder_data, root / "whole", *options)
    return request.param, options, root / "whole", root / "stopped"


def test_resumed_run_ends_with_the_same_bits(trained, folder_data):
    _, options, whole, stopped = trained
    assert checkpoint.read(stopped / "last.pt")["iteration"] == 1
    run(folder_data, stopped, *options)
    assert checkpoint.read(stopped / "last.pt")["iteration"] == 2
    assert_same_bits(weights(stopped / "last.pt"), weights(whole / "last.pt"))


def test_checkpoint_names_timm_and_how_images_are_made_ready(trained):
    multiple = 16 if trained[0] == "convnext_atto" else 8
    assert checkpoint.read(trained[2] / "best.pt")["backbone"] == {
        "library": f"timm {timm.__version__}",
        "preprocessing": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "multiple": multiple},
    }


def test_predicts_an_image_of_odd_size(trained):
    backbone, _, whole, _ = trained
    predictor = cac_fast.train.load(whole)
    image = np.random.default_rng(0).integers(0, 256, (37, 45, 3), dtype=np.uint8)
    found = predictor.logits(torch.from_numpy(image).permute(2, 0, 1))
    assert found.shape == (CLASSES, 37, 45)
    assert (predictor.predict(Image.fromarray(image)) == found.argmax(0).numpy()).all()

    network = build_network("lraspp", f"timm/{backbone}", CLASSES).eval()
    network.load_state_dict(checkpoint.read(whole / "best.pt")["network"])
    mean, std = (np.array(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    sides = ((0, 11), (0, 3), (0, 0)) if backbone == "convnext_atto" else ((0, 3), (0, 3), (0, 0))
    padded = (np.pad(image, sides, mode="reflect") / 255 - mean) / std
    with torch.no_grad():
        logits = network(torch.from_numpy(padded).float().permute(2, 0, 1)[None])
    torch.testing.assert_close(found, logits[0, :, :37, :45], rtol=1e-4, atol=1e-4)


def test_weights_of_a_run_begin_another(trained):
    backbone, _, whole, _ = trained
    network = build_network("lraspp", f"timm/{backbone}", CLASSES)
    report = load_backbone_weights(network, whole)
    assert (report.target, report.skipped, report.missing) == ("network", [], [])
    expected = checkpoint.read(whole / "best.pt")["network"]
    found = counters_aside(network.state_dict())
    assert_same_bits(found, counters_aside(expected))


@pytest.mark.parametrize("backbone", ["timm/mobilenetv3_small_050", "timm/convnext_atto"])
def test_freeze_bn_meets_norms_that_hold_their_activation(backbone, folder_data, tmp_path):
    options = "--network lraspp --iterations 1 --deterministic --freeze-bn --method supervised"
    run(folder_data, tmp_path / "run", "--backbone", backbone, *options.split())
    state = weights(tmp_path / "run" / "last.pt")
    means = [tensor for name, tensor in state.items() if name.endswith("running_mean")]
    assert means and not any(tensor.any() for tensor in means)


# --- how images are made ready --------------------------------------------------------------


HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 8)


def test_mean_and_std_are_timms_everywhere(folder_data, tmp_path):
    options = "--backbone timm/test_resnet --network lraspp --iterations 1 --method supervised"
    settings = config.parse(arguments(folder_data, tmp_path / "run", *options.split()))
    trainer = engine.Trainer(settings, CPU)
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    batch = {"image": pixels, "label": pixels[:, 0]}
    seen = trainer.stream.to_device(batch)["image"]
    assert torch.equal(seen, torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2))
    trainer.run()
    predictor = cac_fast.train.load(tmp_path / "run")
    assert predictor.network.preprocessing == HALF
    assert predictor.mean.flatten().tolist() == predictor.std.flatten().tolist() == [0.5] * 3


def test_checkpoint_decides_and_another_version_is_a_warning(capfd):
    encoder = build_backbone("timm/test_resnet", 16, 4)
    assert encoder.preprocessing == HALF
    description = encoder.description()
    encoder.adopt(description)
    assert capfd.readouterr().err == ""
    description["library"] = "timm 0.9.0"
    description["preprocessing"]["mean"] = [0.1, 0.2, 0.3]
    encoder.adopt(description)
    assert encoder.preprocessing == HALF._replace(mean=[0.1, 0.2, 0.3])
    assert f"made with timm 0.9.0, here is timm {timm.__version__}" in capfd.readouterr().err
    before = encoder.preprocessing
    encoder.adopt({})
    assert encoder.preprocessing == before


@pytest.mark.parametrize("backbone", ["timm/test_resnet", "resnet18"])
def test_runs_go_on_as_their_checkpoint_says(folder_data, tmp_path, backbone):
    """Not as the installed library does, which may be another one; old checkpoints say nothing."""
    options = f"--backbone {backbone} --network lraspp --iterations 1 --method supervised".split()
    run(folder_data, tmp_path / "run", *options)
    state = checkpoint.read(tmp_path / "run" / "last.pt")
    for mean in ((0.1, 0.2, 0.3), None):
        if mean is None:
            del state["backbone"]
            mean = HALF.mean if backbone.startswith("timm/") else IMAGENET_MEAN
        else:
            state["backbone"]["preprocessing"]["mean"] = mean
        checkpoint.write(tmp_path / "run" / "last.pt", state)
        predictor = cac_fast.train.load(tmp_path / "run" / "last.pt")
        assert predictor.mean.flatten().tolist() == pytest.approx(mean)
        settings = config.parse(arguments(folder_data, tmp_path / "run", *options))
        resumed = engine.Trainer(settings, CPU).stream.mean.flatten() / 255
        assert resumed.tolist() == pytest.approx(mean)


def test_torchvisions_backbones_have_imagenets_values_and_8():
    for backbone in ("resnet18", "mobilenet_v2"):
        encoder = build_backbone(backbone, 16, 4)
        assert isinstance(encoder, Encoder) and encoder.library is None
        assert encoder.preprocessing == (IMAGENET_MEAN, IMAGENET_STD, 8)


def test_crops_are_of_the_backbones_multiple(folder_data, tmp_path):
    options = "--backbone timm/convnext_atto --network lraspp --crop-size 40".split()
    settings = config.parse(arguments(folder_data, tmp_path / "run", *options))
    with pytest.raises(InputError, match=r"--crop-size 40 is not a multiple of 16.* 32 or 48"):
        engine.Trainer(settings, CPU)


def test_images_are_padded_to_the_multiple():
    assert pad_image(torch.rand(1, 3, 37, 72), 16).shape == (1, 3, 48, 80)


# --- norms and recomputation ----------------------------------------------------------------


@pytest.fixture
def alone():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def encoder_and_twin(backbone: str) -> tuple[Encoder, Encoder]:
    twins = [build_backbone(f"timm/{backbone}", 16, 4).double() for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    return twins[0], twins[1]


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_050", "convnext_atto"])
@pytest.mark.parametrize("training", [True, False])
def test_synchronized_norms_keep_their_activation(alone, backbone, training):
    plain, synchronized = encoder_and_twin(backbone)
    synchronize_batch_norm(synchronized, None)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in synchronized.modules())
    plain_norms, kept_norms = (
        sum("LayerNorm" in type(module).__name__ for module in encoder.modules())
        for encoder in (plain, synchronized)
    )
    assert plain_norms == kept_norms
    assert (kept_norms > 0) == (backbone == "convnext_atto")
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    found = []
    for encoder in (plain.train(training), synchronized.train(training)):
        low, high = encoder(x)
        (low.square().sum() + high.square().sum()).backward()
        found.append([low, high, *(p.grad for p in encoder.parameters()), *encoder.buffers()])
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert synchronized.state_dict().keys() == plain.state_dict().keys()


@every_backbone
def test_the_encoder_is_recomputed_as_one_and_nothing_else_changes(backbone):
    found, calls = [], []
    plain, recomputed = encoder_and_twin(backbone)
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    for encoder in (plain, recomputed):
        if encoder is recomputed:
            network = Segmenter(encoder, built("lraspp", "resnet18").head, CLASSES, 0.0)
            network.head.blocks = list
            network.checkpoint_activations()
        encoder.net.register_forward_pre_hook(lambda *_: calls.append(1))
        low, high = encoder(x)
        (low.square().sum() + high.square().sum()).backward()
        found.append([low, high, *(p.grad for p in encoder.parameters()), *encoder.buffers()])
    assert all(map(torch.equal, *found))
    assert len(calls) == 3  # once, then twice
