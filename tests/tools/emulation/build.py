"""Builds vfengine_native with csrc/cuda compiled by g++, to run on the CPU under sanitizers.

    module = build("address", folder)
    subprocess.run([*command("address"), sys.executable, "script.py"],
                   env=environment("address", folder))

| variant    | csrc/cuda and csrc/cpu are compiled with |
|------------|------------------------------------------|
| "plain"    | -O2 |
| "coverage" | csrc/cuda alone with --coverage: `coverage(folder)` after the run |
| "address"  | AddressSanitizer and UndefinedBehaviorSanitizer |
| "thread"   | ThreadSanitizer: about 0.6 ms and 0.8 MB a CUDA thread, hence for small shapes |
"""

import json
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from vfengine import __version__

EMULATION = Path(__file__).resolve().parent
CSRC = EMULATION.parents[2] / "csrc"

VARIANTS = {
    "plain": ("-O2",),
    "coverage": ("-O0", "--coverage"),
    "address": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-g", "-fsanitize=thread"),
}
# The engine is not instrumented, it tells the sanitizer which CUDA thread runs.
ENGINE_DEFINES = {"address": ("-DEMULATION_ASAN",), "thread": ("-DEMULATION_TSAN",)}
RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}

COMMON = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
)
# Its headers come before csrc's, some of which they shadow.
# nvcc's device compiler does not reason from types either, and kernels move bytes as uint4.
CUDA = ("-x", "c++", "-fno-strict-aliasing", f"-I{EMULATION / 'include'}")


def build(
    variant: str, out_dir: Path, sources: Path | None = None, defines: Iterable[str] = ()
) -> Path:
    """Compile the module into `out_dir` and return its path.

    sources: replaces csrc by a folder of the same layout; defines: more macros, "NAME=value".
    Raises RuntimeError with the compiler's output.
    """
    flags = _variant(variant)
    out_dir, sources = Path(out_dir).resolve(), Path(sources or CSRC).resolve()
    macros = [f"-D{define}" for define in defines]
    cpu_flags = ("-O2",) if variant == "coverage" else flags
    module_macros = (
        "-DVF_CUDA=1",
        "-DVF_CUDA_EMULATED=1",
        '-DVF_CUDA_ARCHITECTURES="emulated"',
        f'-DVF_VERSION="{__version__}"',
    )
    python = (f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}")
    units = {EMULATION / "cuda_emulation.cpp": _engine_flags(variant, sources)}
    for path in sorted((sources / "bindings").glob("*.cpp")):
        units[path] = ("-O1", *module_macros, *python)
    for path in sorted((sources / "cpu").glob("**/*.cpp")):
        units[path] = (*cpu_flags, "-DVF_ISA=baseline", "-fno-math-errno")
    for path in sorted((sources / "cuda").glob("*.cu")):
        units[path] = (*flags, *CUDA)

    (out_dir / "objects").mkdir(parents=True, exist_ok=True)
    (out_dir / "isas.inc").write_text("VF_ISA_ROW(baseline, )\n")  # as CMakeLists.txt does
    commands, objects = [], []
    for path, own in units.items():
        objects.append(out_dir / "objects" / f"{path.parent.name}_{path.name}.o")
        options = (*COMMON, *own, f"-I{sources}", f"-I{out_dir}", *macros)
        commands.append(("g++", *options, "-c", str(path), "-o", str(objects[-1])))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))

    module = out_dir / f"vfengine_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run(("g++", "-shared", *flags, *map(str, objects), "-o", str(module)))
    write_import_hook(out_dir, module)
    return module


def build_program(
    variant: str, source: Path, program: Path, sources: Path = CSRC, defines: Iterable[str] = ()
) -> Path:
    """Compile one .cu file that has a main() into the executable `program`."""
    engine = program.with_suffix(".engine.o")
    path = EMULATION / "cuda_emulation.cpp"
    _run(("g++", *COMMON, *_engine_flags(variant, sources), "-c", str(path), "-o", str(engine)))
    macros = (f"-D{define}" for define in defines)
    options = (*COMMON, *_variant(variant), *CUDA, f"-I{sources}", *macros)
    _run(("g++", *options, str(source), "-x", "none", str(engine), "-o", str(program)))
    return program


def command(variant: str) -> list[str]:
    """The words before a program of this variant on a command line."""
    _variant(variant)
    # ThreadSanitizer of g++ 12 refuses the address layout of recent kernels.
    return ["setarch", "-R"] if variant == "thread" else []


def environment(variant: str, out_dir: Path | None, seed: int | None = None) -> dict[str, str]:
    """The environment in which python loads the module of `out_dir` as vfengine_native.

    out_dir None is for a program of `build_program`, which needs no preloaded runtime.
    seed: shuffles the order of CUDA threads and blocks.
    """
    _variant(variant)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("VF_EMULATED_SEED", None)
    if seed is not None:
        env["VF_EMULATED_SEED"] = str(seed)
    if variant == "address":
        # Python and torch leak by design.
        env["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
        env["UBSAN_OPTIONS"] = "print_stacktrace=1:halt_on_error=1"
    elif variant == "thread":
        # Python and torch are not instrumented, so that their locks go unseen: calls they make to
        # memcpy or malloc are no evidence of a race. history_size: less memory for each fiber.
        env["TSAN_OPTIONS"] = (
            "halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1:history_size=0"
        )
    if out_dir is not None:
        path = [str(Path(out_dir).resolve()), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(path)
        if variant in RUNTIMES:
            env["LD_PRELOAD"] = " ".join(_runtime(library) for library in RUNTIMES[variant])
    return env


def coverage(out_dir: Path) -> dict[Path, tuple[int, list[int]]]:
    """{file: (number of lines that ran, lines that did not)} for CUDA's part of csrc.

    Of all runs of the "coverage" build in `out_dir` so far. A line counts as run when any
    instantiation of its template ran it.
    """
    objects = Path(out_dir).resolve() / "objects"
    counts: dict[Path, dict[int, int]] = {}
    for notes in sorted(objects.glob("cuda_*.gcno")):
        result = _run(("gcov", "--json-format", "--stdout", notes.name), cwd=objects)
        report = json.loads(result)
        for file in report["files"]:
            path = Path(report["current_working_directory"], file["file"]).resolve()
            if not _is_cuda(path):
                continue
            lines = counts.setdefault(path, {})
            for line in file["lines"]:
                number = line["line_number"]
                lines[number] = lines.get(number, 0) + line["count"]
    if not counts:
        raise RuntimeError(f"no coverage build in {out_dir}")
    return {
        path: (sum(n > 0 for n in lines.values()), sorted(k for k, n in lines.items() if n == 0))
        for path, lines in counts.items()
    }


def write_import_hook(out_dir: Path, module: Path) -> None:
    """Make python load `module` as vfengine_native where `out_dir` is on PYTHONPATH.

    PYTHONPATH alone would win over an editable install, which finds its module through a hook, but
    not over a module in the folder that `python -m` or `python -c` starts in.
    """
    hook = _IMPORT_HOOK.format(module=str(module))
    (Path(out_dir) / "sitecustomize.py").write_text(hook)


_IMPORT_HOOK = """\
import sys
from importlib.util import spec_from_file_location


class EmulatedModule:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return spec_from_file_location(name, {module!r}) if name == "vfengine_native" else None


sys.meta_path.insert(0, EmulatedModule)
"""


def _variant(variant: str) -> tuple[str, ...]:
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return VARIANTS[variant]


def _engine_flags(variant: str, sources: Path) -> tuple[str, ...]:
    defines = ENGINE_DEFINES.get(variant, ())
    return ("-O2", "-g", f"-I{EMULATION / 'include'}", f"-I{sources}", *defines)


def _is_cuda(path: Path) -> bool:
    """csrc/cuda and headers that only CUDA includes: cuda_*.h and *.cuh."""
    if EMULATION in path.parents:
        return False
    in_common = path.parent.name == "common" and path.name.startswith("cuda_")
    return path.parent.name == "cuda" or in_common or path.suffix == ".cuh"


def _runtime(library: str) -> str:
    path = _run(("g++", f"-print-file-name={library}")).strip()
    if not Path(path).is_absolute():
        raise RuntimeError(f"g++ has no {library}: install its sanitizer runtimes")
    return path


def _run(arguments: tuple[str, ...], cwd: Path | None = None) -> str:
    if shutil.which(arguments[0]) is None:
        raise RuntimeError(f"{arguments[0]} was not found; vfengine needs g++ to be installed too")
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}\nfailed:\n{result.stderr}{result.stdout}")
    return result.stdout
