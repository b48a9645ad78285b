"""Fuzzing of native code under ASan and UBSan. python tests/fuzz/sanitized.py ops --cases N

Builds the CPU module with them, in build/sanitized, and runs fuzz.py with it: arguments are
fuzz.py's. VFENGINE_ISAS is as of any build; avx2 and baseline are built without it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11

from vfengine import __version__

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
# A kernel at -O3 takes minutes to compile like this; what reads and writes is the same at -O1.
LAUNCHER = """#!/bin/sh
for word; do shift; [ "$word" = -O3 ] && word=-O1; set -- "$@" "$word"; done
exec "$@"
"""
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-sanitize=vptr"


def build() -> Path:
    """The folder of the module."""
    BUILD.mkdir(parents=True, exist_ok=True)
    launcher = BUILD / "launcher.sh"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DVFENGINE_CUDA=off"),
        f"-DCMAKE_CXX_FLAGS={FLAGS} -fno-omit-frame-pointer",
        f"-DCMAKE_CXX_COMPILER_LAUNCHER={launcher}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD / 'module'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DVFENGINE_VERSION={__version__}",
        f"-DVFENGINE_ISAS={os.environ.get('VFENGINE_ISAS', 'avx2')}",
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", str(BUILD)], check=True)
    return BUILD / "module"


def main(argv: list[str]) -> int:
    module = build()
    libraries = [
        subprocess.run(
            ["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the latter: whose exceptions ASan watches
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{module}:{ROOT}",
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:handle_abort=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("fuzz.py")
    return subprocess.run([sys.executable, str(script), *argv], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
