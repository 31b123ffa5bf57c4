"""FixMatch and UniMatch: losses against loops in float64, what learns, and what changes nothing."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import test_methods
import test_step
import torch
import torch.nn.functional as F
from small_training import CPU
from test_methods import names, one_step, trainer
from test_step import IMAGES, Backbone, Head
from test_step import batches as batches_of_cac
from torch import Tensor
from toy_methods import TOYS

from cac_fast.train import config
from cac_fast.train.errors import InputError
from cac_fast.train.methods import fixmatch
from cac_fast.train.methods.fixmatch import FixMatch
from cac_fast.train.methods.mixing import cutmix, inside
from cac_fast.train.networks import Segmenter

V1 = "--strong-views 2 --feature-dropout channel".split()
V2 = "--strong-views 2 --feature-dropout complementary".split()
WITH_CAC = "--dc-weight 0.1 --threshold 0 --dc-backend reference".split()
SIDE = 32
LEARNED = ("--confidence", "0.4", "--unsupervised-weight", "0.7")

variants = pytest.mark.parametrize("variant", [[], V1, V2, [*V2, *WITH_CAC]], ids=" ".join)
forwards = pytest.mark.parametrize("forward", ["joint", "separate"])


def method(*options: str, frozen: bool = False) -> FixMatch:
    """In float64, with a teacher that knows something else; frozen: as `test_step.method`."""
    arguments = "--dataset toycity --method fixmatch".split()
    settings = config.parse([*arguments, *LEARNED, *options])
    torch.manual_seed(0)
    network = Segmenter(Backbone(), Head(), 3, dropout=0.5)
    result = FixMatch(lambda: network, CPU, settings, torch.float64).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in result.teacher.parameters():
            weight += 0.3 * torch.randn_like(weight)
    return result.eval() if frozen else result


@functools.cache
def batches() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Crops with padding at the bottom or at a side, boxes that meet it, one empty box."""
    labeled, unlabeled = batches_of_cac()
    generator = torch.Generator().manual_seed(4)
    for name in ("weak", "strong1", "strong2"):
        shape = IMAGES, 3, SIDE, SIDE
        unlabeled[f"image_{name}"] = torch.randn(shape, dtype=torch.float64, generator=generator)
    boxes = [[4, 2, 20, 32], [0, 0, 0, 0], [10, 10, 32, 31], [1, 5, 9, 8]]
    for number in (1, 2):
        turned = [boxes[(image + number) % IMAGES] for image in range(IMAGES)]
        unlabeled[f"boxes_strong{number}"] = torch.tensor(turned, dtype=torch.int16).unsqueeze(1)
    on_image = torch.ones(IMAGES, SIDE, SIDE, dtype=torch.bool)
    on_image[1, 16:], on_image[2, :, :8], on_image[3, 8:, 24:] = False, False, False
    unlabeled["on_image1"] = on_image
    return labeled, unlabeled


@pytest.fixture(autouse=True)
def same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_step.step` takes these."""
    monkeypatch.setattr(test_step, "batches", batches)


def cross_entropy(logits: Tensor, told: dict[tuple[int, int, int], int]) -> Tensor:
    """Summed over the pixels (image, y, x) that have a label."""
    log = logits.log_softmax(1)
    return -torch.stack([log[i, label, y, x] for (i, y, x), label in told.items()]).sum()


def by_loops(model: FixMatch, drop: dict[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Losses without the contrastive one, pixel by pixel; drop: masks of the backbone's maps."""
    labeled, unlabeled = batches()
    network, on_image = model.network, unlabeled["on_image1"]

    def logits(name: str, images: Tensor) -> Tensor:
        low, high = network.backbone(images)
        if name in drop:
            of_low, of_high = (mask[:, :, None, None] for mask in drop[name])
            low, high = low * of_low, high * of_high
        small = network.classifier(network.head(low, high))
        return F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=True)

    known = {
        (i, y, x): int(labeled["label"][i, y, x])
        for i, y, x in (labeled["label"] != 255).nonzero().tolist()
    }
    loss_ce = cross_entropy(logits("", labeled["image"]), known) / len(known)
    certainty = model.teacher.copy(unlabeled["image_weak"]).detach().softmax(1)
    losses = []
    for name in [f"strong{n}" for n in range(1, len(model.strong) + 1)] + ["weak"]:
        images, told, valid = unlabeled[f"image_{name}"].clone(), {}, 0
        for i in range(IMAGES):
            box = [0] * 4 if name == "weak" else unlabeled[f"boxes_{name}"][i, 0].tolist()
            for y in range(SIDE):
                for x in range(SIDE):
                    covered = box[0] <= y < box[2] and box[1] <= x < box[3]
                    of = [1, 0, 3, 2][i] if covered else i
                    images[i, :, y, x] = unlabeled[f"image_{name}"][of, :, y, x]
                    if on_image[of, y, x]:
                        valid += 1
                        if certainty[of, :, y, x].max() >= model.confidence:
                            told[i, y, x] = int(certainty[of, :, y, x].argmax())
        losses.append(cross_entropy(logits(name, images), told) / valid)
        confident = len(told) / valid
    *strong, weak = losses
    loss_u = sum(strong) / len(strong)
    if model.dropout == "channel":
        loss_u = loss_u / 2 + weak / 2
    loss = 0.5 * loss_ce + 0.5 * 0.7 * loss_u
    return {"loss": loss, "loss_ce": loss_ce, "loss_u": loss_u, "confident": confident}


@pytest.mark.parametrize("variant", [[], V1, V2], ids=" ".join)
@forwards
def test_losses_and_gradients_are_those_of_loops(variant, forward, monkeypatch):
    model = method(*variant, "--forward", forward, frozen=True)
    masks = model.complementary_masks(IMAGES)
    drop = dict(zip(("strong1", "strong2"), masks, strict=True)) if variant == V2 else {}
    if variant == V1:
        drop = {"weak": masks[0]}
    monkeypatch.setattr(model, "complementary_masks", lambda _: masks)
    monkeypatch.setattr(model, "random_masks", lambda _: masks[0])
    found, expected = model(*batches()), by_loops(model, drop)
    assert found.keys() == expected.keys() and 0.2 < found["confident"] < 0.9
    for name, value in expected.items():
        rel = 1e-6 if name == "confident" else 1e-12  # a quotient of integers is float32
        assert found[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=rel), name
    weights = list(model.network.parameters())
    here, there = (torch.autograd.grad(losses["loss"], weights) for losses in (found, expected))
    torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-12)


@forwards
def test_the_contrastive_term_is_that_of_cac(forward):
    """Of the same views, and its gradient half of CAC's, as all of the loss is halved."""
    options = *WITH_CAC, "--forward", forward
    model, cac = method(*options, frozen=True), test_step.method(*options, frozen=True)
    cac.load_state_dict(
        {name: x for name, x in model.state_dict().items() if not name.startswith("teacher")}
    )
    (found, gradients), (expected, of_cac) = test_step.step(model), test_step.step(cac)
    assert expected["active"] > 0
    for name in expected.keys() - {"loss"}:
        torch.testing.assert_close(found[name], expected[name])
    projector = len(list(cac.projector.parameters()))
    assert projector == 4 and found["loss_dc"] > 0
    start = len(list(model.network.parameters()))
    for here, there in zip(gradients[start : start + 4], of_cac[start:], strict=True):
        torch.testing.assert_close(2 * here, there)
    parts = found["loss_ce"] + 0.7 * found["loss_u"] + 0.1 * found["loss_dc"]
    torch.testing.assert_close(found["loss"], parts / 2)


def test_nothing_learns_through_the_teacher():
    model = method()
    assert not any(weight.requires_grad for weight in model.teacher.parameters())
    model.teacher.requires_grad_(True)
    labeled, unlabeled = batches()
    weak = unlabeled["image_weak"].clone().requires_grad_()
    model(labeled, unlabeled | {"image_weak": weak})["loss"].backward()
    assert weak.grad is None
    assert all(weight.grad is None for weight in model.teacher.parameters())
    assert all(weight.grad.abs().max() > 0 for weight in model.network.parameters())


@pytest.mark.parametrize("variant", [[], V1, V2], ids=" ".join)
def test_without_weight_half_the_supervised_gradient_stays(variant):
    options = *variant, "--forward", "separate", "--unsupervised-weight", "0"
    found = []
    for with_unlabeled in (False, True):
        model = method(*options)
        labeled, unlabeled = batches()
        masks = model.complementary_masks(IMAGES)
        # Drawn before those of the network's dropout, which both are to have alike.
        model.complementary_masks = lambda _, masks=masks: masks
        model.random_masks = lambda _, masks=masks: masks[0]
        torch.manual_seed(2)
        model(labeled, unlabeled if with_unlabeled else None)["loss"].backward()
        found.append([weight.grad for weight in model.network.parameters()])
    for whole, half in zip(*found, strict=True):
        assert torch.equal(whole / 2, half) and half.abs().max() > 0


@variants
def test_with_no_confidence_there_is_no_loss(variant):
    model = method(*variant, "--confidence", "1.01")
    losses = model(*batches())
    assert losses["loss_u"] == 0 and losses["confident"] == 0 and losses["loss"].isfinite()
    everywhere = method(*variant, "--confidence", "0")(*batches())
    assert everywhere["confident"] == 1 and everywhere["loss_u"] > 0


def test_a_box_of_the_whole_crop_makes_the_partner():
    model = method()
    _, unlabeled = batches()
    whole = torch.tensor([0, 0, SIDE, SIDE], dtype=torch.int16).expand(IMAGES, 1, 4)
    weak = model.labeled_by_teacher(unlabeled)
    (mixed,) = model.strong_parts(unlabeled | {"boxes_strong1": whole}, weak)
    partners = [1, 0, 3, 2]
    assert torch.equal(mixed.images, unlabeled["image_strong1"][partners])
    assert torch.equal(mixed.labels, weak.labels[partners])
    assert torch.equal(mixed.valid, weak.valid[partners])
    empty = torch.zeros_like(whole)
    (same,) = model.strong_parts(unlabeled | {"boxes_strong1": empty}, weak)
    assert torch.equal(same.images, unlabeled["image_strong1"])
    assert torch.equal(same.labels, weak.labels)
    odd = torch.arange(3)
    assert torch.equal(cutmix(odd, odd >= 0), torch.tensor([1, 0, 2]))


def test_boxes_end_before_their_last_row_and_column():
    covered = inside(torch.tensor([[[1, 2, 3, 6]]], dtype=torch.int16), torch.Size((5, 7)))
    assert covered.shape == (1, 5, 7)
    expected = [[0, y, x] for y in (1, 2) for x in (2, 3, 4, 5)]
    assert covered.nonzero().tolist() == expected


def test_complementary_masks_sum_to_2():
    model = method(*V2)
    kept = []
    for _ in range(20):
        one, two = model.complementary_masks(6)
        assert [mask.shape for mask in one] == [(6, 8), (6, 8)]
        for first, second in zip(one, two, strict=True):
            assert torch.equal(first + second, torch.full_like(first, 2))
        ones = [(mask == 1).all(1) for mask in one]
        assert torch.equal(*ones) and ones[0].sum() == 3
        assert all(set(mask[~ones[0]].flatten().tolist()) == {0, 2} for mask in one)
        assert not torch.equal(*one)
        kept.append(ones[0])
    assert not torch.stack(kept).all(0).any()


@variants
def test_padding_gets_no_gradient(variant, monkeypatch):
    kept: list[Tensor] = []
    upsample = fixmatch.upsample_logits

    def upsampled(logits: Tensor, size: torch.Size) -> Tensor:
        kept.append(upsample(logits, size))
        kept[-1].retain_grad()
        return kept[-1]

    monkeypatch.setattr(fixmatch, "upsample_logits", upsampled)
    model = method(*variant, "--confidence", "0")
    _, unlabeled = batches()
    parts = model.strong_parts(unlabeled, model.labeled_by_teacher(unlabeled))
    model(*batches())["loss"].backward()
    valid = [part.valid for part in parts]
    valid += [unlabeled["on_image1"]] if variant == V1 else []
    assert len(kept) == 1 + len(valid)
    for logits, on_image in zip(kept[1:], valid, strict=True):
        learns = logits.grad.abs().amax(1) > 0
        assert torch.equal(learns, on_image) and not on_image.all()


@variants
@forwards
def test_slices_change_nothing(variant, forward):
    options = *variant, "--forward", forward
    whole, sliced = (method(*options, "--accumulate", n, frozen=True) for n in ("1", "2"))
    losses, gradients = test_step.step(whole)
    losses2, gradients2 = test_step.step(sliced)
    torch.testing.assert_close(losses2, losses)
    learned = [(a, b) for a, b in zip(gradients, gradients2, strict=True) if a is not None]
    assert len(learned) == len([x for x in whole.parameters() if x.requires_grad])
    for one, other in learned:
        torch.testing.assert_close(other, one)
    passes = 1 if forward == "joint" else len(whole.views) - (variant != V1) + 1
    assert whole.network.backbone.calls == passes
    assert sliced.network.backbone.calls == 4 * passes - 1  # the last one is not computed again


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of all methods have this one too."""
    monkeypatch.setitem(TOYS, "fixmatch", FixMatch)
    monkeypatch.setitem(test_methods.SCALARS, "fixmatch", ("loss_u", "confident"))
    options = [*test_methods.OPTIONS, "--method", "fixmatch", *LEARNED]
    monkeypatch.setattr(test_methods, "OPTIONS", options)
    test_methods.use("fixmatch", monkeypatch)


@pytest.mark.parametrize(
    ("variant", "precision"),
    [([], "fp32"), ([], "fp16"), (V1, "fp32"), (V2, "fp32")],
    ids=str,
)
def test_interrupted_run_ends_with_the_same_bits(
    variant, precision, tiny, folder_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(test_methods, "OPTIONS", [*test_methods.OPTIONS, *variant])
    given = "fixmatch", precision, folder_data, tmp_path, monkeypatch
    test_methods.test_interrupted_run_ends_with_the_same_bits(*given)


def test_two_processes_give_the_course_of_one(tiny, folder_data, tmp_path, monkeypatch):
    # Padding: the ranks have different numbers of pixels.
    more = "--unlabeled-scale", "0.4,0.8"
    monkeypatch.setattr(test_methods, "OPTIONS", [*test_methods.OPTIONS, *more])
    given = "fixmatch", folder_data, tmp_path, monkeypatch
    test_methods.test_two_processes_give_the_course_of_one(*given)


def test_slices_and_recomputation_change_no_run(tiny, folder_data, tmp_path, monkeypatch):
    given = "fixmatch", folder_data, tmp_path, monkeypatch
    test_methods.test_slices_and_recomputation_change_nothing(*given)


@pytest.mark.parametrize(
    "test",
    [
        test_methods.test_autocast_starts_where_fp32_does,
        test_methods.test_a_step_that_overflows_changes_no_weight,
    ],
)
def test_as_all_methods(test, tiny, folder_data, tmp_path, monkeypatch):
    test("fixmatch", folder_data, tmp_path, monkeypatch)


@pytest.mark.parametrize("contrastive", [False, True])
def test_a_step_changes_what_it_may(contrastive, tiny, tmp_path, monkeypatch):
    words = "--dataset toycity --batch-size 2 --crop-size 32 --iterations 4 --workers 0 --method "
    words += "fixmatch --device cpu --confidence 0 --threshold 0 --no-negative-sampling"
    monkeypatch.setattr(test_methods, "OPTIONS", words.split())
    more = WITH_CAC if contrastive else []
    trained = trainer(tmp_path / "toycity", tmp_path / "run", *more)
    model = trained.method
    assert isinstance(model, FixMatch) and trained.network is model.teacher.copy
    counts = {n for n in names(model, "teacher") if n.endswith("num_batches_tracked")}
    everything, projector = names(model, "network", "teacher") - counts, names(model, "projector")
    assert len(projector) == 4 * contrastive
    assert one_step(trained, unlabeled=False) == everything
    assert one_step(trained, unlabeled=True) == everything | projector
    held = {id(w) for group in trained.optimizer.param_groups for w in group["params"]}
    assert held == {id(w) for part in (model.network, model.projector) for w in part.parameters()}


@pytest.mark.parametrize(("decay", "same"), [("0", True), ("0.5", False)])
def test_without_decay_the_teacher_is_the_student(decay, same, tiny, folder_data, tmp_path):
    trained = trainer(folder_data, tmp_path / "run", "--ema-decay", decay)
    for unlabeled in (False, True):
        one_step(trained, unlabeled)
    states = trained.method.network.state_dict(), trained.network.state_dict()
    equal = {
        name: torch.equal(value, states[1][name])
        for name, value in states[0].items()
        if value.is_floating_point()
    }
    assert all(equal.values()) if same else not any(equal.values())


def test_views_and_their_order():
    """Those of the contrastive loss come last and leave the draws of the others as they are."""
    assert list(method().views) == ["weak", "strong1"]
    assert list(method(*V2, *WITH_CAC).views) == ["weak", "strong1", "strong2", "1", "2"]


def test_presets(tmp_path: Path):
    def loss(*options: str) -> tuple[object, ...]:
        found = config.parse(["--method", "fixmatch", *options]).loss
        return found.forward, found.warmup, found.dc_weight

    folder = "--dataset", "folder", "--data-dir", "d"
    assert loss(*folder) == ("joint", 0, 0)
    assert loss("--dataset", "toycity") == ("joint", 60, 0)
    toml = tmp_path / "run.toml"
    toml.write_text('warmup = 5\nforward = "separate"\ndc_weight = 0.1\n')
    assert loss(*folder, "--config", str(toml)) == ("separate", 5, 0.1)
    assert loss(*folder, "--config", str(toml), "--warmup", "6") == ("separate", 6, 0.1)
    assert loss(*folder, "--method", "cac") == ("separate", None, 0.1)
    toml.write_text('method = "fixmatch"\n')
    given = config.parse([*folder, "--config", str(toml)]).loss
    assert (given.forward, given.warmup) == ("joint", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (V2[2:], "--feature-dropout complementary needs a pair of strong views: use --strong"),
        (["--strong-views", "3"], "--strong-views 3: must be 0, 1 or 2"),
        (["--strong-views", "0"], "--strong-views 0: fixmatch needs one or two strong views"),
        (["--feature-dropout", "chanel"], "did you mean channel?"),
        (["--ema-decay", "1"], "--ema-decay 1.0: must be below 1"),
        (["--confidence", "-1"], "--confidence -1.0: must not be negative"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str):
    with pytest.raises(InputError) as error:
        method(*options)
    assert message in str(error.value) and "\n" not in str(error.value)
