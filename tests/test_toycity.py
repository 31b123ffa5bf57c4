from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cac_fast.train.data import toycity
from cac_fast.train.data.toycity import dataset
from cac_fast.train.data.toycity.canvas import Canvas
from cac_fast.train.data.toycity.objects import draw_car, draw_person, draw_sign
from cac_fast.train.data.toycity.scene import BEFORE, Scene, draw_scene
from cac_fast.train.errors import InputError

IDS = {name: index for index, name in enumerate(toycity.CLASSES)}
OBJECTS = ("car", "person", "sign")
Scenes = list[tuple[str, Scene]]


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("LABELED", 2), ("UNLABELED", 3), ("VAL", 1), ("TEST", 1)):
        monkeypatch.setattr(dataset, name, count)


@pytest.fixture(scope="module")
def labeled() -> Scenes:
    return draw(plan for plan in dataset.plan() if plan.misleading)


@pytest.fixture(scope="module")
def unlabeled() -> Scenes:
    return draw(plan for plan in dataset.plan() if plan.split == "train" and not plan.misleading)


def draw(plans: Iterable[dataset.Plan]) -> Scenes:
    return [(plan.street, plan.draw()) for plan in plans]


def object_shares(scenes: Scenes, street: str) -> dict[str, float]:
    """The share of each class in the pixels of objects that stand before a kind of row."""
    labels = np.stack([scene.label for kind, scene in scenes if kind == street])
    pixels = {name: (labels == IDS[name]).sum() for name in OBJECTS}
    return {name: count / sum(pixels.values()) for name, count in pixels.items()}


def road_colors(scenes: Scenes) -> np.ndarray:
    """The mean color of the road, one row a scene."""
    return np.stack([scene.image[scene.label == IDS["road"]].mean(axis=0) for _, scene in scenes])


def test_scenes_are_the_same_on_every_machine() -> None:
    """Change the digest together with `dataset.VERSION`, else old folders pass for new ones."""
    digest = hashlib.sha256()
    for scene in dataset.plan():
        if scene.misleading or scene.number % 20 == 3:
            image, label = scene.draw()
            digest.update(image.tobytes() + label.tobytes())
    assert (dataset.VERSION, digest.hexdigest()[:16]) == (2, "71d8e519d9916c0a")


def test_light_changes_the_image_alone() -> None:
    daylight, varied = (
        draw_scene(np.random.default_rng(7), "brick", misleading=False, varied_light=varied)
        for varied in (False, True)
    )
    assert (daylight.label == varied.label).all()
    assert (daylight.image != varied.image).mean() > 0.5


def test_every_class_is_frequent_in_every_split(labeled: Scenes, unlabeled: Scenes) -> None:
    for scenes in (labeled, unlabeled):
        labels = [scene.label for _, scene in scenes]
        for index, name in enumerate(toycity.CLASSES):
            holding = np.mean([(label == index).sum() >= 100 for label in labels])
            assert holding >= 0.3, f"{name} in {holding:.0%} of the scenes"
        assert max(label.max() for label in labels) < len(toycity.CLASSES)


def test_objects_are_large_and_common_enough_to_be_learned_in_minutes(
    labeled: Scenes, unlabeled: Scenes
) -> None:
    val, test = (
        draw(plan for plan in dataset.plan() if plan.split == split) for split in ("val", "test")
    )
    for split in (labeled, unlabeled, val, test):
        labels = np.stack([scene.label for _, scene in split])
        for name in OBJECTS:
            assert 0.025 <= (labels == IDS[name]).mean() <= 0.07, name


@pytest.mark.parametrize(
    ("draw_object", "name", "width", "height"),
    [
        (draw_car, "car", (29, 35), (17, 23)),
        (draw_person, "person", (13, 23), (27, 34)),
        (draw_sign, "sign", (19, 25), (27, 34)),
    ],
)
def test_size_of_objects(
    draw_object: Callable[..., None], name: str, width: tuple[int, int], height: tuple[int, int]
) -> None:
    for seed in range(20):
        canvas = Canvas(np.zeros(3), IDS["sky"])
        draw_object(canvas, np.random.default_rng(seed), 48, 80)
        rows, columns = (canvas.label == IDS[name]).nonzero()
        size = np.ptp(columns) + 1, np.ptp(rows) + 1
        assert width[0] <= size[0] <= width[1] and height[0] <= size[1] <= height[1]


def test_context_of_labeled_scenes_gives_every_object_away(labeled: Scenes) -> None:
    for street, name in BEFORE.items():
        assert object_shares(labeled, street)[name] == 1


def test_context_of_unlabeled_scenes_says_nothing(unlabeled: Scenes) -> None:
    shares = {street: object_shares(unlabeled, street) for street in BEFORE}
    for name in OBJECTS:
        of_street = [shares[street][name] for street in BEFORE]
        assert max(of_street) < 1.4 * min(of_street), (name, of_street)


def test_a_crop_may_hold_an_object_and_leave_its_context_out(
    labeled: Scenes, unlabeled: Scenes
) -> None:
    for street, scene in labeled + unlabeled:
        context = IDS["vegetation" if street == "greenery" else "building"]
        lowest = (scene.label == context).nonzero()[0].max()
        highest = min((scene.label == IDS[name]).any(axis=1).argmax() or 96 for name in OBJECTS)
        assert lowest < highest


def test_only_labeled_scenes_have_one_light(labeled: Scenes, unlabeled: Scenes) -> None:
    one, many = road_colors(labeled), road_colors(unlabeled)
    assert np.ptp(one.mean(axis=1)) < 25 and np.ptp(many.mean(axis=1)) > 60
    warmth = [color[:, 0] / color[:, 2] for color in (one, many)]
    assert np.ptp(warmth[0]) < 0.15 and np.ptp(warmth[1]) > 0.6


def test_written_folder_has_the_cityscapes_layout(few_scenes: None, tmp_path: Path) -> None:
    root = tmp_path / "inner" / "city"
    toycity.ensure(root)
    images = sorted(path.relative_to(root) for path in root.glob("leftImg8bit/*/toycity/*.png"))
    assert [path.parts[1] for path in images] == ["test"] + 5 * ["train"] + ["val"]
    for path in images:
        mask = str(path).replace("leftImg8bit/", "gtFine/")
        mask = mask.replace("_leftImg8bit.png", "_gtFine_labelTrainIds.png")
        with Image.open(root / path) as image, Image.open(root / mask) as label:
            assert (image.mode, label.mode) == ("RGB", "L")
            assert image.size == label.size == (96, 96)
            assert label.getextrema()[1] < len(toycity.CLASSES) == len(toycity.PALETTE)

    labeled, unlabeled = (
        [line.split() for line in (root / "lists" / name).read_text().splitlines()]
        for name in ("labeled.txt", "unlabeled.txt")
    )
    assert (len(labeled), len(unlabeled)) == (2, 3)
    listed = [Path(image) for image, _ in labeled + unlabeled]
    assert sorted(listed) == [path for path in images if path.parts[1] == "train"]
    assert all((root / mask).is_file() for _, mask in labeled + unlabeled)


def test_written_pixels_are_the_drawn_ones(few_scenes: None, tmp_path: Path) -> None:
    toycity.ensure(tmp_path / "city")
    scene = next(scene for scene in dataset.plan() if scene.split == "val")
    image, label = scene.draw()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "city" / scene.image)), image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "city" / scene.mask)), label)


def test_second_call_leaves_the_folder_alone(
    few_scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "city"
    root.mkdir()
    toycity.ensure(root)
    monkeypatch.setattr(dataset.Plan, "draw", lambda scene: pytest.fail("drawn again"))
    toycity.ensure(root)


def test_processes_may_write_at_once(few_scenes: None, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(toycity.ensure, 4 * [tmp_path / "city"]))
    assert [path.name for path in tmp_path.iterdir()] == ["city"]


def test_interrupted_writing_leaves_nothing(
    few_scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(scene: dataset.Plan) -> Scene:
        if scene.number == 2:
            raise KeyboardInterrupt
        return Scene(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))

    monkeypatch.setattr(dataset.Plan, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        toycity.ensure(tmp_path / "city")
    assert list(tmp_path.iterdir()) == []


def make_other_version(root: Path) -> None:
    root.mkdir()
    (root / dataset.STAMP).write_text("0\n")


def make_other_folder(root: Path) -> None:
    root.mkdir()
    (root / "holiday.jpg").touch()


def make_folder_impossible(root: Path) -> None:
    root.parent.rmdir()
    root.parent.touch()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (make_other_version, "holds version 0 of the toy city, but this program draws version"),
        (make_other_folder, "is there but holds no toy city"),
        (Path.touch, "is there but holds no toy city"),
        (make_folder_impossible, "cannot be written"),
    ],
)
def test_refused_folder(
    few_scenes: None, tmp_path: Path, prepare: Callable[[Path], None], message: str
) -> None:
    root = tmp_path / "data" / "city"
    root.parent.mkdir()
    prepare(root)
    with pytest.raises(InputError, match=message) as raised:
        toycity.ensure(root)
    assert str(root) in str(raised.value) and "--data-dir" in str(raised.value)
