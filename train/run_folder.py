"""The run folder: which run lies there, and whether this one goes on from it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from typing import Any, TextIO

from cac_fast.train import checkpoint, provenance
from cac_fast.train.config import Config, differences
from cac_fast.train.distributed import World
from cac_fast.train.errors import InputError, writing


class RunFolder:
    """Where one run keeps its files, seen from one rank.

    path: the folder. last: the state that a rerun goes on from. best: the network that scored best.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.path = config.run_folder
        self.last, self.best = self.path / "last.pt", self.path / "best.pt"
        self.to_restart = self.path / "to-restart"  # a former run lies here, to be deleted
        self.lock: TextIO | None = None

    def former(self, inputs: dict[str, str]) -> dict[str, Any] | None:
        """The state that this run goes on from, None for a new run. All ranks call it together.

        inputs: by name what tells the lists of images from others, as the state holds it.

        Raises:
            InputError: the former run has other settings or images, or cannot be read.
        """
        if self.path.is_dir():
            self.world.on_main(self._take_lock)
        # Each machine's torchrun has a count of its own.
        tries = self.world.all_gather_objects(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        starts_over = self.world.on_main(lambda: self._starts_over(first=set(tries) == {"0"}))
        found = self.last.is_file() and not starts_over
        if len(set(self.world.all_gather_objects(found))) > 1:
            raise InputError(
                f"not all processes find {self.last}: --output must be on a disk that all "
                "machines see"
            )
        if not found:
            if self.best.is_file() and not self.config.run.restart:
                raise InputError(
                    f"{self.best} is of a former run, whose last.pt is gone: use another "
                    "--output, or --restart, which deletes it"
                )
            return None
        try:
            former = checkpoint.read(self.last)
        except InputError as error:
            raise InputError(f"{error}; --restart starts the run over") from error
        if "method" not in former:
            raise InputError(
                f"{self.last} holds no training state (is it a copy of best.pt?): "
                "--restart starts the run over"
            )
        changed = differences(self.config, former["config"])
        changed += [
            f"other {name} images" for name in inputs if inputs[name] != former["inputs"].get(name)
        ]
        if changed:
            raise InputError(
                f"{self.path} holds a run with other settings ({'; '.join(changed[:3])}): "
                "use another --output, or --restart to start over"
            )
        return former

    def _starts_over(self, first: bool) -> bool:
        """Whether `--restart` still has to be done: torchrun repeats it after a failure."""
        if not self.config.run.restart:
            return False
        if not first:
            return self.to_restart.exists()
        with writing(f"--output {self.path}"):
            if self.last.is_file():
                self.to_restart.touch()
        return True

    def make(self) -> None:
        """Make the folder and keep other processes out of it; raises InputError if one is in it."""
        with writing(f"--output {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()

    def prepare(self, new: bool) -> None:
        """Make the folder, note the settings, and delete what `--restart` starts over from.

        new: this run goes on from nothing.
        """
        self.make()
        with writing(f"--output {self.path}"):
            if self.config.run.restart and new:
                former = "last.pt", "best.pt", "trace.json", "samples/[0-9]*.png", "to-restart"
                for old in former:
                    for path in self.path.glob(old):
                        path.unlink()
            settings = json.dumps(self.config.flat(), indent=2)
            (self.path / "config.json").write_text(settings + "\n")
            provenance.note(self.path, self.world.device, new)

    def _take_lock(self) -> None:
        """Keep other processes out of the folder for as long as this one lives.

        A record lock, since the loaders' processes do not inherit it.

        Raises:
            InputError: another process has it.
        """
        if self.lock is not None:
            return
        try:
            file = open(self.path / "lock", "a+")  # noqa: SIM115 (kept open: that is the lock)
        except OSError:  # a folder that cannot be written to says so where it is written to
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise InputError(
                f"{self.path} is in use by another run ({file.read().strip() or 'just starting'}): "
                "wait for its end, or use another --output"
            ) from error
        except OSError:  # a file system without locks
            return
        self.lock = file
        with contextlib.suppress(OSError):  # a full disk: it holds without the note too
            file.truncate(0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
