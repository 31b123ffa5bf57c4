"""The paper's figures: their numbers against closed forms and counts by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import one_line, write_image, write_mask
from PIL import Image
from torch import Tensor, nn

from accuracy import figure_curves, figure_gradcam, figure_runs, figure_sheet, figure_tsne, figures
from accuracy.figure_curves import WITH, WITHOUT
from accuracy.figure_gradcam import Place, grad_cam
from cac_fast.train.batch import Step
from cac_fast.train.config import Config
from cac_fast.train.errors import InputError
from cac_fast.train.log import Meters, train_line
from cac_fast.train.methods.contrastive import ContrastiveMethod

HEIGHT, WIDTH = 5, 6


def network(kernel: int, seed: int = 0) -> nn.Sequential:
    """A map of 3 channels above 0, then a convolution without bias to 4 classes."""
    torch.manual_seed(seed)
    maps = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())
    return nn.Sequential(maps, nn.Conv2d(3, 4, kernel, padding=kernel // 2, bias=False)).double()


def by_hand(model: nn.Sequential, image: Tensor, place: Place, index: int) -> Tensor:
    """Grad-CAM where the logits are a convolution of the map: the taps that meet it, one by one."""
    maps, weight = model[0](image)[0].detach(), model[1].weight.detach()
    reach = weight.shape[-1] // 2
    cam = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    for channel in range(3):
        alpha = 0.0
        for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
            if 0 <= place.y + down < HEIGHT and 0 <= place.x + right < WIDTH:
                alpha += weight[index, channel, down + reach, right + reach].item()
        cam += alpha / (HEIGHT * WIDTH) * maps[channel]
    return cam.clamp_min(0)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("place", [Place(0, 0), Place(4, 5), Place(0, 3), Place(2, 2)])
def test_grad_cam_of_a_convolution(kernel: int, place: Place) -> None:
    model, image = network(kernel), torch.rand(1, 3, HEIGHT, WIDTH).double()
    expected = [by_hand(model, image, place, index) for index in range(4)]
    assert sum(bool(cam.any()) for cam in expected) >= 2
    for index, cam in enumerate(expected):
        found, told = grad_cam(model, model[0], image, place, index)
        assert told == index
        torch.testing.assert_close(found, cam, atol=2e-9, rtol=0)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_corner_has_four_of_nine_taps() -> None:
    model, image = network(3), torch.rand(1, 3, HEIGHT, WIDTH).double()
    nn.init.ones_(model[1].weight)
    maps = model[0](image)[0].sum(0)
    for place, taps in ((Place(0, 0), 4), (Place(0, 2), 6), (Place(2, 2), 9)):
        cam, _ = grad_cam(model, model[0], image, place, 0)
        torch.testing.assert_close(cam, taps / (HEIGHT * WIDTH) * maps)


def test_grad_cam_of_the_identity() -> None:
    """alpha is 1 / (h w) in the class's own channel, 0 in the others."""
    model, image = nn.Sequential(nn.Identity(), nn.Identity()), torch.rand(1, 3, HEIGHT, WIDTH)
    cam, index = grad_cam(model, model[0], image, Place(1, 2))
    assert index == int(image[0, :, 1, 2].argmax())
    torch.testing.assert_close(cam, image[0, index] / (HEIGHT * WIDTH))


def test_weights_below_zero_give_nothing() -> None:
    model, image = network(3), torch.rand(1, 3, HEIGHT, WIDTH).double()
    nn.init.constant_(model[1].weight, -1)
    cam, _ = grad_cam(model, model[0], image, Place(1, 1), 0)
    assert not cam.any()
    assert figure_gradcam.share_inside(cam.numpy(), np.ones((HEIGHT, WIDTH), bool)) is None


def test_the_last_of_several_maps_is_explained() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 5 * x, x

    class Sum(nn.Module):
        def forward(self, maps: tuple[Tensor, Tensor]) -> Tensor:
            return maps[0] + 2 * maps[1]

    model, image = nn.Sequential(Two(), Sum()), torch.rand(1, 3, HEIGHT, WIDTH)
    cam, _ = grad_cam(model, model[0], image, Place(0, 0), 1)
    torch.testing.assert_close(cam, 2 * image[0, 1] / (HEIGHT * WIDTH))


def test_region_is_what_touches_the_pixel() -> None:
    truth = np.array([[1, 1, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]])
    region = figure_gradcam.region_of(truth, Place(1, 1))
    # Up, then left; right, then down; nothing by a corner alone.
    assert np.argwhere(region).tolist() == [[0, 0], [0, 1], [1, 1], [1, 2], [2, 2]]
    cam = np.arange(12.0).reshape(3, 4)
    assert figure_gradcam.share_inside(cam, region) == pytest.approx((0 + 1 + 5 + 6 + 10) / 66)


def test_precision_is_weighted_by_the_pairs() -> None:
    lines = [
        {"kind": "train", "iteration": 10},  # the warm-up has no pairs
        # An older version measured this share alone.
        {"kind": "train", "iteration": 10, "false_negatives": 0.5},
        line(20, (0.5, 100), (0.6, 400)),
        {"kind": "val", "iteration": 20},
        line(22, (0.1, 300), (0.2, 400)),  # an evaluation makes a line shorter
        line(40, (0.0, 0), (0.25, 400)),
        line(50, (1.0, 20), (1.0, 30)),
    ]
    # An epoch of 15 iterations ends in 15, 30, 45, 60. The warm-up ends in the second line.
    assert figure_curves.precision(lines, WITH, 15, 14) == {
        2: pytest.approx(1 - (0.5 * 100 * 6 + 0.1 * 300 * 2) / (100 * 6 + 300 * 2)),
        3: None,
        4: 0,
    }
    assert figure_curves.precision(lines, WITHOUT, 15, 14) == {
        2: pytest.approx(1 - (0.6 * 6 + 0.2 * 2) / 8),
        3: 0.75,
        4: 0,
    }


def test_precision_is_that_of_the_steps() -> None:
    """Through the lines that a trainer writes, of 3 steps and of 1."""
    meters = Meters(torch.device("cpu"), ContrastiveMethod.reductions)
    shares, pairs, lines = (0.5, 0.2, 0.8, 0.1), (10, 30, 20, 40), []
    for step, (share, count) in enumerate(zip(shares, pairs, strict=True), start=1):
        both = {"false_negatives": share, "admitted_pairs": count}
        both |= {"false_negatives_random": share, "random_pairs": count}
        scalars = {name: torch.tensor(value) for name, value in both.items()}
        step_of = Step({"image": torch.zeros(1)}, None, 0.0)
        meters.add(step, {"loss": torch.tensor(1.0), **scalars}, step_of)
        if step > 2:
            reading = [meters.read() | {"skipped": 0}]
            lines.append(
                {"iteration": step, **train_line(reading, 0.1, ContrastiveMethod.reductions)}
            )
    wrong = sum(share * count for share, count in zip(shares, pairs, strict=True))
    found = figure_curves.precision(lines, WITH, 10)
    assert found == {1: pytest.approx(1 - wrong / sum(pairs))}


def line(iteration: int, admitted: tuple[float, int], every: tuple[float, int]) -> dict:
    """A line of metrics.jsonl: share of false negatives and pairs, of both kinds."""
    names = "false_negatives admitted_pairs false_negatives_random random_pairs".split()
    return {"iteration": iteration, **dict(zip(names, (*admitted, *every), strict=True))}


def test_band_is_of_what_all_seeds_have() -> None:
    curves = [{1: 0.1, 2: 0.5, 3: 0.7}, {1: 0.3, 2: None, 3: 0.1}, {0: 9.0, 1: 0.2, 2: 0.5, 3: 0.4}]
    found = figure_curves.band(curves)
    assert found == {1: (pytest.approx(0.2), 0.1, 0.3), 3: (pytest.approx(0.4), 0.1, 0.7)}


def write_run(folder: Path, vals: dict[int, float], **settings: object) -> Path:
    folder.mkdir(parents=True)
    config = Config.of(dataset="folder", output=str(folder), **settings)
    (folder / "config.json").write_text(json.dumps(config.flat()))
    lines = [{"kind": "val", "iteration": step, "miou": miou} for step, miou in vals.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def draw(*words: object) -> None:
    figures.main([str(word) for word in words])


def test_curves_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        write_run(tmp_path / "cac-seed1", {5: 0.25, 10: 0.5}, seed=1),
        write_run(tmp_path / "cac-seed2", {5: 0.5, 10: 0.75}, seed=2),
        write_run(tmp_path / "no $context_1", {5: 0.125}, context=False),
    ]
    png, numbers = tmp_path / "f.png", tmp_path / "f.json"
    draw("--figure", 7, "--runs", *runs, "--output", png, "--json", numbers)
    found = json.loads(numbers.read_text())
    assert found["cac"] == {
        "seeds": 2,
        "mean": {"5": 0.375, "10": 0.625},
        "low": {"5": 0.25, "10": 0.5},
        "high": {"5": 0.5, "10": 0.75},
    }
    assert found["no $context_1"]["mean"] == {"5": 0.125}
    assert "cac, 2 seeds: 62.5 at iteration 10" in capsys.readouterr().out
    assert len(Image.open(png).getcolors(1 << 16)) > 20

    with pytest.raises(InputError) as error:
        draw("--figure", 7, "--runs", *runs, "--captions", "a", "b", "a", "--output", png)
    one_line(error, "both called a", "context", "--captions")
    with pytest.raises(InputError) as error:
        draw("--figure", 7, "--runs", *runs, "--captions", "a", "--output", png)
    one_line(error, "1 names for 3 runs")
    with pytest.raises(InputError) as error:
        draw("--figure", 7, "--runs", tmp_path / "nothing", "--output", png)
    one_line(error, "nothing holds no run")
    with pytest.raises(InputError) as error:
        draw("--figure", 6, "--runs", runs[0], "--output", png)
    one_line(error, "--false-negatives")
    with pytest.raises(InputError) as error:
        draw("--figure", 2, "--runs", runs[0])
    one_line(error, "--figure", "choose from")
    with pytest.raises(InputError) as error:
        draw("--runs", runs[0], "--figure")
    one_line(error, "--figure", "expected one argument")


def test_precision_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    for number in range(6):
        write_image(data / f"images/train/{number}.png")
    write_mask(data / "masks/train/0.png")
    (data / "classes.txt").write_text("0 a 0 0 0\n1 b 9 9 9\n2 c 99 9 9\n")
    run = write_run(tmp_path / "cac", {}, data_dir=str(data), batch_size=1, warmup=2)
    found = [
        line(4, (0.2, 10), (0.8, 40)),
        line(5, (0.5, 10), (0.5, 40)),
        line(10, (0.0, 0), (0.75, 40)),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    png, numbers = tmp_path / "f.png", tmp_path / "f.json"
    draw("--figure", 6, "--runs", run, "--output", png, "--json", numbers)
    # 5 unlabeled images, one a step: lines end epochs.
    found = json.loads(numbers.read_text())
    assert found["cac, by pseudo labels"]["mean"] == {"1": pytest.approx(0.7), "2": None}
    assert found["cac, at random"]["mean"] == {"1": pytest.approx(0.3), "2": 0.25}
    assert "cac, at random, 1 seed: 25.0 at epoch 2" in capsys.readouterr().out


NAMES = ["b", "a", "d", "c", "e"]


def test_a_run_names_a_layout_of_the_working_folder_alone(working_folder: Path) -> None:
    config = Config.of(dataset="json:loads", data_dir=str(working_folder))
    with pytest.raises(InputError) as error:
        figure_runs.data_of(config, None)
    one_line(error, "--dataset json:loads", "working folder alone", "json.py")


def test_images_that_differ_most_come_first() -> None:
    scores = [[0.1, 0.5, 0.3], [0.5, 0.2, 0.5], [0.0, 0.9, 0.9], [0.4, 0.4, 0.0], [1.0, 1.0, 1.0]]
    # Apart by 0.4, 0.3, 0.9, 0.4, 0: d, then b before c, whose order in the list is another.
    chosen, drawn = figure_sheet.choose(NAMES, scores, 3, seed=0)
    assert [NAMES[place] for place in chosen] == ["d", "b", "c"]
    assert sorted(NAMES[place] for place in drawn) == ["a", "e"]
    swapped = [scores[place] for place in (3, 1, 2, 0, 4)]
    assert [NAMES[p] for p in figure_sheet.choose(NAMES, swapped, 3, 0)[0]] == ["d", "b", "c"]


def test_identical_runs_are_shown_by_name() -> None:
    scores = [[value] * 3 for value in (0.3, 0.2, 0.1, 0.0, 0.4)]
    chosen, drawn = figure_sheet.choose(NAMES, scores, 2, seed=3)
    assert [NAMES[place] for place in chosen] == ["a", "b"]
    assert drawn == figure_sheet.choose(NAMES, scores, 2, seed=3)[1]
    seeds = {tuple(figure_sheet.choose(NAMES, scores, 2, seed)[1]) for seed in range(20)}
    assert len(seeds) > 3 and all(not set(chosen) & set(places) for places in seeds)
    assert figure_sheet.choose(NAMES[:1], scores[:1], 4, 0) == ([0], [])


class Network:
    """Right in the left part of every image, in as much of it as the file name says."""

    classes = ("road", "sky", "car")

    def __init__(self, better: bool) -> None:
        self.better = better

    def predict(self, image: Image.Image) -> np.ndarray:
        ids = np.ones((image.height, image.width), np.uint8)
        ids[:, : 30 if self.better else 10 + image.height // 4] = 0
        return ids


def test_sheet_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    root, heights = tmp_path / "data", {"M&S Straße": 40, "a b": 60, "über <i>": 72, "plain": 48}
    for name, height in heights.items():
        write_image(root / f"images/val/{name}.png", height, 50)
        write_mask(root / f"masks/val/{name}.png", height, 50, value=0)
    write_image(root / "images/train/0.png")
    write_mask(root / "masks/train/0.png")
    (root / "classes.txt").write_text("0 road 0 0 255\n1 sky 255 255 0\n2 car 9 9 9\n")
    config = Config.of(dataset="folder", data_dir=str(root))
    runs = [
        figure_runs.Run(n, Path(), config, Network(n == "gut & schön"))
        for n in ("x", "gut & schön")
    ]
    monkeypatch.setattr(figure_sheet, "open_runs", lambda paths, captions: runs)
    png, numbers = tmp_path / "f.png", tmp_path / "f.json"
    draw("--figure", 8, "--runs", "x", "y", "--rows", 2, "--output", png, "--json", numbers)
    rows = json.loads(numbers.read_text())["rows"]
    # mIoU 0.6 against 0.4, 0.5, 0.56, 0.44 in the order of heights.
    assert [row["image"] for row in rows[:2]] == ["M&S Straße", "plain"]
    assert {row["image"] for row in rows[2:]} == {"a b", "über <i>"}
    assert [row["kind"] for row in rows] == ["chosen to differ"] * 2 + ["drawn by seed"] * 2
    assert rows[0]["miou"] == [0.4, 0.6]
    assert "chosen to differ: M&S Straße, mIoU x 40.0, gut & schön 60.0" in capsys.readouterr().out
    picture = Image.open(png).convert("RGB")
    assert picture.width == 4 * (figure_sheet.TILE[0] + 8) + 8
    with pytest.raises(InputError) as error:
        draw("--figure", 8, "--runs", "x", "--output", png)
    one_line(error, "two or more")

    # Masks without a class are left out; without any other nothing is drawn.
    words = "--figure", 8, "--runs", "x", "y", "--rows", 4, "--output", png, "--json", numbers
    write_mask(root / "masks/val/a b.png", 60, 50, value=255)
    draw(*words)
    shown = {row["image"] for row in json.loads(numbers.read_text())["rows"]}
    assert shown == heights.keys() - {"a b"}
    for name, height in heights.items():
        write_mask(root / f"masks/val/{name}.png", height, 50, value=255)
    with pytest.raises(InputError) as error:
        draw(*words)
    one_line(error, root, "255 all over")


def test_a_drawn_image_has_truth(tmp_path: Path) -> None:
    for name, value in (("a", 255), ("b", 0), ("c", 255), ("d", 1)):
        write_image(tmp_path / f"images/val/{name}.png")
        write_mask(tmp_path / f"masks/val/{name}.png", value=value)
    write_image(tmp_path / "images/train/0.png")
    write_mask(tmp_path / "masks/train/0.png")
    (tmp_path / "classes.txt").write_text("0 a 0 0 0\n1 b 9 9 9\n")
    data = figure_runs.data_of(Config.of(dataset="folder", data_dir=str(tmp_path)), None)
    samples = figure_runs.with_masks(data, "val")
    assert [one.name for one in figure_runs.with_truth(samples, data)] == ["b", "d"]
    assert [one.name for one in figure_runs.with_truth(samples, data, 1)] == ["b"]


@pytest.mark.parametrize("classes", ["0 car 1 1 1\n1 road 2 2 2\n2 sky 3 3 3\n", "0 road 1 1 1\n"])
def test_a_network_of_other_classes_is_refused(classes: str, tmp_path: Path) -> None:
    write_image(tmp_path / "images/train/0.png")
    write_mask(tmp_path / "masks/train/0.png", value=0)
    (tmp_path / "classes.txt").write_text(classes)
    config = Config.of(dataset="folder", data_dir=str(tmp_path))
    run = figure_runs.Run("x", tmp_path / "best.pt", config, Network(True))
    with pytest.raises(InputError) as error:
        figure_runs.data_of_run(run, None)
    one_line(error, "best.pt", "class", "--data-dir")


@pytest.mark.parametrize("settings", ["{", "[]", '{"x": 1}'])
def test_a_config_of_another_kind_is_one_line(settings: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "cac", {5: 0.25})
    (run / "config.json").write_text(settings)
    with pytest.raises(InputError) as error:
        draw("--figure", 7, "--runs", run)
    one_line(error, run / "config.json", "train/main.py")


def test_settings_of_a_checkpoint_that_are_unknown_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure_runs, "load", lambda path: Network(True))
    monkeypatch.setattr(figure_runs.checkpoint, "read", lambda path: {"config": {"x": 1}})
    with pytest.raises(InputError) as error:
        figure_runs.open_runs([tmp_path / "best.pt"], None)
    one_line(error, "best.pt holds no settings", "train/main.py")


@pytest.mark.parametrize("given", ["cac", "cac/best.pt"])
def test_another_state_can_be_asked_for(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cac").mkdir()
    (tmp_path / "cac/best.pt").touch()
    monkeypatch.setattr(figure_runs, "load", lambda path: Network(True))
    monkeypatch.setattr(figure_runs.checkpoint, "read", lambda path: {"config": {}})
    (run,) = figure_runs.open_runs([tmp_path / given], None)
    assert (run.name, run.path) == ("cac", tmp_path / "cac/best.pt")
    (run,) = figure_runs.open_runs([tmp_path / given], None, "last.pt")
    assert (run.name, run.path) == ("cac", tmp_path / "cac/last.pt")


def test_repetitions_begin_alike_and_have_as_many_masks(tmp_path: Path) -> None:
    lists = {name: tmp_path / name for name in ("1/six.txt", "2/six.txt", "all.txt")}
    for path in lists.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("a\n" * (9 if path.name == "all.txt" else 6))
    first = {"labeled": str(lists["1/six.txt"]), "weights": "here/resnet18.pth"}
    second = {"labeled": str(lists["2/six.txt"]), "weights": "there/resnet18.pth"}
    gone = second | {"labeled": "gone/six.txt"}
    runs = [
        write_run(tmp_path / f"cac-seed{seed}", {5: 0.25}, seed=seed, **settings)
        for seed, settings in enumerate([first, second, gone])
    ]
    figure_runs.open_logs(runs, None)
    for key, value in (("labeled", str(lists["all.txt"])), ("weights", None), ("labeled", None)):
        other = write_run(tmp_path / f"{key}-{value is None}", {5: 0.5}, **first | {key: value})
        with pytest.raises(InputError) as error:
            figure_runs.open_logs([runs[0], other], ["CAC", "CAC"])
        one_line(error, "both called CAC", f"differ in {key}")


@pytest.mark.parametrize(
    ("number", "module"), [(1, figure_gradcam), (3, figure_tsne), (8, figure_sheet)]
)
def test_a_mask_of_another_size_is_one_line(
    number: int, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        write_image(tmp_path / f"images/{split}/0.png", 80, 88)
        write_mask(tmp_path / f"masks/{split}/0.png", 40, 44)
    (tmp_path / "classes.txt").write_text("0 road 0 0 0\n1 sky 9 9 9\n2 car 99 9 9\n")
    config = Config.of(dataset="folder", data_dir=str(tmp_path))
    run = figure_runs.Run("x", tmp_path / "best.pt", config, Network(True))
    monkeypatch.setattr(module, "open_runs", lambda *_: [run, run])
    with pytest.raises(InputError) as error:
        draw("--figure", number, "--runs", "x", "y", "--output", tmp_path / "f.png")
    one_line(error, "is 44 x 40 but image", "88 x 80")


def test_a_classification_has_no_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "classify", {})
    (run / "metrics.jsonl").write_text('{"kind": "val", "iteration": 5, "map": 0.5}\n')
    with pytest.raises(InputError) as error:
        draw("--figure", 7, "--runs", run)
    one_line(error, run, "holds no mIoU", "train/main.py")


def test_texts_fit() -> None:
    assert figure_runs.fitted("Mu\u0308ll & Söhne", 400) == "Müll & Söhne"
    assert figure_runs.fitted("x" * 300, 100).startswith("...")
    assert math.isfinite(len(figure_runs.fitted("bad \udcff", 400)))
