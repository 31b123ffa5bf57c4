"""Batch statistics of images without masks: their numbers, what they mend, and the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_training
import torch
from data_folders import one_line
from PIL import Image
from tiny_scenes import scene, write_scenes
from torch import Tensor, nn

from cac_fast.train import adapt, adaptation, checkpoint, load
from cac_fast.train.config import Config
from cac_fast.train.errors import InputError
from cac_fast.train.inference import Predictor
from cac_fast.train.preprocessing import IMAGENET_MEAN

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("adapt") / "data", {"train": (4, 3), "val": (2, 0)})


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A run of a few steps on bright scenes."""
    run = data.with_name("run")
    small_training.run(data, run, "--method", "supervised", "--iterations", "40")
    return run


@pytest.fixture(autouse=True)
def few_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (adapt, adaptation):
        monkeypatch.setattr(module, "CROPS", 24)


def config() -> Config:
    return Config.of(crop_size=32)


def write_images(folder: Path, contrast: float, count: int = 12) -> list[Path]:
    """Scenes whose values are drawn towards the mean that normalization subtracts."""
    folder.mkdir()
    rng, mean = np.random.default_rng(3), 255 * np.array(IMAGENET_MEAN)
    paths = [folder / f"{index:02d}.png" for index in range(count)]
    for path in paths:
        image = mean + contrast * (scene(rng, 48, 56)[0] - mean)
        Image.fromarray(image.round().astype(np.uint8)).save(path)
    return paths


def normalized(predictor: Predictor, crops: Tensor) -> Tensor:
    return (crops.float() / 255 - predictor.mean) / predictor.std


def test_statistics_are_the_means_of_the_batches(trained: Path, data: Path) -> None:
    predictor = load(trained)
    crops = list(adaptation.unlabeled_crops(config(), sorted(data.glob("images/train/*"))))
    assert [tuple(batch.shape) for batch in crops] == [(8, 3, 32, 32)] * 3
    adapted = adaptation.with_statistics_of(predictor, crops)
    assert not any(module.training for module in adapted.modules())
    layers = {n: m for n, m in predictor.network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    reference = load(trained).network.double().train()
    for name, layer in reference.named_modules():
        if name in layers:
            layer.register_forward_pre_hook(
                lambda _, x, name=name: seen[name].append(x[0].detach())
            )
    for batch in crops:
        reference(normalized(predictor, batch).double())
    for name, layer in adapted.network.named_modules():
        if name in layers:
            means = torch.stack([x.mean((0, 2, 3)) for x in seen[name]]).mean(0)
            variances = torch.stack([x.var((0, 2, 3)) for x in seen[name]]).mean(0)
            torch.testing.assert_close(layer.running_mean.double(), means, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(layer.running_var.double(), variances, rtol=1e-3, atol=1e-4)
    # The network that was given is as it was, and no weight is another one.
    own = load(trained).network.state_dict()
    for name, value in predictor.network.state_dict().items():
        assert value.equal(own[name])
    new = adapted.network.state_dict()
    changed = {name for name in own if not own[name].equal(new[name])}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"running_mean", "running_var", "num_batches_tracked"}


def test_a_change_of_contrast_changes_nothing_behind_new_statistics(
    trained: Path, tmp_path: Path
) -> None:
    predictor = load(trained)
    labels, plain = [], []
    for contrast in (1.0, 0.4):
        paths = write_images(tmp_path / f"{contrast}", contrast)
        crops = adaptation.unlabeled_crops(config(), paths)
        adapted = adaptation.with_statistics_of(predictor, crops)
        labels.append(np.stack(adapted.predict(paths)))
        plain.append(np.stack(predictor.predict(paths)))
    agreement = np.mean(labels[0] == labels[1])
    assert agreement > 0.97
    assert agreement > np.mean(plain[0] == plain[1]) + 0.02
    assert len(np.unique(labels[0])) > 1


def test_crops_are_of_all_images_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each image has a color of its own, and one cannot be read."""
    paths = [tmp_path / f"{index}.png" for index in range(7)]
    for index, path in enumerate(paths):
        Image.new("RGB", (40, 40), (10 * index, 0, 0)).save(path)
    paths[3].write_bytes(b"no image")
    transform_of = Config.of(crop_size=32, unlabeled_scale=(1.0, 1.0))
    steps: list[tuple[int, int]] = []
    crops = torch.cat(
        list(adaptation.unlabeled_crops(transform_of, paths, lambda *at: steps.append(at)))
    )
    reds, counts = np.unique(crops[:, 0].amax((1, 2)).numpy(), return_counts=True)
    assert reds.tolist() == [0, 10, 20, 40, 50, 60] and counts.tolist() == [4] * 6
    assert steps == [(done, 24) for done in range(1, 25)]
    assert capsys.readouterr().err.count("skipped: ") == 1
    again = torch.cat(list(adaptation.unlabeled_crops(transform_of, paths[::-1])))
    assert again.equal(crops)
    with pytest.raises(InputError) as error:
        list(adaptation.unlabeled_crops(transform_of, paths[3:4]))
    one_line(error, "none of the 1 images", "give others")


def predictor_of(network: nn.Module) -> Predictor:
    return Predictor(network, ("a", "b"), [(0, 0, 0)] * 2).eval()


class Own(nn.Module):
    """As from outside the project: dropout of its own, batch norm that stays in eval mode, and
    batch norm that no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.dropout = nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5)
        self.behind, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.unused.running_mean.fill_(5)

    def train(self, mode: bool = True) -> Own:
        super().train(mode)
        self.still.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.dropout(self.still(x)))


def test_batch_norm_alone_is_in_training() -> None:
    crops = [torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8) for _ in range(3)]
    predictor = predictor_of(Own())
    network = adaptation.with_statistics_of(predictor, crops).network
    x = torch.stack([normalized(predictor, batch) for batch in crops])
    mean, variance = x.mean((0, 1, 3, 4)), x.transpose(1, 2).flatten(2).var(2).mean(0)
    torch.testing.assert_close(network.still.running_mean, mean)
    torch.testing.assert_close(network.still.running_var, variance)
    torch.testing.assert_close(network.behind.running_var, torch.ones(3), rtol=1e-3, atol=1e-3)
    assert network.unused.running_mean.tolist() == [5] * 3 and network.still.momentum == 0.3


def test_a_network_without_batch_norm_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    for one in (network, network[0], nn.Sequential()):
        with pytest.raises(InputError) as error:
            adaptation.with_statistics_of(predictor_of(one), [torch.zeros(8, 3, 4, 4)])
        one_line(error, "no batch norm", "use it as it is")


def test_the_copy_takes_the_place_of_the_checkpoint(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, given = tmp_path / "own.pt", tmp_path / "given.pt"
    words = ["--checkpoint", str(trained / "last.pt"), "--device", "cpu", "--output"]
    assert adapt.main([*words, str(own)]) == 0
    assert capsys.readouterr().out == f"{own}: batch statistics of 24 crops drawn from 3 images\n"
    images = [str(data / f"images/train/{index:02d}.png") for index in (6, 4, 5)]  # without masks
    assert adapt.main([*words, str(given), "--images", *images]) == 0
    one, other, source = (checkpoint.read(path) for path in (own, given, trained / "best.pt"))
    assert one.keys() == source.keys() - {"best"}  # that is another network's score
    assert one["iteration"] == 40 and one["config"] == source["config"]
    expected = adaptation.with_statistics_of(
        load(trained / "last.pt"), adaptation.unlabeled_crops(config(), [Path(p) for p in images])
    )
    for name, value in expected.network.state_dict().items():
        assert one["network"][name].equal(value) and other["network"][name].equal(value)
    # An older copy may be written anew; a setting of a newer version is passed over.
    newer = source | {"config": source["config"] | {"of_a_newer_version": 1}}
    checkpoint.write(there := tmp_path / "newer.pt", newer)
    again = ["--checkpoint", str(there), "--device", "cpu", "--output", str(given)]
    assert adapt.main([*again, "--images", *images]) == 0
    photo = data / "images/val/00.png"
    assert (load(own).predict(photo) == expected.predict(photo)).all()


def test_bad_input_is_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    def error(checkpoint: Path, output: Path, *more: object) -> str:
        words = ["--checkpoint", checkpoint, "--output", output, "--device", "cpu", *more]
        assert adapt.main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    before = [(trained / name).read_bytes() for name in ("best.pt", "last.pt")]
    new = tmp_path / "new.pt"
    assert "would overwrite a run's own state" in error(trained, trained / "last.pt")
    assert "would overwrite a run's own state" in error(trained / "last.pt", trained / "best.pt")
    (copy := tmp_path / "copy.pt").write_bytes(before[0])
    (link := tmp_path / "link.pt").symlink_to(copy)
    assert "give another file" in error(copy, link)
    assert "folder that exists" in error(trained, tmp_path / "none" / "x.pt")
    assert "does not exist" in error(tmp_path / "none.pt", new)
    assert "is not a folder" in error(trained, new, "--images", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no image was found" in error(trained, new, "--images", tmp_path / "empty")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert "not with torchrun" in error(trained, new)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError

        patch.setattr(adapt, "with_statistics_of", full)
        assert "32 x 32 do not fit in memory" in error(trained, new)
    state = checkpoint.read(trained / "best.pt")
    moved = tmp_path / "moved.pt"
    checkpoint.write(moved, state | {"config": state["config"] | {"data_dir": "gone"}})
    message = error(moved, new)
    assert "unlabeled images" in message and "gone" in message and "give --images" in message
    # A name in a file is not to choose among all functions that Python finds.
    checkpoint.write(moved, state | {"config": state["config"] | {"dataset": "os:getcwd"}})
    assert "os:getcwd" in (message := error(moved, new)) and "give --images" in message
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 40)).save(photo)
    content = photo.read_bytes()
    assert "is no checkpoint and would be overwritten" in error(trained, photo, "--images", photo)
    assert photo.read_bytes() == content
    (other := tmp_path / "other.pt").write_bytes(before[1])
    assert "goes on from" in error(trained, other)
    assert other.read_bytes() == before[1]
    assert not new.exists()
    assert before == [(trained / name).read_bytes() for name in ("best.pt", "last.pt")]


def test_help_names_what_is_taken_without_images() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "train/adapt.py", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "the unlabeled images that the run was given" in " ".join(
        done.stdout.split()
    )
