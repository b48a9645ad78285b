"""The public names and their signatures: a change of tests/public_names.txt is a deliberate one."""

import importlib
import inspect
import sys
import warnings
from pathlib import Path

import pytest

import vfengine
from vfengine._moved import warn_deprecated

SNAPSHOT = Path(__file__).with_name("public_names.txt")


def public_names() -> str:
    """A line for each public name: module, name and the parameters that a caller may pass."""
    lines = []
    for module in ("vfengine", "vfengine.models", "vfengine.ops", "vfengine.metrics"):
        package = importlib.import_module(module)
        for name in sorted(package.__all__):
            thing = getattr(package, name)
            if inspect.isclass(thing):
                lines.append(f"{module}.{name}")
                lines += [f"{module}.{name}.{line}" for line in _methods(thing)]
            elif callable(thing):
                lines.append(f"{module}.{name}{_parameters(thing)}")
            else:
                lines.append(f"{module}.{name}")
    return "\n".join(lines) + "\n"


def _methods(thing: type) -> list[str]:
    """Those that the class and its parents of ours define, beside what torch makes of a module."""
    found, own = [], {}
    for parent in reversed(thing.__mro__):
        if parent.__module__.partition(".")[0] == "vfengine":
            own |= vars(parent)
    for name, value in sorted(own.items()):
        if name in ("__init__", "__call__") or not name.startswith("_"):
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function):
                found.append(f"{name}{_parameters(function)}")
            elif isinstance(value, property):
                found.append(name)
    return found


def _parameters(function) -> str:
    """Without annotations, whose words may change where their meaning does not."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_public_names_are_those_that_were_promised():
    hint = "deliberate? python tests/test_public_names.py, and a line in CHANGELOG.md"
    assert public_names() == SNAPSHOT.read_text(), hint


def test_an_old_path_warns_at_the_line_that_imports_it(tmp_path, monkeypatch):
    (tmp_path / "uses_old_path.py").write_text("import vfengine.trajectory\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vfengine.trajectory", raising=False)
    with pytest.warns(DeprecationWarning, match=r"vfengine\.trajectory .* use vfengine\.diff") as w:
        importlib.import_module("uses_old_path")
    assert Path(w[0].filename).name == "uses_old_path.py"


def test_a_deprecated_name_says_what_takes_its_place():
    def old():
        warn_deprecated("old()", "new()", "9.0.0")

    with pytest.warns(DeprecationWarning) as warned:
        old()
    words = "old() is deprecated and leaves with vfengine 9.0.0: use new()"
    assert (str(warned[0].message), warned[0].filename) == (words, __file__)


def test_public_names_themselves_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert all(getattr(vfengine, name) is not None for name in vfengine.__all__)


if __name__ == "__main__":
    SNAPSHOT.write_text(public_names())
