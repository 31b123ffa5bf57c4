"""How processes meet: each try of torchrun apart from the ones before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from cac_fast.train.distributed import unused


def meet(store: dist.Store, size: int, ranks: range) -> list[str | None]:
    """What each rank finds under "address", which it then sets to what only this try has."""
    with ThreadPoolExecutor(size) as pool:
        parts = list(pool.map(lambda rank: unused(store, rank, size), ranks))
    found = [part.get("address").decode() if part.check(["address"]) else None for part in parts]
    parts[-1].set("address", "here")
    assert all(part.get("address") == b"here" for part in parts)  # one part for all of them
    return found


@pytest.mark.parametrize("size", [2, 5])
def test_a_new_try_finds_nothing_of_the_former(size):
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    for _ in range(3):
        assert meet(store, size, range(size)) == [None] * size


def test_a_try_that_not_all_have_reached_is_no_matter():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    for rank in (0, 1, 2):  # two of them are missing each time
        with pytest.raises((TimeoutError, RuntimeError)):
            unused(store, rank, 3)
    store.set_timeout(timedelta(seconds=20))
    assert meet(store, 3, range(3)) == [None] * 3
