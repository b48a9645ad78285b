"""Imports within vfengine run down its floors, and in no circle; the lowest load without torch."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vfengine
from vfengine._moved import MOVED, SPLIT

# from the bottom: a folder or file may import those of lower floors and of its own
FLOORS = (
    ("names", "arguments", "files", "devices", "forks", "native", "kernels", "_moved"),
    ("ops",),
    ("diffusion", "media", "metrics"),
    ("sampling", "models", "plan"),
    ("formats",),
    ("pipelines", "training"),
    ("serving",),
    ("cluster",),
    ("cli",),
    ("generate", "serve", "train", "bench", "eval", "__main__"),  # the doors
)
STRANGERS = {("models", "plan"), ("plan", "models"), ("sampling", "models")}  # on one floor
WITHOUT_TORCH = (
    *("names", "arguments", "files", "pipelines.request", "training.options", "cli.settings"),
    *("training.team", "cli.train_team"),
    *("serving.model_info", "serving.store", "serving.workers", "serving.frames", "serving.watch"),
    *("serving.app", "cli.serve"),
)

ROOT = Path(vfengine.__file__).parent
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}


def name_of(file: Path) -> str:
    """pipelines.session, or training for its __init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Without kernels/, which a wheel holds as _kernels: its files are loaded by ops alone.
FILES = {name_of(file): file for file in ROOT.rglob("*.py") if "_kernels" not in file.parts}
del FILES[""]  # the package itself, which loads its names when they are used


def imports_of(name: str) -> set[str]:
    """The modules of vfengine that a module names in import statements that can run."""
    package = ["vfengine", *name.split(".")]
    if FILES[name].name != "__init__.py":
        package.pop()
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    typing = [node for node in branches if ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {inner for node in typing for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    known = {f"vfengine.{module}": module for module in FILES}
    modules = {known.get(path) or known.get(path.rpartition(".")[0]) for path in found}
    return modules - {None, name}


IMPORTS = {name: imports_of(name) for name in FILES}


def room(name: str) -> str:
    return name.partition(".")[0]


def circle(graph: dict[str, set[str]]) -> str:
    """A circle of a graph, as "a <- b <- a"; "" if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def run(code: str) -> str:
    """The output of this code in a new interpreter: "" if it runs without torch."""
    code += "\nimport sys\nif 'torch' in sys.modules: sys.exit('torch was loaded')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr


def test_every_module_has_a_floor():
    assert {room(name) for name in FILES} == HEIGHT.keys()


def test_imports_run_down():
    wrong = [
        f"{name} imports {other}"
        for name, others in sorted(IMPORTS.items())
        for other in sorted(others)
        if HEIGHT[room(name)] < HEIGHT[room(other)] or (room(name), room(other)) in STRANGERS
    ]
    assert not wrong, "\n".join(["against the floors:", *wrong])


def test_no_circle_of_modules():
    assert not circle(IMPORTS)


def test_no_circle_of_rooms():
    """On one floor, that is: a test above finds imports that run up."""
    rooms = {name: set() for name in HEIGHT}
    for name, others in IMPORTS.items():
        beside = {other for other in map(room, others) if HEIGHT[other] == HEIGHT[room(name)]}
        rooms[room(name)] |= beside - {room(name)}
    assert not circle(rooms)


def test_imports_are_found():
    """A spot check of the reader: relative, absolute, inside functions, of packages."""
    assert {"models", "models.unet", "formats.folders"} <= IMPORTS["formats.checkpoint"]
    assert "native" in IMPORTS["devices"]
    assert "ops._dispatch" in IMPORTS["plan.builder"]
    assert "training.options" in IMPORTS["training"]


def test_circle_is_named():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == ""
    assert circle({"a": {"b"}, "b": {"a"}}) in ("a <- b <- a", "b <- a <- b")


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_module_loads_without_torch(name):
    assert run(f"import vfengine.{name}") == ""


@pytest.mark.parametrize("door", ["generate", "serve", "train", "bench", "eval"])
def test_help_needs_no_torch(door):
    said = run(
        f"import runpy, sys\n"
        f"sys.argv = ['{door}', '--help']\n"
        f"try: runpy.run_module('vfengine.{door}', run_name='__main__')\n"
        f"except SystemExit as end: assert not end.code"
    )
    assert said == ""


@pytest.mark.parametrize("old", MOVED)
def test_old_path_is_the_module_that_moved(old):
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])


@pytest.mark.parametrize("old", SPLIT)
def test_old_path_has_the_names_of_the_modules_that_it_became(old):
    module = importlib.import_module(old)
    for part in map(importlib.import_module, SPLIT[old]):
        for name, value in vars(part).items():
            assert name.startswith("__") or getattr(module, name) is value, name
