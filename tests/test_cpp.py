"""The C++ back end against the float64 reference: values, bits, memory, what is never computed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows_contract import check_bounds, check_cancellation, dense, distance, draws, exact, flat
from torch import Tensor

from cac_fast import _extension, build_info, directional_contrastive_loss
from cac_fast._extension import unavailable
from cac_fast.backend import cpp

dc_loss_rows = flat(cpp.dc_loss_rows)

# Outputs and work space alike.
pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.usefixtures("poisoned"),
]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
UNITS = "bfloat16 units"
LAYOUTS = ["voc", "ids", "few", "one label", "one admitted", "none admitted"]
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=[*DTYPES, UNITS], ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Of the features. "bfloat16 units": products of bfloat16, whatever this CPU has for them."""
    units = request.param == UNITS
    monkeypatch.setattr(_extension, "bfloat16_units", lambda: units)
    return torch.bfloat16 if units else request.param


def labels_of(layout: str, a: int, m: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    def voc(count: int) -> Tensor:
        labels = torch.randint(1, 21, (count,), generator=rng)
        return labels.masked_fill(torch.rand(count, generator=rng) < 0.73, 0)

    if layout == "voc":
        return voc(a), voc(m)
    if layout == "ids":
        # Labels of which some occur on both sides, each once, too far apart to be counted.
        return torch.randperm(a, generator=rng) + 2**40, torch.randperm(m, generator=rng) + 2**40
    if layout == "few":
        return (
            torch.randint(-1, 3, (a,), generator=rng),
            torch.randint(-1, 4, (m,), generator=rng),
        )
    negative_labels = torch.full((m,), 4)
    negative_labels[: m // 3] = -1
    if layout == "one label":
        negative_labels[m // 2 :] = 6
    elif layout == "one admitted":
        negative_labels[m // 2 : m // 2 + 1] = 2**62
    return torch.full((a,), 4), negative_labels


def operands(
    layout: str, dtype: torch.dtype, a: int = 300, m: int = 2500, d: int = 16, seed: int = 0
) -> Operands:
    rng = torch.Generator().manual_seed(seed)
    features = [
        torch.nn.functional.normalize(
            torch.randn(n, d, generator=rng, dtype=torch.float64), dim=1
        ).to(dtype)
        for n in (a, a, m)
    ]
    return (*features, *labels_of(layout, a, m, rng), torch.rand(a, generator=rng) < 0.8)


def check(given: Operands, temperature: float) -> None:
    units = given[0].dtype == torch.bfloat16 and _extension.bfloat16_units()
    check_bounds(dc_loss_rows, given, temperature, weights_rounded=units)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02, 0.015, 0.0014, 0.0005])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_float64(dtype: torch.dtype, layout: str, temperature: float) -> None:
    check(operands(layout, dtype), temperature)


@pytest.mark.parametrize("temperature", [10.0, 0.1, 0.001])
@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 15, 16, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, UNITS], indirect=True)
def test_equals_float64_in_any_dimension(dtype: torch.dtype, d: int, temperature: float) -> None:
    check(operands("voc", dtype, 700, 3000, d), temperature)


@draws(40)
@given(
    a=st.integers(1, 700),
    m=st.integers(1, 5000),
    # In few dimensions the negatives' mean can all but equal the positive, and the bound, relative
    # to their difference, ask for more digits than float32 has.
    d=st.integers(16, 256),
    layout=st.sampled_from(LAYOUTS),
    temperature=st.floats(0.0005, 10),
    dtype=st.sampled_from(DTYPES),
    units=st.booleans(),
)
def test_equals_float64_in_any_size(
    a: int, m: int, d: int, layout: str, temperature: float, dtype: torch.dtype, units: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_extension, "bfloat16_units", lambda: units)
        check(operands(layout, dtype, a, m, d, seed=a), temperature)


@pytest.mark.parametrize("spread", [0.1, 0.01])
def test_features_of_nearly_one_direction(spread: float) -> None:
    check_cancellation(dc_loss_rows, operands("voc", torch.float32), spread)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, UNITS], indirect=True)
def test_error_of_short_dtypes_is_at_most_that_of_plain_pytorch(
    dtype: torch.dtype, temperature: float
) -> None:
    given = operands("voc", dtype, d=128)
    expected = exact(given, temperature)
    plain = dense(*given, temperature)
    found = dc_loss_rows(*given, temperature)
    for mine, theirs, truth in zip(found, plain, expected, strict=True):
        assert distance(mine, truth) <= 1.5 * distance(theirs, truth)
    cosine = torch.cosine_similarity(found[1].double().flatten(), expected[1].flatten(), dim=0)
    assert cosine > 0.9999


def test_a_small_loss_is_exact() -> None:
    """Opposite negatives at a low temperature: the loss is far below the spacing of 1."""
    row = torch.tensor([[1.0, 0.0]])
    negatives = -row.expand(10, 2)
    labels, others = torch.zeros(1, dtype=torch.long), torch.ones(10, dtype=torch.long)
    for temperature in (0.1, 0.05, 0.03):
        loss, _ = dc_loss_rows(row, row, negatives, labels, others, labels == 0, temperature)
        exact = torch.log1p(10 * torch.exp(torch.tensor(-2 / temperature, dtype=torch.float64)))
        assert 0 < exact < 1e-7
        torch.testing.assert_close(loss.double(), exact[None], rtol=1e-5, atol=0)


def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    given = operands("voc", dtype)
    expected = dc_loss_rows(*given, 0.1)
    by_column = [x.T.contiguous().T for x in given[:3]]
    spread = [torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0] for x in given[:3]]
    every_other = [torch.stack((x, ~x), dim=1)[:, 0] for x in given[3:]]
    assert not any(x.is_contiguous() for x in (*by_column, *spread, *every_other))
    for features in (by_column, spread):
        for mine, theirs in zip(dc_loss_rows(*features, *every_other, 0.1), expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("temperature", [0.1, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, UNITS], indirect=True)
def test_zero_rows_and_duplicates(dtype: torch.dtype, temperature: float) -> None:
    a, p, n, *labels = operands("voc", dtype)
    a[::3] = 0
    p[::4] = 0
    n[::5] = 0
    n[1::5] = a[1]
    n[2::5] = p[2]
    check((a, p, n, *labels), temperature)


@pytest.mark.parametrize("a, m, d", [(0, 5, 4), (5, 0, 4), (0, 0, 4), (5, 7, 0), (0, 0, 0)])
def test_empty(a: int, m: int, d: int, dtype: torch.dtype) -> None:
    given = operands("few", dtype, a, m, d)
    found = dc_loss_rows(*given, 0.1)
    for mine, theirs in zip(found, exact(given, 0.1), strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype))


def test_nothing_active() -> None:
    *given, active = operands("voc", torch.float32)
    for found in dc_loss_rows(*given, torch.zeros_like(active), 0.1):
        assert not found.any()


def test_the_inputs_are_kept() -> None:
    given = operands("voc", torch.float32)
    before = [tensor.clone() for tensor in given]
    dc_loss_rows(*given, 0.1)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(given, before, strict=True))


@pytest.mark.parametrize("temperature", [0.1, 0.001])
@pytest.mark.parametrize("a, m", [(40, 9000), (900, 6000)], ids=["few anchors", "many anchors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, UNITS], indirect=True)
def test_same_bits_on_every_run_and_for_every_number_of_threads(
    dtype: torch.dtype, a: int, m: int, temperature: float
) -> None:
    given = operands("voc", dtype, a, m, 100)
    threads = torch.get_num_threads()
    expected = dc_loss_rows(*given, temperature)
    try:
        for count in (1, 2, 3, 5, 2, 1):
            torch.set_num_threads(count)
            for mine, theirs in zip(dc_loss_rows(*given, temperature), expected, strict=True):
                assert torch.equal(mine, theirs)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, UNITS], indirect=True)
def test_negatives_that_nobody_admits_are_never_computed(dtype: torch.dtype) -> None:
    """They are NaN here, and 0 times NaN would be NaN."""
    *features, _, negative_labels, active = operands("few", dtype, 600, 3000)
    labels = torch.arange(600) // 300
    features[2][negative_labels < 0] = torch.nan
    for mine in dc_loss_rows(*features, labels, negative_labels, active, 0.1):
        assert mine.isfinite().all()
    # A label of half a tile of anchors has tiles of its own: they leave its negatives out.
    labels = torch.full((600,), 1)
    features[2][negative_labels == 1] = torch.nan
    for mine in dc_loss_rows(*features, labels, negative_labels, active, 0.1):
        assert mine.isfinite().all()
        assert mine.any()


@pytest.mark.parametrize("dtype", [torch.float32, UNITS], indirect=True)
@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_nan_is_not_hidden(dtype: torch.dtype, temperature: float) -> None:
    *features, labels, negative_labels, active = operands("few", dtype)
    features[2][negative_labels == 3] = torch.nan
    assert (negative_labels == 3).any()
    for mine in dc_loss_rows(*features, labels, negative_labels, active, temperature):
        assert mine[active].isnan().all()


def test_gradcheck() -> None:
    rng = torch.Generator().manual_seed(0)
    features = [torch.randn(n, 6, generator=rng, dtype=torch.float64) for n in (9, 9, 14)]
    labels = [torch.randint(-1, 3, (n,), generator=rng) for n in (9, 14)]
    confidences = [torch.rand(9, generator=rng, dtype=torch.float64) for _ in range(2)]

    def loss(anchors: Tensor) -> Tensor:
        return directional_contrastive_loss(
            anchors,
            *features[1:],
            *labels,
            *confidences,
            threshold=0.2,
            reduction="none",
            backend="cpp",
        )

    assert loss(features[0]).count_nonzero() > 2
    torch.autograd.gradcheck(loss, features[0].requires_grad_())


def test_memory_has_no_term_of_anchors_times_negatives() -> None:
    program = """
import resource, torch
from cac_fast import _extension
from cac_fast.backend import cpp
from cac_fast.operands import Operands
assert _extension.unavailable() is None
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(count):
    features = [torch.nn.functional.normalize(torch.randn(count, 4), dim=1) for _ in range(3)]
    labels = torch.arange(count)
    cpp.dc_loss_rows(Operands(*features, labels, labels, labels >= 0, 0.1))
run(1000)
before = peak()
run(16000)
print(peak() - before)
"""
    command = [sys.executable, "-c", program]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # In KiB: the matrix of all pairs would be 16000 x 16000 x 4 bytes, a gigabyte.
    assert grown < 32 * 1024


def test_build_info() -> None:
    info = build_info()
    assert info["built"] is True
    assert info["standard"] >= 202002
    assert "-O3" in info["flags"].split(",")
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["compiler"]
