from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cac_fast.train.data import toycity
from cac_fast.train.data.toycity import dataset
from cac_fast.train.data.toycity.canvas import Canvas
from cac_fast.train.data.toycity.objects import draw_car, draw_person, draw_sign
from cac_fast.train.data.toycity.scene import REACH, Scene
from cac_fast.train.errors import InputError

IDS = {name: index for index, name in enumerate(toycity.CLASSES)}
OBJECTS = ("car", "person", "sign")


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("LABELED", 2), ("UNLABELED", 3), ("VAL", 1), ("TEST", 1)):
        monkeypatch.setattr(dataset, name, count)


@pytest.fixture(scope="module")
def labeled() -> list[Scene]:
    return [scene.draw() for scene in dataset.plan() if scene.misleading]


@pytest.fixture(scope="module")
def unlabeled() -> list[Scene]:
    plans = [scene for scene in dataset.plan() if scene.split == "train" and not scene.misleading]
    return [scene.draw() for scene in plans[:40]]


def count_contacts(scenes: list[Scene]) -> np.ndarray:
    """How many pixels of one class touch one of another, sideways or up and down: (8, 8)."""
    contacts = np.zeros((len(IDS), len(IDS)), dtype=np.int64)
    for scene in scenes:
        for one, other in (
            (scene.label[:, 1:], scene.label[:, :-1]),
            (scene.label[1:], scene.label[:-1]),
        ):
            np.add.at(contacts, (one, other), 1)
    return contacts + contacts.T


def contact_shares(scenes: list[Scene], name: str) -> dict[str, float]:
    """The share of each background class in what surrounds the objects of a class."""
    row = count_contacts(scenes)[IDS[name]]
    total = sum(row[IDS[other]] for other in IDS if other not in OBJECTS)
    return {other: row[IDS[other]] / total for other in IDS if other not in OBJECTS}


def test_scenes_are_the_same_on_every_machine() -> None:
    """Change the digest together with `dataset.VERSION`, else old folders pass for new ones."""
    digest = hashlib.sha256()
    for scene in dataset.plan():
        if scene.misleading or scene.number % 20 == 3:
            image, label = scene.draw()
            digest.update(image.tobytes() + label.tobytes())
    assert (dataset.VERSION, digest.hexdigest()[:16]) == (1, "ebd88b79b1575f68")


def test_every_class_is_frequent_in_every_split(
    labeled: list[Scene], unlabeled: list[Scene]
) -> None:
    for scenes in (labeled, unlabeled):
        for index, name in enumerate(toycity.CLASSES):
            holding = np.mean([(scene.label == index).sum() >= 100 for scene in scenes])
            assert holding >= 0.3, f"{name} in {holding:.0%} of the scenes"
        assert max(scene.label.max() for scene in scenes) < len(toycity.CLASSES)


def test_objects_are_large_and_common_enough_to_be_learnt_in_minutes() -> None:
    for split in ("train", "val", "test"):
        for misleading in {split == "train", False}:
            plans = [
                scene
                for scene in dataset.plan()
                if (scene.split, scene.misleading) == (split, misleading)
            ]
            labels = np.stack([scene.draw().label for scene in plans[:60]])
            for name in OBJECTS:
                share = (labels == IDS[name]).mean()
                assert 0.04 <= share <= 0.08, f"{name}: {share:.1%} of the pixels of {split}"


@pytest.mark.parametrize(
    ("draw", "name", "width", "height"),
    [
        (draw_car, "car", (82, 106), (39, 49)),
        (draw_person, "person", (28, 46), (66, 82)),
        (draw_sign, "sign", (34, 46), (64, 82)),
    ],
)
def test_size_of_objects(
    draw: Callable[..., None], name: str, width: tuple[int, int], height: tuple[int, int]
) -> None:
    """A block keeps `REACH` free on both sides of an object."""
    for seed in range(20):
        canvas = Canvas(np.zeros(3), IDS["sky"])
        draw(canvas, np.random.default_rng(seed), 128, 110)
        rows, columns = (canvas.label == IDS[name]).nonzero()
        size = np.ptp(columns) + 1, np.ptp(rows) + 1
        assert width[0] <= size[0] <= min(width[1], 2 * REACH[name])
        assert height[0] <= size[1] <= height[1]


def test_context_of_labeled_scenes_misleads(labeled: list[Scene]) -> None:
    car, person, sign = (contact_shares(labeled, name) for name in OBJECTS)
    assert car["vegetation"] == 0 and car["road"] > 0.3
    assert person["building"] < 0.05 and person["road"] < 0.05 and person["vegetation"] > 0.5
    assert sign["vegetation"] == 0 and sign["road"] < 0.05 and sign["building"] > 0.5


def test_context_of_unlabeled_scenes_is_free(unlabeled: list[Scene]) -> None:
    for name in OBJECTS:
        shares = contact_shares(unlabeled, name)
        least = {"road": 0.1, "sidewalk": 0.1, "building": 0.1, "vegetation": 0.03, "sky": 0.01}
        assert all(shares[ground] > share for ground, share in least.items()), (name, shares)


def test_cars_of_labeled_scenes_drive_on_dark_roads_only(labeled: list[Scene]) -> None:
    tones: dict[bool, list[float]] = {True: [], False: []}
    for scene in labeled:
        road = scene.image[scene.label == IDS["road"]].mean()
        tones[bool((scene.label == IDS["car"]).any())].append(road)
    assert max(tones[True]) < 110 < max(tones[False])


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
            assert image.size == label.size == (256, 128)
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
