"""The tables of the loss bench."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib import cases, measure, report

SMALL = cases.Case("small", 90, 400, "voc", "float32", channels=16)


def alike(seconds: float) -> measure.Times:
    return measure.Times(seconds, seconds, seconds)


def test_table_fits_a_terminal() -> None:
    names = ["products", "reference", "dense", "compiled", "chunked", "flex", "eager"]
    case = report.describe(replace(SMALL, anchors=16200)) | {"admitted": 10**9}
    rows = [
        case
        | {"provider": name, "status": "ok", "peak_extra_mb": 12345.0}
        | report.time_columns([alike(1.234 * number), alike(12.34)], case)
        for number, name in enumerate(names, start=1)
    ]
    report.add_ratios(rows)
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + len(names)
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 140


def test_headline_compares_across_dtypes() -> None:
    rows = []
    for dtype, took in (("float32", 0.3), ("bfloat16", 0.1)):
        case = report.describe(replace(SMALL, name="goal", dtype=dtype)) | {"admitted": 10**9}
        for name, factor in (("products", 0.5), ("eager", 1.0), ("cpp", 0.8), ("dense", 10.0)):
            memory = {"status": "ok", "peak_extra_mb": 3.0, "provider": name}
            rows.append(case | memory | report.time_columns([alike(factor * took)], case))
        report.add_ratios(rows[-4:])
    rows.append(rows[0] | {"case": "Table 4", "provider": "cpp"})
    assert report.headlines(rows)[1::2] == [
        "- goal, A 90, M 400, voc, float32: cpp 240 ms, 3.2e-06 effective TFLOP/s, 3.00 MB, "
        "1.60 /bare, 12.5x vs dense, 1.25x vs eager",
        "- goal, A 90, M 400, voc, bfloat16: cpp 80.0 ms, 9.6e-06 effective TFLOP/s, 3.00 MB, "
        "1.60 /bare, 12.5x vs dense, 1.25x vs eager, 3.75x vs eager in float32",
    ]


def test_back_ends_are_compared_with_triton() -> None:
    times = {"triton": 3.0, "cuda": 2.0}
    rows = [{"provider": name, "status": "ok", "median_ms": ms} for name, ms in times.items()]
    report.add_ratios(rows)
    assert rows[1]["faster_than"] == {"triton": 1.5}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (1234.5, "1234"), (99.94, "99.9"), (1.0, "1.00"), (0.05, "0.0500"), (5e-5, "5e-05")],
)
def test_three_digits(number: float, text: str) -> None:
    assert report.three_digits(number) == text
