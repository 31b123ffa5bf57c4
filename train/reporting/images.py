"""The part of the page with pictures, each inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from cac_fast.train.reporting.classes import copyable
from cac_fast.train.reporting.gather import Run
from cac_fast.train.reporting.scoring import KINDS, LONG_SIDE, Shown
from cac_fast.train.reporting.sections import section, swatch
from cac_fast.train.reporting.text import cell, escape, head, span, table

QUALITY = 85


@dataclass(frozen=True)
class Fit:
    """How much the pictures may take.

    side: longest side in pixels. count: images of a kind. every_image: with the scores of every
    image. said: what the page says of it.
    """

    side: int
    count: int
    every_image: bool = True
    said: str = ""


@dataclass
class Album:
    """Runs that share their val images, and the images that are shown of them."""

    runs: list[Run]
    shown: list[Shown]


def pictures(runs: Sequence[Run], albums: Sequence[Album], fit: Fit) -> str:
    """Worst, median and best images."""
    content = "".join(_album(runs, album, fit) for album in albums)
    if not content:
        content = '<p class="nothing">There are no pictures: the cards above say why.</p>'
    said = f'<p class="note">{escape(fit.said)}</p>' if fit.said else ""
    return section("images", "Worst, median and best images", said + content)


def _album(runs: Sequence[Run], album: Album, fit: Fit) -> str:
    first = album.runs[0]
    by = f" in {escape(first.name)}" if len(runs) > 1 else ""
    name, _ = _not_scored(first.scored.data.palette)
    text = (
        f"Ordered by the image's mIoU{by}: the mean of the IoU, within this image, of its true "
        f"classes, over {len(first.scored.samples)} val images. {name} in a mask is not scored. "
        "Confidence is the largest softmax value of a pixel, from black (0) to white (1)."
    )
    parts = [f'<p class="note">{text}</p>', _legend(first)]
    for kind in KINDS:
        shown = _chosen([one for one in album.shown if one.kind == kind], kind, fit.count)
        if shown:
            parts.append(f"<h3>{kind.capitalize()}</h3>")
            parts += [_image(runs, album, one, fit.side) for one in shown]
    if fit.every_image:
        parts += [_every_image(runs, run) for run in album.runs]
    return "".join(parts)


def _chosen(shown: Sequence[Shown], kind: str, count: int) -> Sequence[Shown]:
    spare = max(0, len(shown) - count)
    start = {"worst": 0, "median": spare // 2, "best": spare}[kind]
    return shown[start : start + count]


def _legend(run: Run) -> str:
    items = "".join(
        f'<li><span class="swatch" style="background:rgb{tuple(map(int, color))}"></span>'
        f"{escape(name)}</li>"
        for name, color in zip(run.classes, run.scored.data.palette, strict=True)
    )
    return f'<ul class="legend">{items}</ul>'


def _image(runs: Sequence[Run], album: Album, one: Shown, side: int) -> str:
    palette, size = album.runs[0].scored.data.palette, one.image.size

    def photo(image: Image.Image, alternative: str, caption: str) -> str:
        return _figure(_jpeg(image, side), size, f"{one.name}: {alternative}", caption)

    def masks(ids: Image.Image, alternative: str, caption: str) -> str:
        source = _masks(ids, palette, side)
        return _figure(source, size, f"{one.name}: {alternative}", caption)

    pairs = [photo(one.image, "image", "image") + masks(one.truth, "truth", "truth")]
    for view in one.views:
        by, color = "", ""
        if len(runs) > 1:
            by, color = f" by {view.run.name}", swatch(runs.index(view.run))
        score = span(view.score, name="image-miou")
        pairs.append(
            masks(view.prediction, f"prediction{by}", f"{color}prediction, mIoU {score}")
            + photo(view.confidence, f"confidence{by}", f"{color}confidence")
        )
    pairs = "".join(f'<div class="pair">{pair}</div>' for pair in pairs)
    several = " several" if len(one.views) > 1 else ""
    return (
        f'<article class="image"><h4>{escape(one.name)}</h4>'
        f'<div class="views{several}">{pairs}</div>{_ious(album, one)}</article>'
    )


def _figure(source: str, size: tuple[int, int], alternative: str, caption: str) -> str:
    return (
        f'<figure><img src="{source}" width="{size[0]}" height="{size[1]}" '
        f'alt="{escape(alternative)}"><figcaption>{caption}</figcaption></figure>'
    )


def _ious(album: Album, one: Shown) -> str:
    names = [sample.name for sample in album.runs[0].scored.samples]
    ious = [run.scored.ious[names.index(one.name)] for run in album.runs]
    rows = [
        f'<th scope="row">{escape(name)}</th>' + "".join(cell(each[index]) for each in ious)
        for index, name in enumerate(album.runs[0].classes)
        if ious[0][index] is not None
    ]
    heads = ["class", *(run.name for run in album.runs)] if len(ious) > 1 else ["class", "IoU"]
    return (
        "<details><summary>IoU of the classes in this image</summary>"
        f"{table(head(heads), rows)}</details>"
    )


def _every_image(runs: Sequence[Run], run: Run) -> str:
    scored = run.scored
    rows = [
        (sample.name, score, *ious)
        for sample, score, ious in zip(scored.samples, scored.scores, scored.ious, strict=True)
    ]
    by = f", {run.name}" if len(runs) > 1 else ""
    title = f"mIoU and IoU of every image as CSV, to copy{by}"
    return copyable(title, [("image", "mIoU", *run.classes), *rows])


def _jpeg(image: Image.Image, side: int) -> str:
    return _data_uri(_smaller(image, side, Image.Resampling.BILINEAR), "jpeg", quality=QUALITY)


def _masks(ids: Image.Image, palette: Sequence[Sequence[int]], side: int) -> str:
    small = _smaller(ids, side, Image.Resampling.NEAREST)
    _, rest = _not_scored(palette)
    small.putpalette([value for color in (*palette, *[rest] * 256) for value in color][: 3 * 256])
    return _data_uri(small, "png", optimize=True)


def _not_scored(palette: Sequence[Sequence[int]]) -> tuple[str, tuple[int, int, int]]:
    """The color of 255, with its name: black, where no class has it."""
    is_taken = any(tuple(color) == (0, 0, 0) for color in palette)
    return ("White", (255, 255, 255)) if is_taken else ("Black", (0, 0, 0))


def _smaller(image: Image.Image, side: int, how: Image.Resampling) -> Image.Image:
    scale = min(1, side / max(image.size))
    return image.resize(tuple(max(1, round(length * scale)) for length in image.size), how)


def _data_uri(image: Image.Image, form: str, **options: object) -> str:
    file = io.BytesIO()
    image.save(file, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"


def steps(count: int) -> list[Fit]:
    """From all that is asked for to less and less: smaller pictures, then fewer, then none."""
    smaller = "Pictures are smaller than usual, so that this file stays below 10 MB."
    fewer = "Pictures are smaller and fewer than asked for, so that this file stays below 10 MB."
    none = "Pictures are left out, so that this file stays below 10 MB."
    return [
        Fit(LONG_SIDE, count),
        *(Fit(side, count, said=smaller) for side in (320, 240)),
        *(Fit(240, less, said=fewer) for less in (count // 2, 1) if 0 < less < count),
        Fit(240, 0, said=none),
        Fit(240, 0, every_image=False, said=none + " So are the scores of every image."),
    ]
