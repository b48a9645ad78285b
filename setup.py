"""Builds vfengine_native, the compiled half of vfengine, with CMake; the rest is in pyproject.toml.

VFENGINE_CUDA=auto|on|off: CUDA kernels when nvcc is found (auto, the default), always, or never.
VFENGINE_ISAS=all|avx2,avx512: instruction sets of the CPU kernels, beside baseline.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake once and leaves the module where setuptools expects it (wheel or checkout)."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("VFENGINE_CUDA", "auto")
        if cuda not in ("auto", "on", "off"):
            raise ValueError(f"VFENGINE_CUDA must be auto, on or off, got {cuda!r}")
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp, which is new for every editable install: objects are kept between builds.
        build = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
        # cmake and ninja may be wheels of an environment that is not activated.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        env = {**os.environ, "PATH": path}
        configure = [
            "cmake",
            "--fresh",  # a cache from another pip build environment names tools that are gone
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVFENGINE_VERSION={self.distribution.get_version()}",
            f"-DVFENGINE_CUDA={cuda}",
            f"-DVFENGINE_ISAS={os.environ.get('VFENGINE_ISAS', 'all')}",
        ]
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        try:
            subprocess.run(configure, check=True, env=env)
            subprocess.run(["cmake", "--build", str(build), *jobs], check=True, env=env)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"vfengine: {' '.join(error.cmd[:2])} failed, see the lines above. "
                "VFENGINE_CUDA=off builds the CPU kernels alone."
            ) from error


# What an earlier build left there would travel into the wheel.
for stale in (ROOT / "build").glob("lib*"):
    shutil.rmtree(stale)

setup(ext_modules=[Extension("vfengine_native", sources=[])], cmdclass={"build_ext": CMakeBuild})
