"""Every public function and class of cac_fast has an example, and the examples are right."""

from __future__ import annotations

import doctest

import pytest
import torch

import cac_fast
from cac_fast import choice

PUBLIC = [name for name in cac_fast.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", {})
    names = {public: getattr(cac_fast, public) for public in PUBLIC} | {"torch": torch}
    own = doctest.DocTestFinder(recurse=False).find(names[name], name, globs=names)
    examples = [example for test in own for example in test.examples]
    assert examples, f"the docstring of cac_fast.{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner()
    for test in own:
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries == len(examples)
