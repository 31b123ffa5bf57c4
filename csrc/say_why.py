"""A build that goes on without what cannot be built, and leaves the reason in its place."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from setuptools import Extension


class SayWhy:
    """Before a class of the command build_ext: what fails leaves its reason where it would be.

    Class attributes: reasons, by the extension's name, why there is no use in trying to build it;
    home, the extensions' folder in the source; must, names of those that must not fail.
    """

    reasons: ClassVar[dict[str, str | None]]
    home: ClassVar[Path]
    must: ClassVar[tuple[str, ...]]

    def run(self) -> None:
        library = Path(self.build_lib) / self.home.name
        self.folder = self.home if self.inplace else library
        for old in (*library.glob("_C*.*"), *self.folder.glob("_C*.*")):
            old.unlink(missing_ok=True)
        before = self.inplace, self.compiler
        # A list of its own: a distribution without extensions would be installed somewhere else.
        given, self.extensions = self.extensions, []
        for extension in given:
            if reason := self.reasons[extension.name]:
                self.say_why(extension, RuntimeError(reason))
            else:
                self.extensions.append(extension)
        # PyTorch asks about the CUDA compiler's host before it builds anything: that must not cost
        # the CPU's part, so what is left is tried again without the CUDA part, which comes last.
        while self.extensions:
            try:
                return super().run()
            except Exception as error:
                self.inplace, self.compiler = before
                self.say_why(self.extensions.pop(), error)

    def build_extension(self, extension: Extension) -> None:
        output: list[str] = []
        try:
            with recorded(output):
                super().build_extension(extension)
        except Exception as error:
            self.say_why(extension, RuntimeError("\n".join((str(error), *what_failed(output)))))

    def say_why(self, extension: Extension, error: Exception) -> None:
        if extension.name in self.must:
            sys.exit(f"{extension.name} cannot be built: {error}")
        self.folder.mkdir(parents=True, exist_ok=True)
        reason = str(error).strip() or type(error).__name__
        name = extension.name.rpartition(".")[2]
        (self.folder / f"{name}.txt").write_text(reason + "\n", encoding="utf-8")
        print(f"{extension.name} is not built: {reason}", file=sys.stderr)


@contextmanager
def recorded(lines: list[str]) -> Iterator[None]:
    """Adds what is written meanwhile, compilers' messages included, to `lines`; then prints it."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        kept = {stream: os.dup(stream) for stream in (1, 2)}
        for stream in kept:
            os.dup2(file.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            for stream, copy in kept.items():
                os.dup2(copy, stream)
                os.close(copy)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
            print(*lines, sep="\n", end="\n" if lines else "", flush=True)


def what_failed(output: list[str]) -> list[str]:
    """The lines of a compiler's output that say why it failed; the last ones, if none does."""
    telling = re.compile(r"(error|fatal)\s*:|cannot find|undefined reference", re.IGNORECASE)
    errors = [line for line in output if telling.search(line)]
    return [line[:300] for line in errors[:20] or output[-20:]]
