"""Pseudo labels of crops, and the classifier that learns them: against loops, and what learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_methods
import test_step
import torch
import torch.nn.functional as F
from PIL import Image
from small_training import assert_same_bits, losses, stopped_after
from test_methods import names, one_step, trainer
from test_step import IMAGES
from torch import Tensor
from toy_methods import TOYS, tiny_network

from cac_fast.train import checkpoint, inference, run_state
from cac_fast.train.data.augment import UnlabeledTransform
from cac_fast.train.data.cache import PixelReader
from cac_fast.train.data.crops import draw_pair, draw_size
from cac_fast.train.data.layouts import Sample, open_data
from cac_fast.train.data.loaders import batches, unlabeled_loader
from cac_fast.train.data.pseudo import read_pseudo_labels
from cac_fast.train.errors import InputError
from cac_fast.train.methods import weak_labels
from cac_fast.train.methods.cac import CAC
from cac_fast.train.methods.weak_labels import WeakClassifier

SIDE, CLASSES = 32, 3
forwards = pytest.mark.parametrize("forward", ["separate", "joint"])


def method(*options: str, frozen: bool = False) -> CAC:
    return test_step.method("--pseudo-labels", "masks", *options, frozen=frozen)


def with_labels() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The batches of test_step with pseudo labels, of which one image has none."""
    labeled, unlabeled = TEST_STEP_BATCHES()
    generator = torch.Generator().manual_seed(5)
    for number in (1, 2):
        label = torch.randint(0, CLASSES, (IMAGES, SIDE, SIDE), generator=generator)
        label[0, : 4 * number], label[number, :, 20:], label[3] = 255, 255, 255
        unlabeled[f"label{number}"] = label.to(torch.uint8)
    return labeled, unlabeled


TEST_STEP_BATCHES = test_step.batches


@pytest.fixture(autouse=True)
def same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_step.step` takes these."""
    monkeypatch.setattr(test_step, "batches", with_labels)


def in_loops(model: CAC) -> Tensor:
    """L_w, pixel by pixel."""
    _, unlabeled = with_labels()
    classifier, means = model.weak.classifier[1], []
    for number in (1, 2):
        label, total, count = unlabeled[f"label{number}"], 0.0, 0
        features = model.network.features(unlabeled[f"image_{number}"])
        small = F.conv2d(F.avg_pool2d(features, 2), classifier.weight, classifier.bias)
        large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
        log = large.log_softmax(1)
        for i, y, x in np.ndindex(IMAGES, SIDE, SIDE):
            if label[i, y, x] != 255:
                total, count = total - log[i, int(label[i, y, x]), y, x], count + 1
        means.append(total / count)
    return (means[0] + means[1]) / 2


@forwards
def test_loss_and_gradients_are_those_of_loops(forward):
    model = method("--forward", forward, frozen=True)
    losses, expected = model(*with_labels()), in_loops(model)
    assert losses["loss_weak"].item() == pytest.approx(expected.item(), rel=1e-12)
    parts = losses["loss_ce"] + 0.1 * losses["loss_dc"] + losses["weak_weight"] * expected
    assert losses["loss"].item() == pytest.approx(parts.item(), rel=1e-12)
    known = [with_labels()[1][f"label{number}"] != 255 for number in (1, 2)]
    assert losses["weak_labeled"].item() == pytest.approx(torch.stack(known).double().mean().item())
    assert "weak_precision" not in losses
    model.zero_grad(set_to_none=True)
    expected.backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters()}
    for name, gradient in of_weak_loss(forward, model.state_dict()).items():
        if wanted[name] is None:
            assert gradient is None or not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12)


def of_weak_loss(forward: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of L_w: what its weight adds to those of all else."""
    found = []
    for weight in (0.0, 1.0):
        model = method("--forward", forward, frozen=True)
        model.load_state_dict(weights)
        model.weak.weight = lambda _, weight=weight: weight
        model(*with_labels())["loss"].backward()
        found.append({name: each.grad for name, each in model.named_parameters()})
    return {name: found[1][name] - gradient for name, gradient in found[0].items()}


@forwards
def test_who_learns_of_what(forward):
    """C_w of pseudo labels alone; C of none of them; E of both; Phi of neither."""
    gradients = of_weak_loss(forward, method(frozen=True).state_dict())
    moved = {name for name, gradient in gradients.items() if gradient.abs().max() > 1e-12}
    encoder = {name for name in gradients if name.startswith(("network.backbone", "network.head"))}
    assert moved == encoder | {"weak.classifier.1.weight", "weak.classifier.1.bias"}
    assert len(gradients) > len(moved) + 4

    model = method("--forward", forward, frozen=True)
    labeled, unlabeled = with_labels()
    nothing = {name: torch.full_like(unlabeled[name], 255) for name in ("label1", "label2")}
    losses = model(labeled, unlabeled | nothing)
    assert losses["loss_weak"] == 0 and losses["weak_labeled"] == 0
    assert losses["loss_weak"].isfinite() and losses["loss"] > 0
    losses["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters())  # as DDP needs
    assert not any(weight.grad.any() for weight in model.weak.parameters())


def test_the_main_classifier_starts_where_it_did_without():
    with_weak, without = method(), test_step.method()
    state = with_weak.state_dict()
    for name, value in without.state_dict().items():
        assert torch.equal(state.pop(name), value), name
    assert set(state) == {"weak.classifier.1.weight", "weak.classifier.1.bias"}
    assert not torch.equal(state["weak.classifier.1.weight"], without.network.classifier[1].weight)
    dropouts = with_weak.weak.classifier[0], without.network.classifier[0]
    assert dropouts[0].p == dropouts[1].p == 0.5 and dropouts[0] is not with_weak.network.classifier


@pytest.mark.parametrize(
    ("iteration", "weight"),
    [(0, 0.0027), (50, 0.1146), (100, 0.4), (200, 0.4)],
)
def test_the_weight_rises_in_a_tenth_of_the_run(iteration, weight):
    model = method("--iterations", "1000")
    assert round(model.weak.weight(iteration), 4) == weight
    model.iteration = iteration
    found = model(*with_labels())["weak_weight"].item()
    assert found == model.weak.weight(iteration)


@forwards
def test_slices_change_nothing(forward):
    options = "--forward", forward
    whole = method(*options, frozen=True)
    test_step.assert_same_step(whole, method(*options, "--accumulate", "4", frozen=True))
    assert whole.network.backbone.calls == (1 if forward == "joint" else 3)


def test_masks_follow_the_crop_and_its_flip():
    """Of the pixel under each place's center; the cells' centers are where truth is looked up."""
    height, width, crop, half, flips = 50, 43, 40, 4, set()
    mask = np.random.default_rng(0).integers(0, 250, (height, width), np.uint8)
    pixels = np.repeat(mask[:, :, None], 3, 2)
    for seed in range(12):
        for scale in ((1.0, 1.0), (0.6, 1.7)):
            transform = UnlabeledTransform(crop, scale)
            item = transform(Image.fromarray(pixels), mask, np.random.default_rng(seed), mask)
            rng = np.random.default_rng(seed)
            size = draw_size(height, width, scale, rng, None)
            pair = draw_pair(*size, crop, (0.1, 1.0), rng)
            for number in (1, 2):
                top, left, flip = (
                    getattr(pair, f"{name}{number}") for name in ("top", "left", "flip")
                )
                flips.add(flip)
                expected = np.full((crop, crop), 255, np.uint8)
                for y, x in np.ndindex(min(crop, size[0] - top), min(crop, size[1] - left)):
                    row = int((top + y + 0.5) * height / size[0])
                    column = int((left + x + 0.5) * width / size[1])
                    expected[y, crop - 1 - x if flip else x] = mask[row, column]
                label = item[f"label{number}"]
                assert label.dtype == torch.uint8
                assert np.array_equal(label.numpy(), expected)
                known = expected != 255
                assert item[f"right{number}"].tolist() == [known.sum()] * 2
                if scale == (1.0, 1.0):
                    assert np.array_equal(item[f"image{number}"][0].numpy()[known], mask_of(label))
                unflipped = label.flip(1) if flip else label
                centers = unflipped[half::8, half::8]
                centers = centers.flip(1) if flip else centers
                assert torch.equal(item[f"truth{number}"], centers)
    assert flips == {False, True}


def mask_of(label: Tensor) -> np.ndarray:
    return label[label != 255].numpy()


def test_agreement_with_the_truth_is_counted():
    pairs = [[(0, 0), (1, 2)], [(255, 1), (2, 255)], [(255, 255), (0, 0)], [(1, 1), (0, 1)]]
    truth, told = np.array(pairs, np.uint8).repeat(8, 0).repeat(16, 1).transpose(2, 0, 1)
    transform = UnlabeledTransform(32, (1.0, 1.0), iou_range=(1.0, 1.0), truth_cells=False)
    image = Image.new("RGB", (32, 32))
    item = transform(image, truth, np.random.default_rng(0), told)
    assert item["right1"].tolist() == item["right2"].tolist() == [3 * 128, 5 * 128]
    assert "truth1" not in item
    assert "right1" not in transform(image, None, np.random.default_rng(0), told)


def write_masks(folder: Path, data: Path, names: list[str], share: float = 0.7) -> Path:
    """Blocks of ids and of 255, as palette PNGs."""
    rng = np.random.default_rng(3)
    for name in names:
        with Image.open(data / "images" / "train" / f"{name}.png") as image:
            blocks = (-(-image.height // 8), -(-image.width // 8))
            ids = rng.integers(0, CLASSES, blocks).astype(np.uint8)
            ids[rng.random(blocks) > share] = 255
            ids = ids.repeat(8, 0).repeat(8, 1)[: image.height, : image.width]
        indexed = Image.fromarray(ids)
        indexed.putpalette(list(range(256)) * 3)
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        indexed.save(path)
    return folder


@pytest.fixture
def masks(folder_data, tmp_path: Path) -> Path:
    """Of two of the three unlabeled images."""
    return write_masks(tmp_path / "masks", folder_data, ["04", "06"])


def item_of(data, sample: Sample, pseudo: Sample, cache: Path | None = None) -> dict[str, Tensor]:
    transform = UnlabeledTransform(48, (1.0, 1.0), truth_cells=False)
    options = {"seed": 1, "batch_size": 1, "with_truth": True, "cache": cache}
    return next(batches(unlabeled_loader([sample], data, transform, pseudo=[pseudo], **options)))


def test_the_loader_takes_ids_as_they_are(folder_data, masks, tmp_path):
    """A data set's own masks may hold other ids; what has no pseudo mask is 255."""
    data = replace(open_data("folder", folder_data), label_map=(255,) * 256)
    sample = data.splits["train"][4]
    reader = PixelReader(data, tmp_path / "cache")
    labels = read_pseudo_labels(masks, data.splits["train"][4:], reader)
    assert [one.mask and one.mask.name for one in labels.samples] == ["04.png", None, "06.png"]
    assert labels.found.startswith(f"pseudo labels of {masks}: 2 of 3 unlabeled images, ")
    for cache in (None, reader.cache):
        batch = item_of(data, sample, labels.samples[0], cache)
        assert set(batch["label1"].unique().tolist()) == {0, 1, 2, 255}
        reader.fill([], data.splits["train"])
    without = item_of(data, sample, labels.samples[1])
    assert (without["label1"] == 255).all() and (without["label2"] == 255).all()
    assert torch.equal(without["image1"], batch["image1"])


OPTIONS = "--threshold 0 --dc-backend reference --bank-past-steps 1".split()


@pytest.fixture
def tiny(masks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of all methods have this one too."""
    monkeypatch.setitem(TOYS, "weak", CAC)
    scalars = "loss_weak", "weak_weight", "weak_labeled", "loss_dc"
    monkeypatch.setitem(test_methods.SCALARS, "weak", scalars)
    options = [*test_methods.OPTIONS, *OPTIONS, "--pseudo-labels", str(masks)]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test_methods.use("weak", monkeypatch)


def test_two_processes_give_the_course_of_one(tiny, folder_data, tmp_path, monkeypatch):
    test_methods.test_two_processes_give_the_course_of_one(
        "weak", folder_data, tmp_path, monkeypatch
    )


def test_slices_and_recomputation_change_no_run(tiny, folder_data, tmp_path, monkeypatch):
    test_methods.test_slices_and_recomputation_change_nothing(
        "weak", folder_data, tmp_path, monkeypatch
    )


def test_interrupted_run_ends_with_the_same_bits(tiny, folder_data, masks, tmp_path):
    whole = test_methods.run(folder_data, tmp_path / "whole")
    with stopped_after(4):
        test_methods.run(folder_data, tmp_path / "run")
    moved = masks.rename(masks.with_name("moved"))
    lines = test_methods.run(folder_data, tmp_path / "run", "--pseudo-labels", str(moved))
    for scalar in ("loss_weak", "weak_weight", "weak_labeled", "loss"):
        assert losses(lines[2:], scalar) == losses(whole[2:], scalar)
    assert "loss_weak" not in lines[1] and "weak_precision" not in lines[2]
    one, other = (checkpoint.read(tmp_path / at / "last.pt") for at in ("whole", "run"))
    assert_same_bits(one["method"], other["method"])


def test_a_run_goes_on_with_its_own_labels_alone(tiny, folder_data, masks, tmp_path):
    test_methods.run(folder_data, tmp_path / "run")
    write_masks(masks, folder_data, ["05"])
    with pytest.raises(InputError, match="holds a run with other pseudo labels: use another"):
        trainer(folder_data, tmp_path / "run")
    with pytest.raises(InputError, match="holds a run with other pseudo labels"):
        trainer(folder_data, tmp_path / "run", "--pseudo-labels", "none")
    (masks / "05.png").unlink()
    assert trainer(folder_data, tmp_path / "run").iteration == 6


def test_the_cache_holds_pseudo_masks_too(tiny, folder_data, tmp_path):
    steps = []
    for cache in ("none", str(tmp_path / "cache")):
        stream = trainer(folder_data, tmp_path / "run", "--cache", cache).stream
        (step,) = stream.steps(0, 1, True)
        steps.append(step.labeled | step.unlabeled)
    assert len(list((tmp_path / "cache").iterdir())) == 7 + 4 + 2
    assert steps[0].keys() == steps[1].keys() and "label2" in steps[0]
    assert all(torch.equal(steps[1][name], value) for name, value in steps[0].items())


def test_without_weight_it_is_cac(tiny, folder_data, tmp_path, monkeypatch):
    """To the bit, where C_w draws nothing."""
    monkeypatch.setattr(weak_labels, "FULL_WEIGHT", 0.0)
    for name, labels in (("with", []), ("without", ["--pseudo-labels", "none"])):
        test_methods.run(folder_data, tmp_path / name, "--no-dropout", *labels)
    one, other = (checkpoint.read(tmp_path / at / "last.pt") for at in ("with", "without"))
    started = {name: one["method"].pop(name) for name in set(one["method"]) - set(other["method"])}
    assert len(started) == 2
    assert_same_bits(one["method"], other["method"])
    assert_same_bits(one["network"], other["network"])


def test_a_step_changes_what_it_may(tiny, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run", "--iterations", "1000")
    model = trained.method
    assert isinstance(model.weak, WeakClassifier)
    network, extra = names(model, "network"), names(model, "projector", "weak")
    assert one_step(trained, unlabeled=False) == network and len(extra) == 6
    assert one_step(trained, unlabeled=True) == network | extra


def test_checkpoints_are_read_without_it(tiny, folder_data, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "build_network", tiny_network)
    test_methods.run(folder_data, tmp_path / "run")
    for name in ("best.pt", "last.pt"):
        state = checkpoint.read(tmp_path / "run" / name)
        assert not any("weak" in weight for weight in state["network"])
        predictor = inference.load(tmp_path / "run" / name)
        assert_same_bits(predictor.network.state_dict(), state["network"])
    assert any(name.startswith("weak.") for name in state["method"])


def test_precision_needs_truth(tiny, folder_data, masks, tmp_path):
    """Masks of the data: their labels are all right."""
    data = folder_data / "masks" / "train"
    share = "--labeled-share", "1/2"
    lines = test_methods.run(folder_data, tmp_path / "run", *share, "--pseudo-labels", str(data))
    assert "weak_precision" not in lines[1]
    assert [line["weak_precision"] for line in lines[2:6]] == [1.0] * 4
    assert "false_negatives" not in lines[2]
    assert all(0 < line["weak_labeled"] < 1 for line in lines[2:6])


MISTAKES = {
    "missing": "the folder of pseudo labels {masks} does not exist: correct its path",
    "empty": "{masks} holds no pseudo mask of the 3 unlabeled images ({masks}/04.png, "
    "{masks}/05.png, {masks}/06.png were looked for): give the folder of NAME.png",
    "size": "mask {masks}/04.png is 10 x 12 but image",
    "id": "mask {masks}/04.png holds the id 7, but only 0 to 2 are classes here",
    "broken": "mask {masks}/04.png cannot be read",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, folder_data, masks, tmp_path, monkeypatch):
    if mistake == "missing":
        masks.rename(tmp_path / "elsewhere")
    elif mistake == "empty":
        for path in masks.iterdir():
            path.rename(path.with_suffix(".gif"))
    elif mistake == "size":
        Image.new("L", (10, 12)).save(masks / "04.png")
    elif mistake == "id":
        Image.new("L", (56, 48), 7).save(masks / "04.png")
    else:
        (masks / "04.png").write_bytes(b"")
    monkeypatch.setattr(run_state, "build_network", tiny_network)
    with pytest.raises(InputError) as error:
        trainer(folder_data, tmp_path / "run", "--pseudo-labels", str(masks))
    assert MISTAKES[mistake].format(masks=masks) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["supervised", "fixmatch"])
def test_methods_that_take_none_say_so(name, folder_data, masks, tmp_path):
    with pytest.raises(InputError) as error:
        trainer(folder_data, tmp_path / "run", "--method", name, "--pseudo-labels", str(masks))
    start = f"--pseudo-labels: --method {name} takes none: leave it out"
    assert str(error.value).startswith(f"{start}, or use --method cac")


def test_names_stay_inside_the_folder(folder_data, masks):
    data = open_data("folder", folder_data)
    outside, inside = Sample("../a", Path("a.png"), None), Sample("b/c", Path("c.png"), None)
    with pytest.raises(InputError, match=r"the image \.\./a lies outside"):
        read_pseudo_labels(masks, [outside], PixelReader(data))
    with pytest.raises(InputError, match="would share the pseudo mask"):
        read_pseudo_labels(masks, [inside, replace(inside, image=Path("c.jpg"))], PixelReader(data))
    sample = data.splits["train"][4]
    below = replace(sample, name="x/y/04")
    (masks / "x" / "y").mkdir(parents=True)
    (masks / "04.png").rename(masks / "x" / "y" / "04.png")
    labels = read_pseudo_labels(masks, [below], PixelReader(data))
    assert labels.samples[0].mask == masks / "x" / "y" / "04.png"


def test_an_unreadable_image_does_not_forbid_the_others(folder_data, masks, tmp_path):
    data = open_data("folder", folder_data)
    broken = tmp_path / "04.png"
    broken.write_bytes(b"no image")
    samples = [replace(data.splits["train"][4], image=broken), *data.splits["train"][5:]]
    assert read_pseudo_labels(masks, samples, PixelReader(data)).samples[0].mask is not None
