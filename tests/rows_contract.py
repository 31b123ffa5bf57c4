"""What every back end of the operator must do, whatever it runs on: operands, checks, test cases.

A pytest plugin (see conftest.py): its fixtures can be used everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from cac_fast.backend import reference
from cac_fast.operands import Operands

Given = tuple[Tensor, ...]
Rows = Callable[..., tuple[Tensor, Tensor]]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["voc", "ids", "few", "one"]
# The largest logit that needs no offset lies between 1/0.1 and 1/0.09 in float16, else between
# 1/0.016 and 1/0.015.
TEMPERATURES = [1.0, 0.1, 0.09, 0.016, 0.015, 0.0005]


def flat(rows: Callable[..., tuple[Tensor, Tensor]]) -> Rows:
    """A back end's function, called with the seven operands one by one."""

    def rows_of(*given: Any, **more: Any) -> tuple[Tensor, Tensor]:
        return rows(Operands(*given[:7]), *given[7:], **more)

    return rows_of


dense = flat(reference.dc_loss_rows)


def draws(count: int) -> settings:
    """So many random cases; as many more as the profile has more than 100."""
    return settings(max_examples=count * settings().max_examples // 100)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """NaN in every buffer that is not initialized."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def tf32() -> Iterator[Callable[[], None]]:
    """Allows TF32 when called, until the test ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda: setattr(matmul, "fp32_precision", "tf32")
    matmul.fp32_precision = before


def voc_labels(count: int, rng: torch.Generator) -> Tensor:
    """21 classes, three quarters of all pixels background."""
    labels = torch.randint(1, 21, (count,), generator=rng)
    return labels.masked_fill(torch.rand(count, generator=rng) < 0.75, 0)


def operands(
    labels: str,
    dtype: torch.dtype,
    a: int = 300,
    m: int = 1000,
    d: int = 8,
    device: torch.device | str = "cpu",
) -> Given:
    """The arguments of a back end but the temperature; the same numbers on every device."""
    rng = torch.Generator().manual_seed(3)
    features = [
        torch.nn.functional.normalize(
            torch.randn(n, d, generator=rng, dtype=torch.float64), dim=1
        ).to(dtype)
        for n in (a, a, m)
    ]
    if labels == "voc":
        anchor_labels, negative_labels = voc_labels(a, rng), voc_labels(m, rng)
    elif labels == "ids":
        anchor_labels = torch.randperm(a, generator=rng) + 2**40
        negative_labels = torch.randperm(m, generator=rng) + 2**40
    elif labels == "few":
        anchor_labels = torch.randint(0, 2, (a,), generator=rng)
        negative_labels = torch.randint(-1, 3, (m,), generator=rng)
    else:
        anchor_labels, negative_labels = torch.full((a,), 4), torch.full((m,), 4)
        negative_labels[:2] = torch.tensor([-1, 6])
    empty = torch.rand(m, generator=rng) < 0.1
    active = torch.rand(a, generator=rng) < 0.4
    given = (*features, anchor_labels, negative_labels.masked_fill(empty, -1), active)
    return tuple(tensor.to(device) for tensor in given)


def exact(given: Given, temperature: float) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in given]
    return dense(*wide, temperature)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm())


def check_bounds(rows: Rows, given: Given, temperature: float, weights_rounded: bool) -> None:
    """Loss and gradient within what rounding allows; where there is nothing to pull, exactly 0.

    weights_rounded: to the features' dtype, for the product with the negatives.
    """
    found, expected = rows(*given, temperature), exact(given, temperature)
    dtype = given[0].dtype
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[1].dtype == dtype
    anchor_labels, negative_labels, active = given[3:]
    admitted = (negative_labels >= 0) & (negative_labels != anchor_labels.unsqueeze(1))
    nothing = ~(active & admitted.any(1))
    for mine in found:
        assert mine.isfinite().all()
        assert not mine[nothing].any()
    relative = max(1e-6, 1e-7 / temperature)
    if dtype == torch.float64:
        relative *= 1e-7  # the reference's own rounding
    assert (found[0] - expected[0]).abs().max() <= relative * expected[0].abs().max() + 1e-6
    assert distance(found[0], expected[0]) <= relative * expected[0].norm() + 1e-6
    # A gradient of float16 or bfloat16 is rounded to it once, at the end.
    rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
    # Below it numbers are lost: rows far on the right side have such gradients.
    smallest = torch.finfo(dtype).tiny * (torch.finfo(dtype).eps if dtype == torch.float16 else 1)
    allowed = (relative + rounding) * expected[1].norm() + smallest * found[1].numel() ** 0.5
    if weights_rounded:
        # So the mean of the unit negatives is, which sigmoid(x) / tau scales (x = log of the sum
        # over the negatives, less the positive's logit).
        pull = -torch.expm1(-expected[0]) / temperature
        allowed += rounding * pull.norm()
    assert distance(found[1], expected[1]) <= allowed


def check_cancellation(rows: Rows, given: Given, spread: float) -> None:
    """Features within about `spread` of one direction, as those of an untrained network are.

    The positive and the mean of the negatives nearly cancel in the gradient, so that rounding is
    relative to each of them instead of to their difference.
    """
    close = [torch.nn.functional.normalize(1 + spread * part, dim=1) for part in given[:3]]
    given = (*close, *given[3:])
    (loss, gradient), expected = rows(*given, 0.1), exact(given, 0.1)
    assert distance(loss, expected[0]) <= 1e-6 * expected[0].norm()
    each = -torch.expm1(-expected[0]) / 0.1
    dtype = given[0].dtype
    rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0  # of the weights
    assert distance(gradient, expected[1]) <= (1e-6 + rounding) * each.norm()


def error(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


def compare(rows: Rows, given: Given, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient against float64, by the error of the reference in the same dtype."""
    dtype, active = given[0].dtype, given[-1]
    loss, gradient = rows(*given, temperature)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert not loss[~active].any()
    assert not gradient[~active].any()
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    true_loss, true_gradient = exact(given, temperature)
    assert true_loss.any()
    if dtype == torch.float32:
        bound = max(1e-6, 1e-7 / temperature)
        assert (loss - true_loss).norm() <= bound * true_loss.norm() + 1e-6
        assert error(gradient, true_gradient) <= bound
    else:
        loss_there, gradient_there = dense(*given, temperature)
        assert error(loss, true_loss) <= 1.5 * error(loss_there, true_loss)
        assert error(gradient, true_gradient) <= 1.5 * error(gradient_there, true_gradient)
        cosine = torch.cosine_similarity(gradient.double().flatten(), true_gradient.flatten(), 0)
        assert cosine > 0.9999
    return loss, gradient


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every dtype that the class's back end takes."""
    contract = metafunc.cls and issubclass(metafunc.cls, RowsContract)
    if contract and "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", metafunc.cls.dtypes)


@pytest.mark.usefixtures("poisoned")
class RowsContract:
    """Subclasses live beside a fixture `rows`, the back end, and say how large a case may be.

    drawn: how many random cases, and their largest A and M.
    layout_sizes: (A, M, D) at which every layout of labels is tried, at all layout_temperatures.
    temperature_size: (A, M, D) at which every temperature is.
    dtypes: those that the back end takes; the first serves where any will do.
    """

    device = "cpu"
    dtypes: ClassVar = DTYPES
    drawn: tuple[int, int, int]
    layout_sizes: list[tuple[int, int, int]]
    layout_temperatures = (0.1, 0.01)
    temperature_size: tuple[int, int, int]

    def operands(self, labels: str, dtype: torch.dtype, a: int, m: int, d: int) -> Given:
        return operands(labels, dtype, a, m, d, self.device)

    @pytest.mark.parametrize("labels", LAYOUTS)
    def test_any_label_layout(self, rows: Rows, dtype: torch.dtype, labels: str) -> None:
        for size in self.layout_sizes:
            for temperature in self.layout_temperatures:
                compare(rows, self.operands(labels, dtype, *size), temperature)

    @pytest.mark.parametrize("temperature", TEMPERATURES)
    def test_any_temperature(self, rows: Rows, dtype: torch.dtype, temperature: float) -> None:
        compare(rows, self.operands("few", dtype, *self.temperature_size), temperature)

    def test_any_drawn_case(self, rows: Rows) -> None:
        count, most_a, most_m = self.drawn

        @draws(count)
        @hypothesis.given(
            labels=st.sampled_from(LAYOUTS),
            dtype=st.sampled_from(self.dtypes),
            a=st.integers(1, most_a),
            m=st.integers(2, most_m),
            d=st.integers(16, 256),
            temperature=st.floats(0.01, 1),
        )
        def check(
            labels: str, dtype: torch.dtype, a: int, m: int, d: int, temperature: float
        ) -> None:
            given = self.operands(labels, dtype, a, m, d)
            check_bounds(rows, given, temperature, weights_rounded=dtype.itemsize == 2)

        check()

    @pytest.mark.parametrize("spread", [0.1, 0.01])
    def test_features_of_nearly_one_direction(self, rows: Rows, spread: float) -> None:
        check_cancellation(rows, self.operands("few", self.dtypes[0], 50, 120, 16), spread)

    def test_one_channel(self, rows: Rows) -> None:
        given = self.operands("voc", self.dtypes[0], 40, 70, 1)
        check_bounds(rows, given, 0.1, weights_rounded=self.dtypes[0].itemsize == 2)

    def test_empty_sides(self, rows: Rows) -> None:
        for a, m in ((0, 5), (5, 0), (0, 0)):
            loss, gradient = rows(*self.operands("voc", self.dtypes[0], a, m, 16), 0.1)
            assert loss.shape == (a,)
            assert gradient.shape == (a, 16)
            assert not loss.any()
            assert not gradient.any()

    @pytest.mark.parametrize("temperature", [0.1, 0.01])
    def test_nothing_active_or_admitted(self, rows: Rows, temperature: float) -> None:
        *features, y, z, active = self.operands("few", torch.bfloat16, 50, 60, 16)
        every = torch.ones_like(active)
        for labels, negative_labels, chosen in (
            (y, z, torch.zeros_like(active)),
            (y, torch.full_like(z, -1), every),
            (torch.full_like(y, 7), torch.full_like(z, 7), every),
        ):
            loss, gradient = rows(*features, labels, negative_labels, chosen, temperature)
            assert not loss.any()
            assert not gradient.any()

    def test_extreme_labels_stay_apart(self, rows: Rows) -> None:
        far = torch.tensor([-(2**63), -1, 0, 1, 2**60, 2**60 + 1, 2**62, 2**63 - 1])
        *features, _, _, active = self.operands("few", self.dtypes[0], 80, 160, 16)
        y, z = far.repeat(10).to(active.device), far.repeat(20).to(active.device)
        for chosen in (torch.ones_like(active), torch.arange(80, device=active.device) % 3 > 0):
            compare(rows, (*features, y, z, chosen), 0.1)

    @pytest.mark.parametrize(
        ("anchor_dtype", "negative_dtype"),
        [(torch.uint8, torch.int8), (torch.int16, torch.int16), (torch.int32, torch.int64)],
    )
    def test_labels_of_any_integer_type_and_bound(
        self, rows: Rows, anchor_dtype: torch.dtype, negative_dtype: torch.dtype
    ) -> None:
        *features, y, z, active = self.operands("few", self.dtypes[0], 50, 120, 16)
        expected = rows(*features, y, z, active, 0.1)
        for classes in (None, 3, 250, 40_000):
            labels = y.to(anchor_dtype), z.to(negative_dtype)
            found = rows(*features, *labels, active, 0.1, classes=classes)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_views_of_any_layout(self, rows: Rows) -> None:
        a, p, n, *labels = self.operands("voc", self.dtypes[0], 90, 120, 16)
        plain = rows(a, p, n, *labels, 0.1)
        wide = torch.stack((p, p), dim=1).flatten(0, 1)
        turned = [features.T.contiguous().T for features in (a, p, n)]
        for views in ((turned[0], wide[::2], turned[2]), turned):
            found = rows(*views, *labels, 0.1)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))

    def test_a_small_loss_is_exact(self, rows: Rows) -> None:
        *features, y, z, active = self.operands("voc", self.dtypes[0], 40, 50, 16)
        anchors = features[0]
        given = (anchors, anchors, -anchors[:1].expand(50, 16).contiguous(), y, z + 30, active)
        chosen = active & ((anchors @ anchors[0]) > 0.5)
        assert chosen.any()
        for temperature, largest in ((0.05, 1e-7), (0.08, 1e-3), (0.12, 1e-3)):
            true_loss, _ = exact(given, temperature)
            loss, _ = rows(*given, temperature)
            assert true_loss[chosen].max() < largest
            torch.testing.assert_close(loss[chosen].double(), true_loss[chosen], rtol=2e-5, atol=0)

    @pytest.mark.parametrize("temperature", [0.1, 0.005])
    def test_nan_is_not_hidden(self, rows: Rows, temperature: float) -> None:
        *features, y, z, active = self.operands("few", self.dtypes[0], 50, 200, 16)
        features[2][z == 2] = torch.nan
        assert (z == 2).any()
        for mine in rows(*features, y, z, active, temperature):
            assert mine[active].isnan().all()


class HalfRowsContract(RowsContract):
    """For back ends that refuse float32."""

    dtypes: ClassVar = DTYPES[1:]
