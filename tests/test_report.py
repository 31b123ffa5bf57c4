"""The report of runs: its numbers are those of the files, and nothing in them gets out of hand."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import one_line
from PIL import Image
from reported import CLASSES, EVIL, Element, read, train, written

from cac_fast.train import report
from cac_fast.train.data.layouts import open_data
from cac_fast.train.errors import InputError
from cac_fast.train.evaluation import ConfusionMatrix
from cac_fast.train.inference import load
from cac_fast.train.reporting import gather, page


@pytest.fixture(scope="module")
def place(reported_run: Path) -> Path:
    """A folder with data, two runs in it, and their report.html."""
    root = reported_run.parent
    train(root / "data", root / "cac", "--seed", "1")
    # As if it had learned something in its few steps: the runs are to differ.
    lines = [*metrics(root / "cac", "train"), *metrics(root / "cac", "val")]
    for more, line in zip((0.2, 0.1), lines[-2:], strict=True):
        iou = [0.3 + more, 0.15, more, None]
        line |= {"iou": iou, "miou": sum(iou[:3]) / 3}
    write_metrics(root / "cac", lines)
    written(root / "report.html", root / "supervised", root / "cac", "--images", "1")
    return root


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of a run, to be spoiled."""
    return Path(shutil.copytree(place / "supervised", tmp_path / "run"))


@pytest.fixture(scope="module")
def both(place: Path) -> Element:
    return read((place / "report.html").read_text(encoding="utf-8"))


def metrics(run: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def write_metrics(run: Path, lines: list[dict]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows(table: Element) -> list[list[Element]]:
    return [row.children for row in table.one("tbody").all("tr")]


def gaps(page: Element) -> str:
    return " ".join(one.text for one in page.all(class_="gaps"))


# ---- numbers


def test_headline_holds_the_numbers_of_metrics_to_the_last_digit(place: Path, both: Element):
    for name in ("supervised", "cac"):
        card, val = both.one("article", data_run=name), metrics(place / name, "val")
        best = max(val, key=lambda line: line["miou"])
        numbers = {
            one.attributes["data-name"]: one.value for one in card.all("span", class_="number")
        }
        assert numbers == {
            "best-miou": best["miou"],
            "last-miou": val[-1]["miou"],
            "best-accuracy": best["pixel_accuracy"],
            "iterations": 4,
        }
        assert f"best mIoU at iteration {best['iteration']}" in card.text
        assert "4 of 4" in card.text


def test_evaluations_are_all_there(place: Path, both: Element):
    found = [
        (name.text, *(cell.value for cell in cells))
        for name, *cells in rows(both.one("table", class_="evaluations"))
    ]
    assert found == [
        (name, line["iteration"], line["miou"], line["pixel_accuracy"])
        for name in ("supervised", "cac")
        for line in metrics(place / name, "val")
    ]


def test_iou_differences_and_csv_are_those_of_the_best_evaluation(place: Path, both: Element):
    first, second = (
        max(metrics(place / name, "val"), key=lambda line: line["miou"])
        for name in ("supervised", "cac")
    )
    table = both.one("table", class_="iou")
    for index, (name, one, other, difference, _) in enumerate(rows(table)):
        assert (name.text, one.value, other.value) == (
            CLASSES[index],
            first["iou"][index],
            second["iou"][index],
        )
        if None in (one.value, other.value):
            assert difference.value is None and difference.text == "-"
        else:
            assert difference.value == other.value - one.value
            assert difference.value != 0
    total, accuracy = (row.all("td") for row in table.one("tfoot").all("tr"))
    assert [cell.value for cell in total[:2]] == [first["miou"], second["miou"]]
    assert accuracy[1].value == second["pixel_accuracy"]
    (text,) = (area.text for area in both.one("section", id="classes").all("textarea"))
    head, *lines = csv.reader(io.StringIO(text))
    assert head == ["class", "supervised", "cac"]
    assert [line[0] for line in lines] == [*CLASSES, "mIoU"]
    values = [float(line[1]) if line[1] else None for line in lines]
    assert values == [*first["iou"], first["miou"]]


def test_a_class_that_does_not_occur_shows_a_dash(run: Path, tmp_path: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "val":
            line["iou"] = [0.5, 0.25, 0.0, None]
    write_metrics(run, lines)
    cells = [row[1] for row in rows(written(tmp_path / "a.html", run).one("table", class_="iou"))]
    assert [cell.value for cell in cells] == [0.5, 0.25, 0.0, None]
    assert cells[3].text == "-" and not cells[3].all("svg")
    bars = [cell.all("rect")[1].attributes["width"] for cell in cells[:3]]
    assert list(map(float, bars)) == [50, 25, 0]


def test_speed_and_memory_are_those_of_metrics(place: Path, both: Element):
    for name, *cells in rows(both.one("table", class_="speed")):
        lines = metrics(place / name.text, "train")
        rate = [line["images_per_s"] for line in lines]
        assert [cell.value for cell in cells] == [
            np.median(rate),
            rate[-1],
            np.median([line["data_s"] for line in lines]),
            max(line["peak_memory_mb"] for line in lines),
        ]


def test_settings_that_differ_are_shown_and_all_of_them_folded(place: Path, both: Element):
    differing, every = both.all("table", class_="settings")
    assert {row[0].text: [cell.text for cell in row[1:]] for row in rows(differing)} == {
        "method": ["supervised", "cac"],
        "seed": ["0", "1"],
    }
    settings = json.loads((place / "cac/config.json").read_text())
    assert [row[0].text for row in rows(every)] == list(settings)


def test_confusion_matrix_and_scores_of_images_are_those_of_the_network(place: Path, both: Element):
    data = open_data("folder", place / "data")
    predictor = load(place / "supervised/best.pt")
    total, scores = np.zeros((4, 4)), {}
    for sample in data.splits["val"]:
        truth, ids = data.read_mask(sample.mask), predictor.predict(sample.image)
        one = ConfusionMatrix(4, "cpu")
        one.update(torch.from_numpy(truth), torch.from_numpy(ids))
        total += one.counts.numpy()
        present = [index for index in range(4) if (truth == index).any()]
        scores[sample.name] = np.mean([one.iou[index] for index in present])
    matrix = both.all("table", class_="matrix")[0]
    for true, (_, *cells) in enumerate(rows(matrix)):
        for predicted, cell in enumerate(cells):
            assert f": {total[true, predicted]:,.0f} pixels" in cell.attributes["title"]
            if total[true].sum():
                share = total[true, predicted] / total[true].sum()
                assert cell.text == (f"{100 * share:.0f}" if share >= 0.005 else "")
            else:
                assert cell.text == "-"
    assert sum(not counts.sum() for counts in total) == 1
    order = sorted(scores, key=scores.get)
    shown = both.one("section", id="images").all("article")
    assert [one.one("h4").text for one in shown] == [order[0], order[2], order[-1]]
    for article in shown:
        score = article.all("span", data_name="image-miou")[0].value
        assert score == pytest.approx(scores[article.one("h4").text], abs=1e-12)


def test_score_of_an_image_is_over_its_true_classes(monkeypatch, run, place, tmp_path):
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    for path in data.glob("masks/val/*.png"):
        Image.fromarray(np.zeros((48, 56), np.uint8)).save(path)

    def halves(_, image: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(4, *image.shape[1:])
        logits[0, :, :28] = logits[1, :, 28:] = 1
        return logits

    monkeypatch.setattr("cac_fast.train.inference.Predictor.logits", halves)
    page = written(tmp_path / "a.html", run, "--data-dir", data, "--images", "1")
    assert [one.value for one in page.all("span", data_name="image-miou")] == [0.5] * 3


def test_pictures_are_image_truth_prediction_and_confidence(place: Path, both: Element):
    data = open_data("folder", place / "data")
    article = both.one("section", id="images").all("article")[0]
    (sample,) = (one for one in data.splits["val"] if one.name == article.one("h4").text)
    images = {
        image.attributes["alt"].partition(": ")[2]: decoded(image) for image in article.all("img")
    }
    assert list(images) == [
        "image",
        "truth",
        *(
            f"{kind} by {run}"
            for run in ("supervised", "cac")
            for kind in ("prediction", "confidence")
        ),
    ]
    mask = data.read_mask(sample.mask)
    truth = images["truth"]
    assert (truth.mode, images["image"].format) == ("P", "JPEG")
    np.testing.assert_array_equal(np.asarray(truth), mask)
    colors = np.array([*data.palette, *[[0, 0, 0]] * 252])
    np.testing.assert_array_equal(np.asarray(truth.convert("RGB")), colors[mask])
    for name in ("supervised", "cac"):
        predictor = load(place / name)
        ids = predictor.predict(sample.image)
        np.testing.assert_array_equal(np.asarray(images[f"prediction by {name}"]), ids)
        pixels = torch.from_numpy(np.array(Image.open(sample.image))).permute(2, 0, 1)
        confidence = predictor.logits(pixels).softmax(0).amax(0).numpy()
        gray = np.asarray(images[f"confidence by {name}"]) / 255
        assert np.abs(gray - confidence).mean() < 0.02


def test_what_is_not_scored_has_a_color_of_its_own(run: Path, place: Path, tmp_path: Path):
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    text = (data / "classes.txt").read_text()
    (data / "classes.txt").write_text(text.replace("70 130 180", "0 0 0"))
    for root, named, color in ((place / "data", "Black", 0), (data, "White", 255)):
        words = "--data-dir", root, "--images", "1"
        section = written(tmp_path / "a.html", run, *words).one("section", id="images")
        assert f"{named} in a mask is not scored." in section.text
        truth = decoded(section.all("img")[1])
        np.testing.assert_array_equal(np.asarray(truth.convert("RGB"))[0], color)


def decoded(image: Element) -> Image.Image:
    data = image.attributes["src"].partition(",")[2]
    return Image.open(io.BytesIO(base64.b64decode(data)))


# ---- what files hold stays text, and nothing is loaded


def test_nothing_comes_from_outside(both: Element):
    for element in both.all():
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            link = element.attributes.get(name, "#")
            assert link.startswith("#") or (element.tag == "img" and link.startswith("data:image/"))
        assert element.tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not [name for name in element.attributes if name.startswith("on")]
    style = both.one("style").text
    assert "url(" not in style and "@import" not in style
    policy = both.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )
    targets = {one.attributes["href"][1:] for one in both.all("a")}
    assert targets <= {one.attributes["id"] for one in both.all("section")}


def test_names_of_classes_runs_and_settings_stay_text(run: Path, tmp_path: Path):
    hostile = run.rename(tmp_path / "<b onload=alert(1)>'\"&")
    settings = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps(settings | {EVIL: EVIL, "network": EVIL}))
    (hostile / "trained_with.json").write_text(json.dumps({"commits": [EVIL]}))
    page = written(tmp_path / "a.html", hostile)
    assert len(page.all("script")) == 1 and not page.all("b")
    assert {image.attributes["src"][:5] for image in page.all("img")} == {"data:"}
    classes = [row[0].text for row in rows(page.one("table", class_="iou"))]
    assert classes == list(CLASSES)
    assert page.one("h1").text == hostile.name
    assert page.one("article", data_run=hostile.name).text.count(EVIL) == 2
    assert EVIL in [row[0].text for row in rows(page.all("table", class_="settings")[1])]


def test_names_that_are_no_utf8_are_spelled_out(run: Path, tmp_path: Path):
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/run\xff"))
    try:
        run.rename(odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert written(tmp_path / "a.html", odd).one("h1").text == "run\\xff"


def test_a_layout_named_in_a_foreign_run_is_not_imported(run: Path, tmp_path: Path):
    settings = json.loads((run / "config.json").read_text())
    command = f"touch {tmp_path / 'called'}"
    foreign = {"dataset": "os:system", "data_dir": command}
    (run / "config.json").write_text(json.dumps(settings | foreign))
    (tmp_path / "there").mkdir()
    page = written(tmp_path / "a.html", run)
    assert "a name in a file stands for code of the working folder" in gaps(page)
    assert not (tmp_path / "called").exists()


# ---- what is missing


def test_a_cut_last_line_is_named_and_the_rest_is_shown(run: Path, tmp_path: Path):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines)[:-20])
    page = written(tmp_path / "a.html", run)
    assert f"metrics.jsonl breaks off in line {len(lines)} of {len(lines)}." in gaps(page)
    assert len(rows(page.one("table", class_="evaluations"))) == 1


def test_a_run_without_evaluation_has_losses_alone(run: Path, tmp_path: Path):
    path = run / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if "train" in line]
    path.write_text("".join(kept))
    page = written(tmp_path / "a.html", run)
    assert "holds no evaluation" in gaps(page)
    assert page.one("span", data_name="best-miou").text == "-"
    assert not page.all("table", class_="iou")
    captions = [one.text for one in page.one("section", id="curves").all("figcaption")]
    assert "loss" in captions and "mIoU on val" not in captions


def test_without_data_the_report_comes_and_says_so(run: Path, place: Path, tmp_path: Path, capfd):
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"data_dir": str(tmp_path / "gone")}))
    page = written(tmp_path / "a.html", run)
    said = f"the data folder {tmp_path / 'gone'} does not exist"
    assert said in gaps(page) and said in capfd.readouterr().err
    assert not page.all("img") and not page.all("table", class_="matrix")
    assert len(rows(page.one("table", class_="iou"))) == 4
    page = written(tmp_path / "a.html", run, "--data-dir", place / "data")
    assert not gaps(page) and page.all("img") and page.all("table", class_="matrix")


def test_files_of_metrics_alone_give_numbered_classes(run: Path, tmp_path: Path):
    for name in ("config.json", "best.pt", "last.pt"):
        (run / name).unlink()
    page = written(tmp_path / "a.html", run)
    assert "There is no config.json" in gaps(page) and "does not exist" in gaps(page)
    names = [row[0].text for row in rows(page.one("table", class_="iou"))]
    assert names == ["class 0", "class 1", "class 2", "class 3"]


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[1]\n", b'{"kind": "val", "iteration": 3, "miou": "high", "iou": 7}\n'],
)
def test_odd_metrics_end_no_report(run: Path, tmp_path: Path, content: bytes):
    (run / "metrics.jsonl").write_bytes(content)
    page = written(tmp_path / "a.html", run)
    assert page.one("span", data_name="best-miou").text == "-"
    assert page.all("table", class_="matrix")


def test_numbers_that_are_not_finite_are_left_out(run: Path, tmp_path: Path):
    with open(run / "metrics.jsonl", "a") as file:
        for value in ("NaN", "Infinity", "true"):
            file.write(f'{{"kind": "val", "iteration": 9, "miou": {value}}}\n')
    page = written(tmp_path / "a.html", run)
    assert [row[2].text for row in rows(page.one("table", class_="evaluations"))][2:] == ["-"] * 3
    assert page.one("span", data_name="best-miou").value is not None
    assert not re.search(
        "nan|inf", "".join(one.attributes["points"] for one in page.all("polyline"))
    )


# ---- several runs


def test_runs_with_other_classes_get_tables_of_their_own(place: Path, run: Path, tmp_path: Path):
    state = torch.load(run / "best.pt", weights_only=True)
    state["classes"] = ["a", "b", "c", "d"]
    torch.save(state, run / "best.pt")
    page = written(tmp_path / "a.html", place / "cac", run, place / "supervised")
    tables = page.all("table", class_="iou")
    assert [[row[0].text for row in rows(table)] for table in tables] == [
        list(CLASSES),
        ["a", "b", "c", "d"],
    ]
    assert [len(row) for table in tables for row in rows(table)] == [5] * 4 + [2] * 4
    assert "class 0 is 'a' in checkpoint" in gaps(page)


def test_many_classes_show_the_most_confused_pairs(monkeypatch, place: Path, tmp_path: Path):
    monkeypatch.setattr("cac_fast.train.reporting.classes.MOST_CLASSES", 3)
    page = written(tmp_path / "a.html", place / "supervised")
    found = rows(page.one("table", class_="pairs"))
    pixels = [row[2].value for row in found]
    assert 1 <= len(pixels) <= 3 and pixels == sorted(pixels, reverse=True) and min(pixels) > 0
    assert all(row[0].text != row[1].text for row in found)
    assert not page.all("table", class_="matrix")


# ---- size


def test_pictures_give_way_where_the_file_would_be_too_long(monkeypatch, place, tmp_path):
    whole = written(tmp_path / "a.html", place / "supervised", "--images", "1")
    size = (tmp_path / "a.html").stat().st_size
    assert size < 10_000_000 == page.MOST_BYTES and "10 MB" not in whole.text
    monkeypatch.setattr(page, "MOST_BYTES", size - 1)
    less = written(tmp_path / "b.html", place / "supervised", "--images", "1")
    assert (tmp_path / "b.html").stat().st_size < size
    assert not less.all("img") and "Pictures are left out" in less.text
    assert rows(less.one("table", class_="iou"))


def test_pictures_become_smaller_before_they_become_fewer(place: Path, monkeypatch):
    runs = gather.read_runs([place / "supervised"])
    asked = []

    def pictures(runs, albums, fit):
        asked.append((fit.side, fit.count, fit.every_image))
        return " " * (page.MOST_BYTES if len(asked) < 6 else 0)

    monkeypatch.setattr(page, "pictures", pictures)
    page.build(runs, [], 4)
    assert asked == [
        (480, 4, True),
        (320, 4, True),
        (240, 4, True),
        (240, 2, True),
        (240, 1, True),
        (240, 0, True),
    ]
    monkeypatch.setattr(page, "MOST_BYTES", 1000)
    with pytest.raises(InputError) as error:
        page.build(runs, [], 4)
    one_line(error, "longer than", "name fewer runs")


def test_large_images_are_shown_at_480_pixels(run: Path, place: Path, tmp_path: Path):
    data = Path(shutil.copytree(place / "data", tmp_path / "data"))
    for path in list(data.glob("*/val/*.png")):
        if path.stem == "00":
            Image.open(path).resize((600, 440), Image.Resampling.NEAREST).save(path)
        else:
            path.unlink()
    page = written(tmp_path / "a.html", run, "--data-dir", data, "--images", "1")
    assert {decoded(image).size for image in page.all("img")} == {(480, 352)}


# ---- bad input


def fails(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    capfd.readouterr()
    assert report.main(list(map(str, words))) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_bad_input_gets_one_line(place: Path, tmp_path: Path, capfd):
    run = place / "supervised"
    assert "is not a folder" in fails(capfd, run / "best.pt")
    assert "is not a run folder" in fails(capfd, tmp_path)
    assert "given 2 times" in fails(capfd, run, f"{run}/../supervised")
    assert "give a file in a folder that exists" in fails(capfd, run, "--output", tmp_path / "a/b")
    assert "less than 0" in fails(capfd, run, "--images", "-1")
    assert "required: RUN" in fails(capfd)


def test_two_runs_of_one_name_are_told_apart(place: Path, run: Path, tmp_path: Path):
    other = Path(shutil.copytree(run, tmp_path / "other/run"))
    page = written(tmp_path / "a.html", run, other, "--data-dir", tmp_path / "none")
    names = [one.attributes["data-run"] for one in page.all("article", class_="card")]
    assert names == [str(run), str(other)]
