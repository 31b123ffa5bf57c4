"""Who imports whom: no circle, and from each layer only what lies in it or below it.

Imports inside functions and under TYPE_CHECKING count too; modules that a table names as text do
not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "cac_fast": ROOT / "cac_fast",
    "cac_fast.kernels": ROOT / "kernels",
    "cac_fast.train": ROOT / "train",
    "bench": ROOT / "bench",
}
# From the bottom up. A module lies in the layer that has the longest beginning of its name.
LAYERS = [
    ["cac_fast._extension", "cac_fast.operands", "cac_fast.overlap", "cac_fast.tiles"],
    ["cac_fast.checks"],
    ["cac_fast.kernels"],
    ["cac_fast.backend"],
    ["cac_fast"],
    ["cac_fast.train.errors"],
    ["cac_fast.train.registry"],
    ["cac_fast.train.options"],
    ["cac_fast.train.settings"],
    ["cac_fast.train.config"],
    ["cac_fast.train"],
    ["bench"],
]
Graph = dict[str, set[str]]


def find_modules() -> dict[str, Path]:
    """Every module by its full name."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = find_modules()
# Scripts of bench/ put its folders on the path.
BARE = {
    name.removeprefix(f"{folder}."): name
    for name in MODULES
    if name.startswith("bench.")
    for folder in ("bench", name.rpartition(".")[0])
}


def imported(name: str, text: str) -> Iterator[str]:
    """The modules of the project that a module's text imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    for each in names:
        # What is imported from a module may be a module of its own.
        for candidate in (each, each.rpartition(".")[0]):
            known = BARE.get(candidate, candidate) if name.startswith("bench.") else candidate
            if known in MODULES:
                yield known
                break


def find_imports() -> Graph:
    return {name: set(imported(name, path.read_text())) for name, path in MODULES.items()}


def package_of(name: str) -> str:
    packages = ("cac_fast.train", "cac_fast", "bench")
    return next(each for each in packages if f"{name}.".startswith(f"{each}."))


def find_circle(graph: Graph) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return None


def layer(name: str) -> int:
    fitting = [
        (len(beginning), number)
        for number, beginnings in enumerate(LAYERS)
        for beginning in beginnings
        if f"{name}.".startswith(f"{beginning}.")
    ]
    return max(fitting)[1]


@pytest.mark.parametrize("package", ["cac_fast", "cac_fast.train", "bench"])
def test_no_circle(package: str) -> None:
    """cac_fast: with the kernels, without the trainer."""
    graph = {
        name: imports for name, imports in find_imports().items() if package_of(name) == package
    }
    assert len(graph) > 10
    circle = find_circle(graph)
    assert circle is None, f"imported in a circle: {' -> '.join(circle)}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    above = [
        other for other in imported(name, MODULES[name].read_text()) if layer(other) > layer(name)
    ]
    assert above == []


HIGHER = {
    "data": ("methods", "networks", "optimizer", "run_state", "engine"),
    "networks": ("data", "methods", "optimizer", "run_state", "engine"),
    "methods": ("optimizer", "run_state", "engine", "log"),
}


@pytest.mark.parametrize("part", HIGHER)
def test_parts_of_the_trainer_know_no_higher_ones(part: str) -> None:
    above = {f"cac_fast.train.{name}" for name in HIGHER[part]}
    for name, imports in find_imports().items():
        if f"{name}.".startswith(f"cac_fast.train.{part}."):
            tops = {".".join(each.split(".")[:3]) for each in imports}
            assert not tops & above, name


def test_what_is_not_seen_by_a_first_look() -> None:
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from cac_fast.train.engine import train
def late():
    from cac_fast import tiles, verify
    import cac_fast.kernels.plan
"""
    assert set(imported("cac_fast.any", text)) == {
        "cac_fast.train.engine",
        "cac_fast.tiles",
        "cac_fast",
        "cac_fast.kernels.plan",
    }
    assert layer("cac_fast.train.engine") > layer("cac_fast.loss") > layer("cac_fast.kernels.plan")
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None
    assert find_circle({"a": {"b", "c"}, "b": {"c"}}) is None
