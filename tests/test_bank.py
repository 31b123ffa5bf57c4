"""The ring of past features: contents, saving, and the gather over two processes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cac_fast import FeatureBank


def batch(number: int, rows: int = 3, dim: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that are all `number`, labels 10 * number, 10 * number + 1, ..."""
    return torch.full((rows, dim), float(number)), 10 * number + torch.arange(rows)


def stored(bank: FeatureBank) -> dict[int, float]:
    """Label to first channel, over the places that are not empty."""
    assert bank.features.shape == (len(bank.labels), bank.dim)
    used = bank.labels >= 0
    return dict(zip(bank.labels[used].tolist(), bank.features[used, 0].tolist(), strict=True))


def expected(*numbers: int, rows: int = 3) -> dict[int, float]:
    return {10 * n + row: float(n) for n in numbers for row in range(rows)}


def test_keeps_the_last_steps_the_current_one_included() -> None:
    bank = FeatureBank(steps=2, dim=2)
    assert len(bank.features) == len(bank.labels) == bank.pushes == 0
    bank.push(*batch(1))
    assert stored(bank) == expected(1)
    assert bank.labels.tolist().count(-1) == 3
    bank.push(*batch(2))
    assert stored(bank) == expected(1, 2)
    for number in (3, 4, 5):
        bank.push(*batch(number))
        assert stored(bank) == expected(number - 1, number)
    assert bank.pushes == 5
    assert bank.features.shape == (6, 2)
    assert bank.features.dtype == torch.bfloat16
    assert bank.labels.dtype == torch.int64


def test_one_step_keeps_only_the_current_push() -> None:
    bank = FeatureBank(steps=1, dim=2)
    for number in (1, 2):
        bank.push(*batch(number))
        assert stored(bank) == expected(number)


def test_ring_is_allocated_once() -> None:
    bank = FeatureBank(steps=2, dim=2)
    bank.push(*batch(1))
    place = bank.features.data_ptr()
    for number in range(2, 6):
        bank.push(*batch(number))
    assert bank.features.data_ptr() == place


def test_shorter_push_leaves_empty_places_and_longer_is_refused() -> None:
    bank = FeatureBank(steps=2, dim=2)
    bank.push(*batch(1))
    bank.push(*batch(2))
    bank.push(*batch(3, rows=1))
    assert stored(bank) == {**expected(2), **expected(3, rows=1)}
    assert bank.labels.shape == (6,)
    with pytest.raises(ValueError, match="features has 4 rows but this bank keeps 3"):
        bank.push(*batch(4, rows=4))


def test_push_takes_no_gradient() -> None:
    bank = FeatureBank(steps=1, dim=2, dtype=torch.float32)
    features, labels = batch(1)
    bank.push(features.requires_grad_(), labels)
    assert not bank.features.requires_grad
    with torch.no_grad():
        features.add_(5)
    assert stored(bank) == expected(1)


@pytest.mark.parametrize(
    ("features", "labels", "name"),
    [
        (torch.zeros(3, 4), torch.zeros(3).long(), "features"),
        (torch.zeros(6), torch.zeros(3).long(), "features"),
        (torch.zeros(3, 2), torch.zeros(2).long(), "labels"),
        (torch.zeros(3, 2), torch.zeros(3), "labels"),
        (torch.zeros(3, 2), torch.zeros(3).bool(), "labels"),
    ],
)
def test_bad_push_is_named(features: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FeatureBank(steps=1, dim=2).push(features, labels)


@pytest.mark.parametrize(
    ("choices", "name"),
    [
        ({"steps": 0, "dim": 2}, "steps"),
        ({"steps": 1, "dim": 0}, "dim"),
        ({"steps": 1, "dim": 2, "dtype": torch.int64}, "dtype"),
    ],
)
def test_bad_choice_is_named(choices: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FeatureBank(**choices)


@pytest.mark.parametrize("pushes", [0, 1, 3])
def test_state_survives_a_file(pushes: int) -> None:
    bank, copy = FeatureBank(steps=2, dim=2), FeatureBank(steps=2, dim=2)
    for number in range(1, pushes + 1):
        bank.push(*batch(number))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    copy.load_state_dict(torch.load(file, weights_only=True))
    for number in (7, 8):
        assert copy.pushes == bank.pushes
        assert copy.push_id == bank.push_id
        assert torch.equal(copy.features, bank.features)
        assert torch.equal(copy.labels, bank.labels)
        for each in (bank, copy):
            each.push(*batch(number))


def test_loaded_state_is_a_copy() -> None:
    bank, copy = FeatureBank(steps=1, dim=2), FeatureBank(steps=1, dim=2)
    bank.push(*batch(1))
    copy.load_state_dict(bank.state_dict())
    bank.push(*batch(2))
    assert stored(copy) == expected(1)


def test_loaded_ring_grows_for_a_larger_batch() -> None:
    bank, copy = FeatureBank(steps=2, dim=2), FeatureBank(steps=2, dim=2)
    bank.push(*batch(1))
    copy.load_state_dict(bank.state_dict())
    copy.push(*batch(2, rows=5))
    assert stored(copy) == {**expected(1), **expected(2, rows=5)}


def test_state_of_another_bank_is_refused() -> None:
    state = FeatureBank(steps=2, dim=2).state_dict()
    for other in (FeatureBank(steps=3, dim=2), FeatureBank(steps=2, dim=4)):
        with pytest.raises(ValueError, match="2 steps of 2"):
            other.load_state_dict(state)


def filled(pushes: int) -> FeatureBank:
    """Two steps of 20 rows, whose features are their labels; the last 5 of a push are empty."""
    bank = FeatureBank(steps=2, dim=1, dtype=torch.float32)
    for number in range(pushes):
        labels = 100 * (number % 2) + torch.arange(20)
        bank.push(labels.unsqueeze(1).float(), labels.masked_fill(torch.arange(20) >= 15, -1))
    return bank


def test_sample_is_a_uniform_subset() -> None:
    """Each of the 30 filled places is drawn equally often; the weighted sum meets the whole one."""
    bank = filled(2)
    counts: dict[int, int] = dict.fromkeys(bank.labels[bank.labels >= 0].tolist(), 0)
    sums = []
    draws = 600
    for seed in range(draws):
        features, labels, weight = bank.sample(10, seed)
        assert weight == 3 and labels.unique().numel() == 10 and labels.min() >= 0
        assert torch.equal(features[:, 0], labels.float())
        sums.append((weight * features.sum()).item())
        for label in labels.tolist():
            counts[label] += 1
    spread = (draws * (1 / 3) * (2 / 3)) ** 0.5
    assert len(counts) == 30
    assert all(abs(count - draws / 3) < 4.5 * spread for count in counts.values())
    whole = bank.features[bank.labels >= 0].sum().item()
    mean, error = torch.tensor(sums).mean().item(), torch.tensor(sums).std().item() / draws**0.5
    assert abs(mean - whole) < 4 * error


def test_sample_depends_on_seed_and_pushes_alone() -> None:
    bank, resumed = filled(4), FeatureBank(steps=2, dim=1, dtype=torch.float32)
    resumed.load_state_dict(bank.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = bank.sample(10, seed=1)[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(resumed.sample(10, seed=1)[1], first)
    assert not torch.equal(bank.sample(10, seed=2)[1], first)
    assert not torch.equal(filled(6).sample(10, seed=1)[1], first)  # the same rows, two steps on


def test_sample_takes_empty_places_last() -> None:
    bank = filled(1)
    _, labels, weight = bank.sample(18, seed=0)
    assert sorted(labels.tolist()) == [-1] * 3 + list(range(15)) and weight == 1
    _, labels, weight = bank.sample(40, seed=0)
    assert len(labels) == 40 and weight == 1
    with pytest.raises(ValueError, match="count"):
        bank.sample(0, seed=0)


TWO_RANKS = """
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from cac_fast import DirectionalContrastiveLoss, FeatureBank, overlap_from_crops

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

# Unequal shares of the batch: rank 0 has 2 rows, rank 1 has 3.
bank = FeatureBank(steps=2, dim=3)
big = 2**40
for step in range(3):
    rows = 2 + rank if step < 2 else 1
    labels = big + 100 * step + 10 * rank + torch.arange(rows)
    features = (labels - big).float().unsqueeze(1).expand(-1, 3)
    ids = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    dist.all_gather(ids, torch.tensor(bank.push_id))
    assert ids[0] != ids[1]
    bank.push(features, labels)
used = bank.labels >= 0
found = sorted((bank.labels[used] - big).tolist())
assert found == [100, 101, 110, 111, 112, 200, 210], found
assert torch.equal(bank.features[used][:, 2].float(), (bank.labels[used] - big).float())
assert bank.labels.shape == (12,), bank.labels.shape

# What is drawn is the same on every rank.
rows, labels, weight = bank.sample(5, seed=3)
everyone = [torch.zeros_like(labels) for _ in range(2)]
dist.all_gather(everyone, labels)
assert torch.equal(*everyone)
assert weight == 7 / 5, weight

# A push does not wait for the other ranks; what reads the ring does.
told = Path(sys.argv[2] + ".pushed")
if rank == 1:
    while not told.exists():
        time.sleep(0.01)
bank.push(torch.full((1, 3), 7.0 + rank), torch.tensor([7 + rank]))
if rank == 0:
    told.touch()
used = bank.labels >= 0
found = sorted((bank.labels[used] % big).tolist())
assert found == [7, 8, 200, 210], found

# A ring of another number of ranks, which two do not divide: nothing of it outlives its steps.
bank = FeatureBank(steps=1, dim=3)
bank.load_state_dict(
    {"features": torch.ones(1, 5, 3), "labels": torch.arange(5).unsqueeze(0) + 7, "pushes": 1}
)
bank.push(torch.zeros(2, 3), torch.tensor([1, 2]))
assert sorted(bank.labels.tolist()) == [-1, 1, 1, 2, 2], bank.labels

# A rank whose crops do not overlap has loss 0 with a graph, and still serves the other one.
offset = torch.tensor([[0, 0]]) if rank == 0 else torch.tensor([[9, 9]])
flip, valid = torch.zeros(1, dtype=torch.bool), torch.tensor([[2, 2]])
overlap = overlap_from_crops(offset, flip, flip, valid, valid, (2, 2))
torch.manual_seed(rank)
features = [torch.randn(1, 3, 2, 2, requires_grad=True) for _ in range(2)]
logits = [torch.randn(1, 4, 2, 2) for _ in range(2)]
criterion = DirectionalContrastiveLoss(threshold=0.0, bank=FeatureBank(1, 3))
out = criterion(*features, *logits, overlap)
out.loss.backward()
assert out.negatives == 16, out.negatives
assert (out.active > 0) == (rank == 0)
assert (out.loss > 0) == (rank == 0)
assert all(f.grad is not None for f in features)
dist.destroy_process_group()
"""


def test_two_processes_share_their_features(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
