"""Mean Teacher: its losses against loops in float64, what learns, and what changes nothing."""

from __future__ import annotations

import functools
import math

import pytest
import small_training
import test_methods
import test_step
import torch
import torch.nn.functional as F
from small_training import CPU, assert_same_bits, losses
from test_methods import names, one_step, trainer
from test_step import IMAGES, Backbone, Head
from test_step import batches as batches_of_cac
from torch import Tensor
from toy_methods import TOYS

from cac_fast.train import checkpoint, config
from cac_fast.train.errors import InputError
from cac_fast.train.methods import Method, base
from cac_fast.train.methods.mean_teacher import MeanTeacher
from cac_fast.train.methods.supervised import Supervised
from cac_fast.train.networks import Segmenter

SIDE, CLASSES = 32, 3
STRONG = ["--strong-views", "1"]
WARMUP, ITERATIONS = 60, 200  # toycity's

variants = pytest.mark.parametrize("variant", [[], STRONG], ids=" ".join)
forwards = pytest.mark.parametrize("forward", ["separate", "joint"])


def method(*options: str, kind: type[Method] = MeanTeacher, frozen: bool = False) -> Method:
    """In float64 within the ramp, with a teacher that knows something else; frozen: as
    `test_step.method`."""
    arguments = "--dataset toycity --method mean_teacher".split()
    settings = config.parse([*arguments, *options])
    torch.manual_seed(0)
    network = Segmenter(Backbone(), Head(), CLASSES, dropout=0.5)
    result = kind(lambda: network, CPU, settings, torch.float64).double()
    result.iteration = WARMUP + 5
    if kind is MeanTeacher:
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in result.teacher.parameters():
                weight += 0.3 * torch.randn_like(weight)
    return result.eval() if frozen else result


@functools.cache
def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Crops with padding at the bottom or at a side, and labels with 255."""
    labeled, unlabeled = batches_of_cac()
    on_image = torch.ones(IMAGES, SIDE, SIDE, dtype=torch.bool)
    on_image[1, 16:], on_image[2, :, :8], on_image[3, 8:, 24:] = False, False, False
    images = {"image_weak": unlabeled["image_1"], "image_strong": unlabeled["image_2"]}
    return labeled, images | {"on_image1": on_image}


@pytest.fixture(autouse=True)
def same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_step.step` takes these."""
    monkeypatch.setattr(test_step, "batches", batches)


def by_loops(model: MeanTeacher, seen: str) -> dict[str, Tensor]:
    """Losses pixel by pixel."""
    labeled, unlabeled = batches()

    def probabilities(network: Segmenter, images: Tensor) -> Tensor:
        small = network.classifier(network.head(*network.backbone(images)))
        logits = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=True)
        powers = logits.exp()
        return powers / powers.sum(1, keepdim=True)

    of_labeled = probabilities(model.network, labeled["image"])
    student = probabilities(model.network, unlabeled[f"image_{seen}"])
    teacher = probabilities(model.teacher.copy, unlabeled["image_weak"]).detach()
    entropies, distances = [], []
    for i in range(IMAGES):
        for y in range(SIDE):
            for x in range(SIDE):
                label = int(labeled["label"][i, y, x])
                if label != 255:
                    entropies.append(-of_labeled[i, label, y, x].log())
                if unlabeled["on_image1"][i, y, x]:
                    apart = [student[i, k, y, x] - teacher[i, k, y, x] for k in range(CLASSES)]
                    distances.append(sum(each * each for each in apart))
    assert 0 < len(entropies) < IMAGES * SIDE**2 and 0 < len(distances) < IMAGES * SIDE**2
    loss_ce, loss_u = torch.stack(entropies).mean(), torch.stack(distances).mean()
    ramp = math.exp(-5 * (1 - 5 / (ITERATIONS / 16)) ** 2)
    loss = loss_ce + 5 * ramp * loss_u
    return {"loss": loss, "loss_ce": loss_ce, "loss_u": loss_u, "ramp": torch.tensor(ramp)}


@variants
@forwards
def test_losses_and_gradients_are_those_of_loops(variant, forward):
    model = method(*variant, "--forward", forward, frozen=True)
    found, expected = model(*batches()), by_loops(model, "strong" if variant else "weak")
    assert found.keys() == expected.keys() and found["loss_u"] > 0.01
    for name, value in expected.items():
        rel = 1e-6 if name == "ramp" else 1e-12
        assert found[name].item() == pytest.approx(value.item(), rel=rel), name
    weights = list(model.network.parameters())
    here, there = (torch.autograd.grad(losses["loss"], weights) for losses in (found, expected))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-12)


def test_the_ramp_starts_after_the_warmup():
    model, found = method(frozen=True), {}
    for step in (0, 6, 12, 13, 100):
        model.iteration = WARMUP + step
        losses = model(*batches())
        found[step] = losses["ramp"].item()
        weighted = losses["loss"] - losses["loss_ce"]
        assert weighted.item() == pytest.approx(5 * found[step] * losses["loss_u"].item())
    assert found[0] == pytest.approx(math.exp(-5)) and found[12] < found[13] == found[100] == 1


def test_nothing_learns_through_the_teacher():
    model = method(*STRONG)
    assert not any(weight.requires_grad for weight in model.teacher.parameters())
    model.teacher.requires_grad_(True)
    labeled, unlabeled = batches()
    weak = unlabeled["image_weak"].clone().requires_grad_()
    model(labeled, unlabeled | {"image_weak": weak})["loss"].backward()
    assert weak.grad is None
    assert all(weight.grad is None for weight in model.teacher.parameters())
    assert all(weight.grad.abs().max() > 0 for weight in model.network.parameters())
    assert not model.train().teacher.copy.training


@variants
def test_without_weight_the_supervised_gradient_stays(variant):
    """To the bit, and with the same dropout: the labeled images come first."""
    found = []
    for kind in (MeanTeacher, Supervised):
        model = method(*variant, "--unsupervised-weight", "0", kind=kind)
        torch.manual_seed(2)
        model(*batches())["loss"].backward()
        found.append([weight.grad for weight in model.network.parameters()])
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there) and here.abs().max() > 0


def kept_logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All that methods will upsample, with the gradients that they get."""
    kept: list[Tensor] = []
    upsample = base.upsample_logits

    def upsampled(logits: Tensor, size: torch.Size) -> Tensor:
        kept.append(upsample(logits, size))
        if kept[-1].requires_grad:
            kept[-1].retain_grad()
        return kept[-1]

    monkeypatch.setattr(base, "upsample_logits", upsampled)
    return kept


@forwards
def test_padding_gets_no_gradient(forward, monkeypatch):
    kept = kept_logits(monkeypatch)
    labeled, unlabeled = batches()
    method("--forward", forward)(labeled, unlabeled)["loss"].backward()
    assert len(kept) == {"separate": 2, "joint": 1}[forward]
    gradient = torch.cat([logits.grad for logits in kept]).abs().amax(1)
    counted = torch.cat((labeled["label"] != 255, unlabeled["on_image1"]))
    assert torch.equal(gradient > 0, counted) and not counted.all()


@forwards
def test_batch_statistics_are_those_of_the_passes(forward):
    model = method("--forward", forward)
    model(*batches())
    count = model.network.backbone.high[1].num_batches_tracked
    assert count == {"separate": 2, "joint": 1}[forward]
    assert model.teacher.copy.backbone.high[1].num_batches_tracked == 0


@variants
@forwards
def test_slices_change_nothing(variant, forward):
    options = *variant, "--forward", forward
    whole, sliced = (method(*options, "--accumulate", n, frozen=True) for n in ("1", "2"))
    (losses1, gradients1), (losses2, gradients2) = map(test_step.step, (whole, sliced))
    torch.testing.assert_close(losses2, losses1)
    learned = len(list(whole.network.parameters()))
    torch.testing.assert_close(gradients2[:learned], gradients1[:learned])
    passes = 1 if forward == "joint" else 2
    assert whole.network.backbone.calls == passes
    assert sliced.network.backbone.calls == 4 * passes - 1  # the last one is not computed again
    assert whole.teacher.copy.backbone.calls == 1 and sliced.teacher.copy.backbone.calls == 2


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of all methods have this one too; images smaller than the crops."""
    monkeypatch.setitem(TOYS, "mean", MeanTeacher)
    monkeypatch.setitem(test_methods.SCALARS, "mean", ("loss_u", "ramp"))
    more = "--method mean_teacher --unlabeled-scale 0.4,0.8 --unsupervised-weight 50".split()
    monkeypatch.setattr(test_methods, "OPTIONS", [*test_methods.OPTIONS, *more])
    test_methods.use("mean", monkeypatch)


@variants
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_interrupted_run_ends_with_the_same_bits(
    variant, precision, tiny, folder_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(test_methods, "OPTIONS", [*test_methods.OPTIONS, *variant])
    given = "mean", precision, folder_data, tmp_path, monkeypatch
    test_methods.test_interrupted_run_ends_with_the_same_bits(*given)


def test_two_processes_give_the_course_of_one(tiny, folder_data, tmp_path, monkeypatch):
    given = "mean", folder_data, tmp_path, monkeypatch
    test_methods.test_two_processes_give_the_course_of_one(*given)


def test_slices_and_recomputation_change_no_run(tiny, folder_data, tmp_path, monkeypatch):
    given = "mean", folder_data, tmp_path, monkeypatch
    test_methods.test_slices_and_recomputation_change_nothing(*given)


@pytest.mark.parametrize(
    "test",
    [
        test_methods.test_autocast_starts_where_fp32_does,
        test_methods.test_a_step_that_overflows_changes_no_weight,
    ],
)
def test_as_all_methods(test, tiny, folder_data, tmp_path, monkeypatch):
    test("mean", folder_data, tmp_path, monkeypatch)


def test_a_step_changes_what_it_may(tiny, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run")
    model = trained.method
    assert isinstance(model, MeanTeacher) and trained.network is model.teacher.copy
    counts = {n for n in names(model, "teacher") if n.endswith("num_batches_tracked")}
    everything = names(model, "network", "teacher") - counts
    for unlabeled in (False, True):
        assert one_step(trained, unlabeled) == everything
    held = {id(w) for group in trained.optimizer.param_groups for w in group["params"]}
    assert held == {id(weight) for weight in model.network.parameters()}


@pytest.mark.parametrize(("decay", "same"), [("0", True), ("0.5", False)])
def test_without_decay_the_teacher_is_the_student(decay, same, tiny, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run", "--ema-decay", decay)
    for unlabeled in (False, True):
        one_step(trained, unlabeled)
    states = trained.method.network.state_dict(), trained.network.state_dict()
    equal = [
        torch.equal(value, states[1][name])
        for name, value in states[0].items()
        if value.is_floating_point()
    ]
    assert all(equal) if same else not any(equal)


@variants
def test_a_run_scores_the_teacher(variant, folder_data, tmp_path):
    lines = small_training.run(folder_data, tmp_path, "--method", "mean_teacher", *variant)
    assert "loss_u" not in lines[0]  # of the warm-up
    assert min(losses(lines[2:], "loss_u")) > 0 and losses(lines[2:], "ramp")[1:] == [1] * 7
    assert losses(lines[2:], "ramp")[0] == pytest.approx(math.exp(-5))
    best, last = (checkpoint.read(tmp_path / name) for name in ("best.pt", "last.pt"))
    of_teacher, of_student = (
        {n.removeprefix(part): x for n, x in last["method"].items() if n.startswith(part)}
        for part in ("teacher.copy.", "network.")
    )
    assert_same_bits(best["network"], of_teacher)
    assert not torch.equal(*(x["classifier.1.weight"] for x in (of_teacher, of_student)))


def test_presets_and_views():
    def loss(*options: str) -> tuple[object, ...]:
        found = config.parse(["--method", "mean_teacher", *options]).loss
        weights = found.unsupervised_weight, found.ema_decay
        return found.forward, found.warmup, found.strong_views, *weights

    folder = "--dataset", "folder", "--data-dir", "d"
    assert loss(*folder) == ("separate", 0, 0, 5, 0.99)
    assert loss("--dataset", "toycity") == ("separate", 60, 0, 5, 0.99)
    colors = {name: view.color for name, view in method(*STRONG).views.items()}
    assert colors == {"weak": None, "strong": "strong"} and list(method().views) == ["weak"]


def test_two_strong_views_are_one_line():
    with pytest.raises(InputError) as error:
        method("--strong-views", "2")
    message = "--strong-views 2: the student of mean_teacher sees one view, use 0 (weak) or 1 "
    assert str(error.value) == message + "(strong)"
