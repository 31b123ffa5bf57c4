"""A round of faults: trainings that are killed, that lose a rank, whose disk fills, and go on.

`make test-faults` runs it; no other test run collects it. FAULTS is the number of trainings that
are killed (50); two fifths as many lose a rank, and as many a full disk. FAULTS_SEED repeats what
a former round drew: `FAULTS_SEED=7 pytest tests/fault_round.py -k "killed and 17"`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from faults import (
    ENTRIES,
    LIMIT,
    OPTIONS,
    PHASES,
    HangError,
    Place,
    Server,
    Training,
    kill_in,
    looks,
    meet,
    torchrun,
)
from small_training import ROOT, arguments, assert_same_bits, losses, weights
from tiny_scenes import write_scenes

from cac_fast.train import checkpoint
from cac_fast.train.log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(10 * LIMIT)]

KILLS = int(os.environ.get("FAULTS", "50"))
OTHERS = max(1, KILLS * 2 // 5)
SEED = int(os.environ.get("FAULTS_SEED", random.SystemRandom().randrange(10**6)))
TRIES = 10  # to meet a phase that may pass by unseen
DISK = 64  # MB


class Round:
    """The data, the trainings that never stopped, and what was counted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_scenes(folder / "data", {"train": (4, 20), "val": (3, 0)})
        self.server = Server()
        self.began = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.started: list[Training] = []
        self.wholes: dict[int, tuple[Place, dict[str, float]]] = {}

    def place(self, name: str) -> Place:
        return Place(self.folder / name, self.folder / name)

    def start(
        self, place: Place, processes: int = 1, restarts: int = 0, server: Server | None = None
    ) -> Training:
        given = arguments(
            self.data, place.given / "run", *OPTIONS, "--cache", str(place.given / "cache")
        )
        given += ["--batch-size", str(2 * processes)]
        log = self.folder / f"log{len(self.started)}"
        if processes == 1:
            training = (server or self.server).start(given, log)
        else:
            training = torchrun(ROOT / "train" / "main.py", given, log, restarts)
        self.started.append(training)
        self.counts["started"] += 1
        return training

    def whole(self, processes: int) -> tuple[Place, dict[str, float]]:
        """A training that never stopped, and the seconds that it spent in each phase."""
        if processes not in self.wholes:
            place = self.place(f"whole{processes}")
            spent: Counter[str] = Counter()
            training = self.start(place, processes)
            for phase, passed in looks(training, place):
                spent[phase] += passed
            assert training.wait() == 0, training.said("err")
            assert len(list((place.seen / "cache").glob("*.raw"))) == ENTRIES
            assert set(PHASES) <= set(spent), spent
            self.wholes[processes] = place, spent
        return self.wholes[processes]

    def finish(self, place: Place, processes: int, server: Server | None = None) -> None:
        """Give the same command again: it ends as the training that never stopped."""
        training = self.start(place, processes, server=server)
        assert training.wait() == 0, training.said("err")
        self.assert_equal(place, processes)

    def assert_equal(self, place: Place, processes: int) -> None:
        run, other = place.seen / "run", self.whole(processes)[0].seen / "run"
        mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, other))
        best = [checkpoint.read(folder / "best.pt") for folder in (run, other)]
        scores = [[x["miou"] for x in lines if x["kind"] == "val"] for lines in (mine, theirs)]
        if processes == 1:
            assert_same_bits(weights(run / "last.pt"), weights(other / "last.pt"))
            assert_same_bits(*(state["network"] for state in best))
            assert losses(mine) == losses(theirs) and scores[0] == scores[1]
        else:
            assert losses(mine) == pytest.approx(losses(theirs), rel=1e-5)
            assert scores[0] == pytest.approx(scores[1], abs=1e-3)
        assert best[0]["best"]["iteration"] == best[1]["best"]["iteration"]
        left = [path.name for path in run.iterdir() if path.suffix == ".tmp"]
        assert left == []

    @contextmanager
    def counted(self, kind: str) -> Iterator[None]:
        try:
            yield
        except HangError:
            self.counts["hangs"] += 1
            raise
        except Exception:
            self.counts["lost"] += 1
            raise
        finally:
            for training in self.started:
                training.kill()
        self.counts[kind] += 1

    def report(self) -> str:
        kills = sum(self.counts[f"killed in {phase}"] for phase in PHASES)
        by_phase = ", ".join(f"{phase} {self.counts[f'killed in {phase}']}" for phase in PHASES)
        return (
            f"FAULTS_SEED={SEED}: {self.counts['started']} starts; {kills} trainings killed "
            f"({by_phase}), {self.counts['rank killed']} lost a rank, {self.counts['disk full']} "
            f"a full disk; lost {self.counts['lost']}, hangs {self.counts['hangs']}; "
            f"{time.monotonic() - self.began:.0f} s"
        )


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Round]:
    print(f"\nFAULTS_SEED={SEED}", flush=True)
    folder = tmp_path_factory.mktemp("faults")
    one = Round(folder)
    yield one
    one.server.close()
    print(f"\n{one.report()}", flush=True)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def disk(faults: Round) -> Iterator[tuple[Server, Place]]:
    """A small disk that a server of its own has mounted."""
    folder = faults.folder / "disk"
    folder.mkdir()
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "-m"]
    mount = f'mount -t tmpfs -o size={DISK}m tmpfs "$0" && exec "$@"'
    command = [*alone, "sh", "-c", mount, str(folder)]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no disk can be mounted here: {tried.stderr.strip()}")
    server = Server(*command)
    yield server, Place(folder, Path(f"/proc/{server.process.pid}/root{folder}"))
    server.close()


@pytest.mark.parametrize("number", range(KILLS))
def test_killed(faults: Round, number: int) -> None:
    """Killed in a phase, at a random moment of it, every fifth as two processes."""
    rng = random.Random(f"{SEED} killed {number}")
    wanted = PHASES[number % len(PHASES)]
    processes = 2 if (number + number // 5) % 5 == 4 else 1
    spent = faults.whole(processes)[1][wanted]
    with faults.counted(f"killed in {wanted}"):
        for tried in range(1, TRIES + 1):
            place = faults.place(f"killed{number}-{tried}")
            training = faults.start(place, processes)
            if kill_in(training, place, wanted, rng.uniform(0, spent / tried)):
                break
            shutil.rmtree(place.seen)
        else:
            pytest.fail(f"{wanted} was not met in {TRIES} trainings")
        faults.finish(place, processes)
        shutil.rmtree(place.seen)


@pytest.mark.parametrize("number", range(OTHERS))
def test_rank_killed(faults: Round, number: int) -> None:
    """One of two processes is killed; torchrun starts both anew, and they go on."""
    rng = random.Random(f"{SEED} rank {number}")
    wanted, rank = PHASES[number % len(PHASES)], rng.randrange(2)
    spent = faults.whole(2)[1][wanted]
    with faults.counted("rank killed"):
        for tried in range(1, TRIES + 1):
            place = faults.place(f"rank{number}-{tried}")
            training = faults.start(place, 2, restarts=3)
            seconds = rng.uniform(0, spent / tried)
            if next(meet(training, place, wanted, seconds), "ended") is None:
                with suppress(ProcessLookupError):  # this rank has just come to its end
                    os.kill(training.ranks()[rank], signal.SIGKILL)
                    break
            training.wait()
            shutil.rmtree(place.seen)
        else:
            pytest.fail(f"{wanted} was not met in {TRIES} trainings")
        assert training.wait() == 0, training.said("err")
        faults.assert_equal(place, 2)
        shutil.rmtree(place.seen)


@pytest.mark.parametrize("number", range(OTHERS))
def test_full_disk(faults: Round, disk: tuple[Server, Place], number: int) -> None:
    """The disk fills: one line and exit code 2; after room is made, the same command goes on."""
    rng = random.Random(f"{SEED} disk {number}")
    wanted = PHASES[number % len(PHASES)]
    spent = faults.whole(1)[1][wanted]
    server, place = disk
    with faults.counted("disk full"):
        for tried in range(1, TRIES + 1):
            training = faults.start(place, server=server)
            seconds = rng.uniform(0, spent / tried)
            if next(meet(training, place, wanted, seconds), "ended") is None:
                # No byte is left half of the time: the small files must meet it too.
                ballast = fill(place.seen, rng.choice((0, int(4e6 * rng.random() ** 2))))
                if training.wait() != 0:
                    break
                ballast.unlink()
            clear(place.seen)
        else:
            pytest.fail(f"{wanted} was not met in {TRIES} trainings")
        assert_one_line(training)
        again = faults.start(place, server=server)  # nothing has changed
        again.wait()
        assert_one_line(again)
        ballast.unlink()
        faults.finish(place, 1, server)
        clear(place.seen)


def fill(folder: Path, left: int) -> Path:
    """Leave so many bytes of room on the folder's disk; return the file to delete."""
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        for _ in range(1000):
            if (size := _room(folder) - left) <= 0:
                break
            with suppress(OSError):  # the training has written meanwhile
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
    return ballast


def _room(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def assert_one_line(training: Training) -> None:
    said = training.said("err")
    assert training.code() == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
