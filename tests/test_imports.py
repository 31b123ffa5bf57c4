"""Modules import downwards: no circle, those for annotations counted in."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import cac_fast
import cac_fast.train

FOLDERS = {
    "cac_fast.train": Path(cac_fast.train.__file__).parent,
    "cac_fast": Path(cac_fast.__file__).parent,
}


def modules() -> dict[str, Path]:
    """Every module of the library and the trainer by its name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found.setdefault(name, path)
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a module names outside its functions."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & known.keys() or {node.module}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return names & known.keys()


def test_no_module_imports_what_imports_it():
    known = modules()
    assert {"cac_fast.loss", "cac_fast.train.engine", "cac_fast.train.data.stream"} <= known.keys()
    graph = {name: imported(path, known) for name, path in known.items()}
    assert "cac_fast.train.run_state" in graph["cac_fast.train.engine"]
    # What the packages hand out for annotations alone comes from below them.
    graph["cac_fast.train"] = set()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_lower_parts_know_no_higher_ones():
    known = modules()
    higher = {
        "cac_fast.train.data": ("methods", "networks", "optimizer", "run_state", "engine"),
        "cac_fast.train.networks": ("data", "methods", "optimizer", "run_state", "engine"),
        "cac_fast.train.methods": ("optimizer", "run_state", "engine", "log"),
    }
    for part, names in higher.items():
        above = {f"cac_fast.train.{name}" for name in names}
        for module in (name for name in known if f"{name}.".startswith(f"{part}.")):
            for target in imported(known[module], known):
                top = ".".join(target.split(".")[:3])
                assert top not in above, f"{module} imports {target}"
    for module, path in known.items():
        if not module.startswith("cac_fast.train"):
            assert not any("train" in name.split(".") for name in imported(path, known)), module
