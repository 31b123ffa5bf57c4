"""The plan in two launches under Triton's interpreter, against that of plain PyTorch, to the bit.

test_triton_plan.py runs this file.
"""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from rows_contract import LAYOUTS, operands
from torch import Tensor

from cac_fast import tiles
from cac_fast.kernels import plan
from cac_fast.operands import Operands

SIZES = tiles.Sizes(tile=16, block=32, programs=5, padded=16)
DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]

pytestmark = pytest.mark.usefixtures("poisoned")


def without_positives(a: Tensor, n: Tensor, y: Tensor, z: Tensor, active: Tensor) -> Operands:
    return Operands(a, a, n, y, z, active, 0.1)


def check(
    given: tuple[Tensor, ...], sizes: tiles.Sizes = SIZES, classes: int | None = None
) -> None:
    """given: anchors, negatives, their labels, active."""
    for copy_anchors in (False, True):
        found, expected = (
            prepare(without_positives(*given), sizes, classes, copy_anchors)
            for prepare in (plan.prepare, tiles.prepare)
        )
        assert (found.anchors is None) == (not copy_anchors)
        for mine, theirs in (
            *((found.order, expected.order), (found.plan, expected.plan)),
            ((found.negatives, found.anchors), (expected.negatives, expected.anchors)),
        ):
            for one, other in zip(mine, theirs, strict=True):
                if one is not None or other is not None:
                    assert one.dtype == other.dtype
                    assert one.is_contiguous()
                    assert torch.equal(one, other.view(one.shape))


def features(count: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, dim, generator=generator).to(dtype)


def test_any_drawn_case() -> None:
    pools = {
        dtype: [info.min, info.max, info.max - 1, 0, 1, 2, 5, *([-1] if info.min < 0 else [])]
        for dtype in DTYPES
        for info in [torch.iinfo(dtype)]
    }

    @settings(max_examples=40)
    @hypothesis.given(
        data=st.data(), classes=st.sampled_from([None, 6, 126, 254, 255, 2**15, 2**40])
    )
    def run(data: st.DataObject, classes: int | None) -> None:
        def labels(count: int) -> Tensor:
            pool = pools[data.draw(st.sampled_from(DTYPES))]
            some = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=count))
            dtype = next(d for d in DTYPES if pools[d] is pool)
            return torch.tensor((some * count)[:count], dtype=dtype)

        count, others = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 120))
        share = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
        sizes = tiles.Sizes(
            tile=data.draw(st.sampled_from([16, 64])),
            block=data.draw(st.sampled_from([16, 48, 128])),
            programs=data.draw(st.integers(1, 30)),
            padded=32,
        )
        active = torch.rand(count, generator=torch.Generator().manual_seed(count)) < share
        dim = data.draw(st.integers(1, 32))
        check(
            (features(count, dim), features(others, dim), labels(count), labels(others), active),
            sizes,
            classes,
        )

    run()


@pytest.mark.parametrize("labels", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_label_layout(labels: str, dtype: torch.dtype) -> None:
    a, _, n, y, z, active = operands(labels, dtype, 150, 170, 11)
    check((a, n, y, z, active))
    check((a, n, y, z, active), classes=21 if labels != "ids" else None)


@pytest.mark.parametrize(("count", "others"), [(1, 1), (1, 170), (150, 1), (16, 32), (17, 33)])
def test_sizes_that_divide_nothing(count: int, others: int) -> None:
    a, _, n, y, z, active = operands("few", torch.float32, count, others, 16)
    for used in (active, active | True, active & False):
        check((a, n, y, z, used))
        check((a, n, y, z.fill_(-1), used))


def test_more_tiles_and_programs_than_are_planned_at_a_time() -> None:
    a, _, n, y, z, active = operands(
        "voc", torch.float32, 2 * plan._SEARCHES_AT_A_TIME * 16 + 40, 600, 1
    )
    check((a, n, y, z, active | True), SIZES._replace(programs=plan._SEARCHES_AT_A_TIME + 7))
    check((a, n, y, z, active), SIZES._replace(programs=2 * plan._SEARCHES_AT_A_TIME + 1))


def test_views_of_any_layout() -> None:
    a, _, n, y, z, active = operands("few", torch.float32, 90, 120, 9)
    turned = a.T.contiguous().T, n.repeat(1, 2)[:, ::2]
    labels = y.repeat_interleave(2)[::2], z.repeat_interleave(3)[::3]
    check((*turned, *labels, active.repeat_interleave(2)[::2]))


def test_labels_that_break_the_bound_count_as_none() -> None:
    y, z = torch.tensor([1, 254, 300, 2]), torch.tensor([1, 300, 254, 2, 255, 2**60])
    given = features(4, 3), features(6, 3), y, z, torch.ones(4, dtype=torch.bool)
    check(given, classes=4)
    order = plan.prepare(without_positives(*given), SIZES, 4).order
    assert int(order.num_admissible) == 2
    assert order.negatives.tolist() == [0, 3, 1, 2, 4, 5]


def test_parts_begin_where_triton_need_not_compile_again() -> None:
    for count in range(1, 20):
        a, _, n, y, z, active = operands("few", torch.float32, count, 7, 4)
        order, parts, *_ = plan.prepare(without_positives(a, n, y, z, active), SIZES)
        for part in (*order[:4], parts.borders, parts.ends, parts.share):
            assert part.data_ptr() % 16 == 0
