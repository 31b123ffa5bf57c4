"""What a comparison says it found: paired differences, headroom, what is not informative."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from accuracy import outcome


def runs(method: str, *points: float, first_seed: int = 0, iou: tuple = ()) -> list[dict]:
    """Runs of one arm with the scores of the last state, the best ones a point above."""
    return [
        {
            "method": method,
            "share": "dusk",
            "seed": seed,
            "scores": {"test_last": score / 100, "test_best": (score + 1) / 100},
            "curve": [],
            **({"iou": {"test_last": list(iou[seed])}} if iou else {}),
        }
        for seed, score in enumerate(points, start=first_seed)
    ]


def row(*results: list[dict]) -> dict:
    (found,) = outcome.summarize([run for part in results for run in part], "camvid", "test")
    return found


def test_differences_are_paired_by_seed() -> None:
    """The spread of the seeds is 20, that of the differences 1."""
    found = row(
        runs("supervised", 20, 40, 60),
        runs("supervised_all", 28, 50, 72),
        runs("control", 21, 41, 61),
        runs("cac", 44, 65, 70, first_seed=1),  # seed 3 has no partner
    )
    assert found["setting"] == "camvid dusk" and found["scored_on"] == "test"
    assert found["headroom"] == pytest.approx(10)
    assert found["headroom_standard_error"] == pytest.approx(2 / 3**0.5)
    assert found["control_gain"] == pytest.approx(1)
    assert found["control_gain_standard_error"] == pytest.approx(0)
    assert found["seeds"] == 2 and found["headroom_seeds"] == found["control_seeds"] == 3
    assert found["gain"] == pytest.approx(4.5)
    assert found["gain_standard_error"] == pytest.approx(0.5)
    assert found["share_of_headroom"] == pytest.approx(9 / 22)  # of the seeds that all have
    line = outcome.summary_table([found]).splitlines()[-1]
    assert "| +10.0 ± 1.2 | +1.0 ± 0.0 | +4.5 ± 0.5 | 41 % | 2 (headroom 3, control 3) |  |" in line
    assert found["informative"] is True
    assert found["best"]["gain"] == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("everything", "expected", "says"),
    [
        ((23, 24, 24), False, "not informative"),  # 3.7 points
        ((21, 21, 33), False, "not informative"),  # 5 points, of which the standard error is 4
        ((26, 27, 29), True, ""),
        ((29,), None, "one seed: not judged"),  # it has no standard error
        ((23,), False, "not informative"),
        ((), None, "no headroom yet"),
    ],
)
def test_little_headroom_is_not_informative(everything, expected, says) -> None:
    found = row(
        runs("supervised", 20, 20, 20), runs("supervised_all", *everything), runs("cac", 21, 21, 21)
    )
    assert found["informative"] is expected
    table = outcome.summary_table([found])
    assert table.splitlines()[-1].split("|")[-2].strip() == says


def test_classes_that_supervised_does_not_know_are_left_out() -> None:
    supervised = runs("supervised", 25, 25, iou=((0.6, 0.12, 0.02, None), (0.4, 0.10, 0.1, 0.3)))
    cac = runs("cac", 50, 50, iou=((0.8, 0.31, 0.9, 0.9), (0.4, 0.2, 0.9, 0.9)))
    known = row(supervised, cac)["known"]
    assert "known" not in row(supervised, cac)["best"]
    assert known["classes"] == [0, 1]
    assert known["gain"] == pytest.approx(100 * ((1.11 - 0.72) / 2 + (0.6 - 0.5) / 2) / 2)
    lost = runs("supervised", 2, iou=((0.02, 0.05, None, 0.1),))
    assert row(lost, cac)["known"]["classes"] == []
    assert "known" not in row(runs("supervised", 25), runs("cac", 50))  # an older record
    for run in [*supervised, *cac]:
        run["iou"]["test_best"] = run["iou"]["test_last"][::-1]
    best = row(supervised, cac)["best"]["known"]
    assert best["classes"] == [2, 3] and best["gain"] == pytest.approx(known["gain"])


def test_summary_is_shown_where_the_headroom_is_known() -> None:
    two = [*runs("supervised", 20, 22), *runs("cac", 21, 24)]
    text = outcome.report(two, outcome.summarize(two, "camvid", "test"))
    assert "| dusk | gain | +1.5 | +1.5 |" in text and "headroom" not in text
    three = [*two, *runs("supervised_all", 27, 28)]
    text = outcome.report(three, outcome.summarize(three, "camvid", "test"))
    assert "| camvid dusk | test | +6.5 ± 0.5 |  | +1.5 ± 0.5 | 23 % | 2 |  |" in text


def test_the_mean_curve_is_of_what_all_runs_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    drawn, plot = {}, axes.Axes.plot

    def kept(self, steps, values, **words):
        drawn.setdefault(words.get("label"), (list(steps), list(values)))
        return plot(self, steps, values, **words)

    monkeypatch.setattr(axes.Axes, "plot", kept)
    one, other = runs("cac", 20, 40)
    one["curve"] = [[2, 0.1], [3, 0.9], [4, 0.2], [8, 0.4]]
    other["curve"] = [[2, 0.3], [4, 0.4]]
    outcome.plot([one, other], tmp_path / "curves.png")
    steps, values = drawn["cac (mean of 2)"]
    assert steps == [2, 4]
    np.testing.assert_allclose(values, [0.2, 0.3])
