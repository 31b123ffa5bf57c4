"""Confusion matrix and evaluation, against a count written as plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from cac_fast.train.data.layouts import Sample, SegmentationData
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError
from cac_fast.train.evaluation import ConfusionMatrix, evaluate
from cac_fast.train.inference import Predictor

CLASSES = ("road", "sky", "car", "never")
ALONE = World(0, 1, torch.device("cpu"))


class Network(nn.Module):
    """A seeded 1 x 1 classifier that never answers the last class."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(len(CLASSES), 3, 1, 1, generator=generator))
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = nn.functional.conv2d(self.dropout(self.norm(x)), self.weight)
        logits[:, -1] = -100
        return logits


def make_data(folder: Path, count: int) -> SegmentationData:
    """`count` images of different sizes with masks of the first three classes and 255."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        size = (20 + 7 * index, 33 + 5 * index)
        image, mask = folder / f"{index}.png", folder / f"{index}_mask.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
        Image.fromarray(rng.choice(np.array([0, 1, 2, 255], np.uint8), size)).save(mask)
        samples.append(Sample(str(index), image, mask))
    palette = tuple((index, 0, 0) for index in range(len(CLASSES)))
    return SegmentationData(
        "folder", folder, CLASSES, palette, {"train": (), "val": tuple(samples), "test": ()}
    )


def slow_result(network: nn.Module, data: SegmentationData) -> dict:
    """The same numbers, a pixel at a time."""
    predictor = Predictor(network.eval(), data.classes, data.palette)
    both, true, predicted = ([0] * len(CLASSES) for _ in range(3))
    for sample in data.splits["val"]:
        guess = predictor.predict(Image.open(sample.image))
        for wanted, given_ in zip(
            np.asarray(Image.open(sample.mask)).ravel(), guess.ravel(), strict=True
        ):
            if wanted != 255:
                true[wanted] += 1
                predicted[given_] += 1
                both[wanted] += wanted == given_
    iou = [
        both[k] / (true[k] + predicted[k] - both[k]) if true[k] + predicted[k] else None
        for k in range(len(CLASSES))
    ]
    present = [value for value in iou if value is not None]
    return {
        "miou": sum(present) / len(present),
        "pixel_accuracy": sum(both) / sum(true),
        "iou": iou,
    }


def assert_same(result: dict, expected: dict) -> None:
    assert result.keys() == expected.keys()
    assert result["miou"] == pytest.approx(expected["miou"], rel=1e-12)
    assert result["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"], rel=1e-12)
    assert result["iou"] == expected["iou"]


@settings(max_examples=50)
@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), max_size=40))
def test_confusion_matrix_counts_what_a_loop_counts(
    classes: int, pixels: list[tuple[int, int]]
) -> None:
    truth = [255 if t >= classes else t for t, _ in pixels]
    guess = [p % classes for _, p in pixels]
    matrix = ConfusionMatrix(classes, "cpu")
    half = len(pixels) // 2
    for part in (slice(half), slice(half, None)):
        matrix.update(
            torch.tensor(truth[part], dtype=torch.uint8).view(1, -1),
            torch.tensor(guess[part], dtype=torch.int64).view(1, -1),
        )
    expected = [[0] * classes for _ in range(classes)]
    for t, p in zip(truth, guess, strict=True):
        if t != 255:
            expected[t][p] += 1
    assert matrix.counts.tolist() == expected and matrix.counts.dtype == torch.int64


def test_absent_classes_are_nan_and_left_out_of_the_mean() -> None:
    matrix = ConfusionMatrix(4, "cpu")
    matrix.update(torch.tensor([[0, 0, 1, 255]]), torch.tensor([[0, 2, 1, 3]]))
    assert matrix.iou.tolist()[:3] == [0.5, 1.0, 0.0] and math.isnan(matrix.iou[3])
    assert matrix.miou == 0.5
    assert matrix.iou_of_true[:2].tolist() == [0.5, 1.0]
    assert matrix.iou_of_true[2:].isnan().all()  # predicted but true nowhere; neither
    assert matrix.pixel_accuracy == pytest.approx(2 / 3)


def test_nothing_counted_is_nan() -> None:
    matrix = ConfusionMatrix(2, "cpu")
    matrix.update(torch.full((2, 2), 255, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8))
    assert math.isnan(matrix.miou) and math.isnan(matrix.pixel_accuracy)


def test_confusion_matrix_refuses_what_it_would_miscount() -> None:
    matrix = ConfusionMatrix(3, "cpu")
    with pytest.raises(ValueError, match="but prediction is"):
        matrix.update(torch.zeros(2, 3), torch.zeros(3, 2))
    for truth, guess in ((3, 0), (254, 0), (0, 3)):
        with pytest.raises(ValueError, match="not below 3"):
            matrix.update(torch.tensor([[truth]]), torch.tensor([[guess]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluate_is_what_a_loop_finds(tmp_path: Path, workers: int) -> None:
    data, network = make_data(tmp_path, 3), Network()
    seen, steps = [], []
    result = evaluate(
        network,
        data.splits["val"],
        data,
        ALONE,
        workers=workers,
        progress=lambda done, total: steps.append((done, total)),
        on_prediction=lambda image, truth, prediction: seen.append((image, truth, prediction)),
    )
    assert_same(result, slow_result(network, data))
    assert result["iou"][-1] is None
    assert steps == [(1, 3), (2, 3), (3, 3)]
    for sample, (image, truth, prediction) in zip(data.splits["val"], seen, strict=True):
        assert (image == np.asarray(Image.open(sample.image))).all()
        assert (truth == np.asarray(Image.open(sample.mask))).all()
        assert prediction.dtype == np.uint8 and prediction.shape == truth.shape


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluate_leaves_modes_and_random_state_alone(tmp_path: Path, workers: int) -> None:
    data, network = make_data(tmp_path, 1), Network().train()
    network.norm.eval()  # frozen
    former, random_state = (
        {k: v.clone() for k, v in network.state_dict().items()},
        torch.get_rng_state(),
    )
    evaluate(network, data.splits["val"], data, ALONE, workers=workers)
    assert network.training and network.dropout.training and not network.norm.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(former[name], value) for name, value in network.state_dict().items())


def test_evaluate_restores_modes_after_an_error(tmp_path: Path) -> None:
    data, network = make_data(tmp_path, 1), Network().train()
    data.splits["val"][0].image.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0\.png cannot be read"):
        evaluate(network, data.splits["val"], data, ALONE, workers=0)
    assert all(module.training for module in network.modules())


def test_autocast_reaches_the_network(tmp_path: Path) -> None:
    data, network, seen = make_data(tmp_path, 1), Network(), []
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    evaluate(network, data.splits["val"], data, ALONE, workers=0, autocast_dtype=torch.bfloat16)
    evaluate(network, data.splits["val"], data, ALONE, workers=0)
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda mask: Image.new("L", (5, 4)).save(mask),
            r"0_mask\.png is 5 x 4 but image .*0\.png is 33 x 20",
        ),
        (lambda mask: Image.new("L", (33, 20), 9).save(mask), r"0_mask\.png holds the id 9"),
        (lambda mask: Image.new("L", (33, 20), 255).save(mask), "every pixel"),
    ],
)
def test_bad_masks_are_one_sentence(tmp_path: Path, damage, message: str, workers: int) -> None:
    data = make_data(tmp_path, 1)
    damage(data.splits["val"][0].mask)
    with pytest.raises(InputError, match=message) as caught:
        evaluate(Network(), data.splits["val"], data, ALONE, workers=workers)
    assert "\n" not in str(caught.value)


def test_no_images_and_missing_masks_are_errors(tmp_path: Path) -> None:
    data = make_data(tmp_path, 1)
    with pytest.raises(InputError, match="no image"):
        evaluate(Network(), [], data, ALONE, workers=0)
    with pytest.raises(InputError, match=r"0\.png has no mask"):
        evaluate(Network(), [Sample("0", tmp_path / "0.png", None)], data, ALONE, workers=0)


def _two_ranks(rank: int, folder: Path, data: SegmentationData) -> None:
    torch.set_num_threads(1)  # a forked process must not use the threads of its parent
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    world, network, samples = World(rank, 2, torch.device("cpu")), Network(), data.splits["val"]
    steps: list[tuple[int, int]] = []
    found = [
        evaluate(network, some, data, world, workers=0, progress=lambda *step: steps.append(step))
        for some in (samples, samples[:1])
    ]
    # Of three images two or one; then the only one, or none.
    assert steps == ([(1, 2), (2, 2), (1, 1)] if rank == 0 else [(1, 1)])
    # Sample 1 is rank 1's: rank 0 must hear of it and not wait for ever.
    dist.barrier()
    if rank == 1:
        samples[1].image.write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        evaluate(network, samples, data, world, workers=0)
    (folder / f"{rank}.json").write_text(json.dumps([*found, str(caught.value)]))
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_two_processes_count_each_image_once_and_stop_together(tmp_path: Path) -> None:
    data, network = make_data(tmp_path, 3), Network()
    uneven = slow_result(network, data)
    single = evaluate(network, data.splits["val"][:1], data, ALONE, workers=0)
    torch.multiprocessing.start_processes(
        _two_ranks, (tmp_path, data), nprocs=2, start_method="fork"
    )
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_same(found[0], uneven)
        assert_same(found[1], single)
        assert "1.png cannot be read" in found[2]


def test_image_that_does_not_fit_in_memory(tmp_path, monkeypatch):
    data = make_data(tmp_path, 2)

    def full(self, image):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Predictor, "logits", full)
    with pytest.raises(InputError, match=r"0\.png \(33 x 20\) does not fit .* smaller"):
        evaluate(Network(), data.splits["val"], data, ALONE, workers=0)
