"""Self-training: its loss against supervised training, and the labels that a teacher makes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import test_methods
import test_step
import torch
import torch.nn.functional as F
import two_ranks
from PIL import Image
from small_training import CPU, assert_same_bits, losses, stopped_after
from test_methods import SMOOTH, one_step, trainer
from test_step import IMAGES, Backbone, Head
from test_step import batches as batches_of_cac
from tiny_scenes import write_scenes
from torch import Tensor
from toy_methods import TOYS, tiny_network

from cac_fast.train import checkpoint, config, inference, labeling
from cac_fast.train.data.images import read_image, read_mask
from cac_fast.train.data.layouts import open_data
from cac_fast.train.data.views import View
from cac_fast.train.errors import InputError
from cac_fast.train.methods.self_training import SelfTraining
from cac_fast.train.methods.supervised import Supervised
from cac_fast.train.networks import Segmenter

SIDE, CLASSES = 32, 3
forwards = pytest.mark.parametrize("forward", ["separate", "joint"])


def method(*options: str, kind: type = SelfTraining, frozen: bool = False) -> SelfTraining:
    """In float64; frozen: as `test_step.method`."""
    arguments = "--dataset toycity --method self_training --pseudo-labels masks".split()
    settings = config.parse([*arguments, *options])
    torch.manual_seed(0)
    network = Segmenter(Backbone(), Head(), CLASSES, dropout=0.5)
    result = kind(lambda: network, CPU, settings, torch.float64).double()
    return result.eval() if frozen else result


def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The lists differ in valid pixels; one image has no pseudo label."""
    labeled, unlabeled = batches_of_cac()
    generator = torch.Generator().manual_seed(6)
    label = torch.randint(0, CLASSES, (IMAGES, SIDE, SIDE), generator=generator)
    label[1], label[2, :, 13:] = 255, 255
    label = label.to(torch.uint8)
    counts = torch.tensor([[3, 4], [0, 0], [5, 8], [1, 8]])
    return labeled, {"image_strong": unlabeled["image_1"], "label1": label, "right1": counts}


def cross_entropy(model: SelfTraining, images: Tensor, labels: Tensor) -> Tensor:
    logits = model.network(images)
    known = labels != 255
    log = logits.log_softmax(1).gather(1, (labels * known).long().unsqueeze(1)).squeeze(1)
    return -log[known].sum() / known.sum()


@forwards
@pytest.mark.parametrize("alpha", ["1", "0.5"])
def test_loss_and_gradients_are_those_of_both_lists(forward, alpha):
    model = method("--forward", forward, "--pseudo-loss-weight", alpha, frozen=True)
    labeled, unlabeled = batches()
    found = model(labeled, unlabeled)
    of_labeled = cross_entropy(model, labeled["image"], labeled["label"])
    of_pseudo = cross_entropy(model, unlabeled["image_strong"], unlabeled["label1"])
    expected = (of_labeled + float(alpha) * of_pseudo) / (1 + float(alpha))
    values = {"loss": expected, "loss_ce": of_labeled, "loss_pseudo": of_pseudo}
    for name, value in values.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-12), name
    share = (unlabeled["label1"] != 255).double().mean().item()
    assert found["pseudo_labeled"].item() == pytest.approx(share)
    assert found["pseudo_precision"].item() == pytest.approx(9 / 20)
    assert "pseudo_ratio" not in found and "averages" not in model.state_dict()
    weights = list(model.network.parameters())
    here, there = (torch.autograd.grad(loss, weights) for loss in (found["loss"], expected))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-12)


def test_joint_forward_differs_in_batch_statistics_alone():
    separate, joint = method("--forward", "separate"), method()
    with torch.random.fork_rng():
        for model in (separate, joint):
            torch.manual_seed(2)
            model(*batches())
    counts = [model.network.backbone.high[1].num_batches_tracked for model in (separate, joint)]
    assert counts == [2, 1]


@forwards
def test_slices_change_nothing(forward, monkeypatch):
    monkeypatch.setattr(test_step, "batches", batches)
    whole, sliced = (
        method("--forward", forward, "--normalize-pseudo-loss", "--accumulate", n, frozen=True)
        for n in ("1", "2")
    )
    (losses1, gradients1), (losses2, gradients2) = map(test_step.step, (whole, sliced))
    torch.testing.assert_close(losses2, losses1)
    torch.testing.assert_close(gradients2, gradients1)
    passes = 1 if forward == "joint" else 2
    assert whole.network.backbone.calls == passes
    assert sliced.network.backbone.calls == 4 * passes - 1  # the last one is not computed again


def test_without_weight_the_supervised_gradient_stays():
    """To the bit, and with the same dropout: the labeled images come first."""
    options = "--pseudo-loss-weight", "0", "--forward", "separate"
    found = []
    for kind in (SelfTraining, Supervised):
        model = method(*options, kind=kind)
        torch.manual_seed(2)
        model(*batches())["loss"].backward()
        found.append([weight.grad for weight in model.parameters()])
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there) and here.abs().max() > 0


def test_the_ratio_is_that_of_the_averages():
    model = method("--normalize-pseudo-loss", "--pseudo-loss-weight", "3", frozen=True)
    tensor = lambda *values: torch.tensor(values, dtype=torch.float64).unbind()  # noqa: E731
    assert model.ratio(*tensor(2, 0)) == 1  # no pseudo label yet
    assert model.averages.tolist() == [2, 0]
    model.averages.zero_()
    assert model.ratio(*tensor(2, 4)) == 0.5
    of_ce, of_pseudo = 0.99 * 2 + 0.01 * 1, 0.99 * 4 + 0.01 * 8
    assert model.ratio(*tensor(1, 8)).item() == pytest.approx(of_ce / of_pseudo, rel=1e-12)
    of_ce = 0.99 * of_ce + 0.01 * 3
    assert model.ratio(*tensor(3, 0)).item() == pytest.approx(of_ce / of_pseudo, rel=1e-12)
    assert model.averages.tolist() == pytest.approx([of_ce, of_pseudo], rel=1e-12)
    found = model(*batches())
    of_ce = 0.99 * of_ce + 0.01 * found["loss_ce"].item()
    of_pseudo = 0.99 * of_pseudo + 0.01 * found["loss_pseudo"].item()
    ratio = of_ce / of_pseudo
    assert found["pseudo_ratio"].item() == pytest.approx(ratio, rel=1e-12)
    loss = (found["loss_ce"] + 3 * ratio * found["loss_pseudo"]) / 4
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    weights = list(model.network.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found["loss"], weights),
        torch.autograd.grad(expected_loss(model, ratio), weights),
    )


def expected_loss(model: SelfTraining, ratio: float) -> Tensor:
    labeled, unlabeled = batches()
    of_labeled = cross_entropy(model, labeled["image"], labeled["label"])
    of_pseudo = cross_entropy(model, unlabeled["image_strong"], unlabeled["label1"])
    return (of_labeled + 3 * ratio * of_pseudo) / 4


@forwards
@pytest.mark.parametrize("more", [[], ["--normalize-pseudo-loss"]])
def test_without_a_pseudo_label_there_is_no_loss(forward, more):
    model = method("--forward", forward, *more, frozen=True)
    labeled, unlabeled = batches()
    nothing = unlabeled | {"label1": torch.full_like(unlabeled["label1"], 255)}
    found = model(labeled, nothing)
    assert found["loss_pseudo"] == 0 and found["pseudo_labeled"] == 0
    assert torch.equal(found["loss"], found["loss_ce"] / 2)
    found["loss"].backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-training on the tiny network; without random colors of the labeled images."""
    monkeypatch.setattr(inference, "build_network", tiny_network)
    monkeypatch.setitem(TOYS, "self", SelfTraining)
    scalars = "loss_pseudo", "pseudo_labeled", "pseudo_ratio"
    monkeypatch.setitem(test_methods.SCALARS, "self", scalars)
    options = [*test_methods.OPTIONS, "--method", "self_training", "--normalize-pseudo-loss"]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test_methods.use("self", monkeypatch)


@pytest.fixture
def teacher(tiny, folder_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A supervised run."""
    with monkeypatch.context() as patch:
        test_methods.use_class(Supervised, patch)
        patch.setattr(test_methods, "OPTIONS", test_methods.OPTIONS[:-3])
        test_methods.run(folder_data, tmp_path / "teacher", "--method", "supervised")
    (tmp_path / "teacher" / "best.pt").unlink()  # it is not to be asked
    return tmp_path / "teacher"


def files_of(run: Path) -> dict[str, bytes]:
    folder = run / "pseudo"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_teacher_labels_whole_images_once(teacher, folder_data, tmp_path, monkeypatch, capsys):
    data = open_data("folder", folder_data)
    run = trainer(folder_data, tmp_path / "run", "--teacher", str(teacher))
    about = json.loads((tmp_path / "run" / "pseudo" / "pseudo.json").read_text())
    sha256 = hashlib.sha256((teacher / "last.pt").read_bytes()).hexdigest()
    assert about == {
        "teacher": str(teacher),
        "confidence": 0.0,
        "sha256": sha256,
        "iteration": 6,
        "classes": list(data.classes),
    }
    assert list(files_of(tmp_path / "run")) == ["04.png", "05.png", "06.png", "pseudo.json"]
    predictor = inference.load(teacher / "last.pt")
    for sample in data.splits["train"][4:]:
        path = tmp_path / "run" / "pseudo" / f"{sample.name}.png"
        assert np.array_equal(read_mask(path, CLASSES), predictor.predict(sample.image))
        with Image.open(path) as mask:
            assert tuple(mask.getpalette()[:3]) == data.palette[0]
    run.run()
    assert "pseudo labels of" in capsys.readouterr().out


def test_what_is_not_confident_is_not_labeled(teacher, folder_data, tmp_path):
    """Below the threshold, not at it."""
    data = open_data("folder", folder_data)
    samples = data.splits["train"][4:]
    predictor = inference.load(teacher / "last.pt")
    pixels = torch.from_numpy(np.array(read_image(samples[0].image))).permute(2, 0, 1)
    sure = predictor.logits(pixels).softmax(0).amax(0)
    threshold = sure.flatten().sort().values[sure.numel() // 2].item()
    arguments = teacher, tmp_path / "masks", samples, data, CPU, threshold
    labeling.label_once(*arguments)
    found = read_mask(tmp_path / "masks" / "04.png", CLASSES)
    unsure = sure.numpy() < np.float32(threshold)
    assert np.array_equal(found == 255, unsure) and 0.4 < unsure.mean() <= 0.5
    assert np.array_equal(found[~unsure], predictor.predict(samples[0].image)[~unsure])
    options = "--teacher", str(teacher), "--confidence", str(threshold)
    trainer(folder_data, tmp_path / "run", *options)
    assert files_of(tmp_path / "run")["04.png"] == (tmp_path / "masks" / "04.png").read_bytes()


def test_a_teacher_by_any_name_and_a_pseudo_json_by_any_hand(teacher, folder_data, tmp_path):
    """A name that is no UTF-8; a file that holds no object."""
    odd = teacher.rename(tmp_path / "t\udcff")
    folder = tmp_path / "masks"
    folder.mkdir()
    (folder / "pseudo.json").write_text("[]")
    data = open_data("folder", folder_data)
    labeling.label_once(odd, folder, data.splits["train"][4:], data, CPU, 0.0)
    assert json.loads((folder / "pseudo.json").read_text())["teacher"] == str(odd)


def test_a_resumed_run_does_not_label_again(teacher, folder_data, tmp_path, monkeypatch):
    given = "--teacher", str(teacher)
    whole = test_methods.run(folder_data, tmp_path / "whole", *given)
    with stopped_after(4):
        test_methods.run(folder_data, tmp_path / "run", *given)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "pseudo").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(labeling, "_label", lambda *_: pytest.fail("it labels again"))
        lines = test_methods.run(folder_data, tmp_path / "run", *given)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    for scalar in ("loss_pseudo", "pseudo_labeled", "pseudo_ratio", "loss"):
        assert losses(lines[2:], scalar) == losses(whole[2:], scalar)
    one, other = (checkpoint.read(tmp_path / at / "last.pt") for at in ("whole", "run"))
    assert_same_bits(one["method"], other["method"])
    assert "averages" in one["method"]


def test_labeling_goes_on_where_it_stopped(teacher, folder_data, tmp_path):
    given = "--teacher", str(teacher)
    trainer(folder_data, tmp_path / "run", *given)
    whole = files_of(tmp_path / "run")
    first, second = (tmp_path / "run" / "pseudo" / name for name in ("04.png", "05.png"))
    first.unlink()
    Image.new("L", (56, 48), 1).save(second)
    trainer(folder_data, tmp_path / "run", *given)
    found = files_of(tmp_path / "run")
    assert found["04.png"] == whole["04.png"] and found["05.png"] != whole["05.png"]
    trainer(folder_data, tmp_path / "run", *given, "--restart")
    assert files_of(tmp_path / "run") == whole
    trainer(folder_data, tmp_path / "run", *given, "--confidence", "1.5")
    assert (read_mask(second, CLASSES) == 255).all()


def test_another_teacher_is_refused_by_a_run_alone(teacher, folder_data, tmp_path):
    given = "--teacher", str(teacher)
    test_methods.run(folder_data, tmp_path / "run", *given)
    whole = files_of(tmp_path / "run")
    state = checkpoint.read(teacher / "last.pt")
    checkpoint.write(teacher / "last.pt", state | {"iteration": 7})
    with pytest.raises(InputError) as error:
        trainer(folder_data, tmp_path / "run", *given)
    assert "was not labeled by" in str(error.value) and "--restart to start" in str(error.value)
    assert files_of(tmp_path / "run") == whole
    trainer(folder_data, tmp_path / "run", *given, "--restart")
    about = json.loads((tmp_path / "run" / "pseudo" / "pseudo.json").read_text())
    assert about["iteration"] == 7


def test_an_image_that_cannot_be_read_has_no_label(teacher, tmp_path, capsys):
    data = write_scenes(tmp_path / "data", {"train": (4, 3), "val": (3, 0)})
    (data / "images" / "train" / "05.png").write_bytes(b"")
    trainer(data, tmp_path / "run", "--teacher", str(teacher))
    assert list(files_of(tmp_path / "run")) == ["04.png", "06.png", "pseudo.json"]
    assert "warning: skipped: image" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--accumulate", "2", "--checkpoint-activations"]])
def test_without_weight_a_run_is_supervised(teacher, folder_data, tmp_path, monkeypatch, more):
    """To the bit where the pseudo-labeled images move no statistics and draw no dropout."""
    options = *SMOOTH, "--forward", "separate", "--warmup", "0", *more
    given = "--teacher", str(teacher), "--pseudo-loss-weight", "0", "--no-normalize-pseudo-loss"
    test_methods.run(folder_data, tmp_path / "self", *options, *given)
    test_methods.use_class(Supervised, monkeypatch)
    test_methods.run(folder_data, tmp_path / "supervised", *options)
    one, other = (checkpoint.read(tmp_path / at / "last.pt") for at in ("self", "supervised"))
    assert_same_bits(one["method"], other["method"])


class Plain(SelfTraining):
    """Without the strong colors."""

    views = {"strong": View()}  # noqa: RUF012


def test_true_masks_in_plain_colors_are_supervised_training(folder_data, tiny, tmp_path):
    """On both lists: the labels are the true ones of the very crop."""
    masks = folder_data / "masks" / "train"
    with pytest.MonkeyPatch.context() as patch:
        test_methods.use_class(Plain, patch)
        options = "--labeled-share", "1/2", "--pseudo-labels", str(masks), "--no-dropout"
        trained = trainer(folder_data, tmp_path / "run", *options, "--no-normalize-pseudo-loss")
    trained.use_unlabeled(True)
    (step,) = trained.stream.steps(0, 1, True)
    right, known = step.unlabeled["right1"].sum(0).tolist()
    assert right == known > 0
    found = trained.method(step.labeled, step.unlabeled)
    logits = trained.network(torch.cat((step.labeled["image"], step.unlabeled["image_strong"])))
    labels = step.labeled["label"].long(), step.unlabeled["label1"].long()
    halves = zip(logits.chunk(2), labels, strict=True)
    expected = torch.stack([F.cross_entropy(*half, ignore_index=255) for half in halves]).mean()
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_student_alone_sees_strong_colors(tiny, folder_data, tmp_path):
    masks = "--pseudo-labels", str(folder_data / "masks" / "train"), "--labeled-share", "1/2"
    trained = trainer(folder_data, tmp_path / "run", *masks)
    (strong,) = trained.stream.steps(0, 1, True)
    trained.stream.views = Plain.views
    (plain,) = trained.stream.steps(0, 1, True)
    assert torch.equal(strong.labeled["image"], plain.labeled["image"])
    assert torch.equal(strong.unlabeled["label1"], plain.unlabeled["label1"])
    assert not torch.equal(strong.unlabeled["image_strong"], plain.unlabeled["image_strong"])


def test_slices_and_recomputation_change_no_run(tiny, teacher, folder_data, tmp_path, monkeypatch):
    options = [*test_methods.OPTIONS, "--teacher", str(teacher)]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test_methods.test_slices_and_recomputation_change_nothing(
        "self", folder_data, tmp_path, monkeypatch
    )


@pytest.mark.parametrize(
    "test",
    [
        test_methods.test_autocast_starts_where_fp32_does,
        test_methods.test_a_step_that_overflows_changes_no_weight,
    ],
)
def test_as_all_methods(test, tiny, teacher, folder_data, tmp_path, monkeypatch):
    options = [*test_methods.OPTIONS, "--teacher", str(teacher)]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test("self", folder_data, tmp_path, monkeypatch)


def as_rank(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "build_network", tiny_network)
        test_methods.as_rank(*arguments)


def test_two_processes_give_the_course_of_one(tiny, teacher, folder_data, tmp_path, monkeypatch):
    """And the same masks, each made by one of them."""
    # Padding: the ranks have different numbers of pixels.
    more = "--teacher", str(teacher), "--unlabeled-scale", "0.4,0.8"
    options = [*test_methods.OPTIONS, *more]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test_methods.run(folder_data, tmp_path / "one", "--no-dropout")
    two_ranks.run(as_rank, SelfTraining, options, folder_data, tmp_path)
    test_methods.assert_same_course("self", tmp_path / "one", tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_step_changes_what_it_may(tiny, teacher, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run", "--teacher", str(teacher))
    everything = set(trained.method.state_dict())
    assert one_step(trained, unlabeled=False) == everything - {"averages"}
    assert one_step(trained, unlabeled=True) == everything


def test_a_teacher_of_other_classes_is_refused(tiny, teacher, folder_data, tmp_path):
    state = checkpoint.read(teacher / "last.pt")
    checkpoint.write(teacher / "last.pt", state | {"classes": ["sky", "earth", "box"]})
    with pytest.raises(InputError) as error:
        trainer(folder_data, tmp_path / "run", "--teacher", str(teacher))
    assert str(error.value).startswith("class 1 is 'earth' in checkpoint")
    assert not (tmp_path / "run" / "pseudo").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "",
            "--method self_training needs labels of the unlabeled images: give --pseudo-labels or",
        ),
        ("--teacher a --pseudo-labels b", "--pseudo-labels and --teacher are both given: give one"),
        ("--teacher nowhere", "checkpoint nowhere does not exist"),
        ("--method cac --teacher a", "--teacher: --method cac takes none: leave it out, or use"),
        ("--pseudo-loss-weight -1", "--pseudo-loss-weight -1.0: must not be negative"),
    ],
)
def test_mistakes_are_one_line(options, message, folder_data, tmp_path):
    words = "--method", "self_training", *options.split()
    with pytest.raises(InputError) as error:
        trainer(folder_data, tmp_path / "run", *words)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_presets(tmp_path):
    def loss(*options: str) -> tuple[object, ...]:
        found = config.parse(["--method", "self_training", *options]).loss
        return found.forward, found.warmup, found.confidence, found.pseudo_loss_weight

    folder = "--dataset", "folder", "--data-dir", "d"
    assert loss(*folder) == ("joint", 0, 0, 1)
    assert loss("--dataset", "toycity") == ("joint", 60, 0, 1)
    assert loss(*folder, "--confidence", "0.5") == ("joint", 0, 0.5, 1)
