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

import pytest

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


def test_sdist_carries_the_build():
    manifest = (ROOT / "MANIFEST.in").read_text()
    named = set(re.findall(r"\S+", manifest))
    assert {"csrc", "kernels", "CMakeLists.txt", "constraints.txt", "vfengine/assets"} <= named
    for name in re.findall(r"^(?:include|graft) (.+)$", manifest, re.MULTILINE):
        for path in name.split():
            assert (ROOT / path).exists(), path


def test_constraints_cover_the_requirements():
    project = (ROOT / "pyproject.toml").read_text()
    pinned = {
        re.split("==", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    block = project[project.index("\ndependencies = [") : project.index("\nbench = ")]
    required = {name.lower() for name in re.findall(r'"([A-Za-z][\w.-]*)[^"]*"', block)}
    assert required
    assert required <= pinned
