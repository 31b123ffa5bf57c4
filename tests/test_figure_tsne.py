"""Figure 3: cells that pair, cosines, and what t-SNE is never given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import one_line, write_image, write_mask
from PIL import Image
from torch import nn

from accuracy import figure_runs, figure_tsne, figures
from accuracy.figure_tsne import Views, features_of, mean_cosines
from cac_fast.train.config import Config
from cac_fast.train.errors import InputError
from cac_fast.train.inference import Predictor

CROP = 64


class Cells(nn.Module):
    """Features at 1/8: mean, largest and smallest value of each color in a cell; no context."""

    feature_stride = 8
    feature_channels = 9

    def features(self, images: torch.Tensor) -> torch.Tensor:
        pool = nn.functional.max_pool2d
        means = nn.functional.avg_pool2d(images, 8)
        return torch.cat([means, pool(images, 8), -pool(-images, 8)], dim=1)


def run(network: nn.Module | None = None, name: str = "a", **settings: object) -> figure_runs.Run:
    predictor = Predictor(
        network or Cells(), ("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    )
    config = Config.of(dataset="folder", crop_size=CROP, **settings)
    return figure_runs.Run(name, Path("last.pt"), config, predictor)


def views(color: str | None = "strong", seed: int = 0) -> Views:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (100, 140, 3), dtype=np.uint8)
    truth = rng.integers(0, 3, (100, 140)).astype(np.uint8)
    truth[truth == 2] = 255
    return Views(image, truth, CROP, (0.1, 0.9), rng, color)


@pytest.mark.parametrize("seed", range(4))
def test_pairs_are_the_same_pixels(seed: int) -> None:
    """Features without context agree exactly, and truth is that of the cell's own center."""
    found = views(None, seed)
    assert 0 < len(found.classes) < (CROP // 8) ** 2 and 255 not in found.classes
    assert (found.pixels[0] == found.pixels[2]).all() and (found.pixels[0] != found.pixels[1]).any()
    first, second, third = features_of(run(), found, None)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert mean_cosines(torch.stack([first, second, third])) == (
        pytest.approx(1, abs=1e-6),
        pytest.approx(1, abs=1e-6),
    )
    assert (first.norm(dim=1) - 1).abs().max() < 1e-6


def test_truth_is_that_of_the_cell() -> None:
    rng = np.random.default_rng(5)
    truth = (np.arange(100)[:, None] // 8 * 20 + np.arange(140) // 8).astype(np.uint8)
    # A gray whose level is the class, so that a cell's pixels tell its class.
    image = np.repeat(truth[..., None], 3, 2)
    found = Views(image, truth, CROP, (0.1, 0.9), rng, None)
    cells = found.pixels[:, 0, 4::8, 4::8].flatten(1)
    for view, numbers in enumerate(found.cells):
        assert cells[view, torch.from_numpy(numbers)].tolist() == found.classes.tolist()


@pytest.mark.parametrize("seed", range(40))
def test_colors_change_the_third_view_alone(seed: int) -> None:
    strong, same = views("strong", seed), views(None, seed)
    assert (strong.pixels[:2] == same.pixels[:2]).all() and (
        strong.pixels[2] != same.pixels[2]
    ).any()
    context, color = mean_cosines(features_of(run(), strong, None))
    assert context == pytest.approx(1, abs=1e-6) and color < 0.999


def test_mean_cosine_by_hand() -> None:
    unit = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    assert mean_cosines(torch.stack([unit, other, -unit])) == (pytest.approx(0.3), -1)


def test_finer_features_are_pooled() -> None:
    class Fine(Cells):
        feature_stride = 4

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.interpolate(super().features(images), scale_factor=2)

    found = views()
    torch.testing.assert_close(
        features_of(run(Fine()), found, None), features_of(run(), found, None)
    )


def test_perplexity() -> None:
    assert [figure_tsne.perplexity(n) for n in (4, 61, 91, 92, 1200)] == [1, 20, 30, 30, 30]


@pytest.mark.parametrize("bad", ["nan", "inf", "equal", "nearly equal"])
def test_tsne_never_sees_what_it_cannot_take(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifold = pytest.importorskip("sklearn.manifold")
    monkeypatch.setattr(manifold, "TSNE", lambda **_: pytest.fail("t-SNE was called"))
    points = np.random.default_rng(0).random((30, 4), np.float32)
    if bad in ("nan", "inf"):
        points[3, 1] = float(bad)
    else:
        points[:] = points[0] + (1e-7 if bad == "nearly equal" else 0) * points
    with pytest.raises(InputError) as error:
        figure_tsne.embed(points)
    one_line(error, "not all finite" if bad in ("nan", "inf") else "all the same")


def test_equal_points_land_near_each_other() -> None:
    pytest.importorskip("sklearn")
    points = np.random.default_rng(0).random((61, 8), np.float32)
    points[:5] = points[0]
    found = figure_tsne.embed(points)
    apart = np.linalg.norm(found[:, None] - found, axis=2)
    assert np.isfinite(found).all() and apart[:5, :5].max() < np.median(apart[:5, 5:]) / 3


def test_too_few_cells() -> None:
    features, classes = torch.zeros(3, 500, 2), np.arange(500)
    features[0, :, 0] = torch.arange(500)
    thinned, kept = figure_tsne.thinned(features, classes, seed=1)
    assert thinned.shape == (3, 400, 2) and thinned[0, :, 0].tolist() == kept.tolist()
    assert len(set(kept)) == 400
    with pytest.raises(InputError) as error:
        figure_tsne.thinned(features[:, :3], classes[:3], seed=1)
    one_line(error, "3 cells", "--rows")


def test_crop_leaves_room() -> None:
    assert [figure_tsne.crop_side(180, 240, c) for c in (128, 320)] == [128, 128]
    assert figure_tsne.crop_side(100, 40, 320) == 24


def test_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("sklearn")
    root = tmp_path / "data"
    for split in ("train", "val"):
        for number in range(2):
            write_image(root / f"images/{split}/{number}.png", 80, 88, seed=number)
            write_mask(root / f"masks/{split}/{number}.png", 80, 88)
    (root / "classes.txt").write_text("0 a 0 0 0\n1 b 255 0 0\n2 c 0 255 0\n")
    runs = [run(name=name, data_dir=str(root)) for name in ("SupOnly", "C&A$C")]
    asked = []

    def opened(paths: object, captions: object, state: str | None) -> list[figure_runs.Run]:
        asked.append(state)
        return runs

    monkeypatch.setattr(figure_tsne, "open_runs", opened)
    words = [
        "--figure",
        "3",
        "--runs",
        "x",
        "y",
        "--rows",
        "2",
        "--output",
        str(tmp_path / "f.png"),
    ]
    figures.main(words)
    out = capsys.readouterr().out
    assert "SupOnly: mean cosine of (I, II) 1.000, of (I, III) 0." in out and "C&A$C" in out
    pixels = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
    assert ((pixels[..., 0] > 200) & (pixels[..., 1] < 60)).sum() > 100
    # The same again, to the bit.
    first = (tmp_path / "f.png").read_bytes()
    figures.main(words)
    assert (tmp_path / "f.png").read_bytes() == first
    with pytest.raises(InputError) as error:
        figures.main([*words, "--features", "projected"])
    one_line(error, "last.pt")
    assert asked == [None, None, "last.pt"]
