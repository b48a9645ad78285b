"""Facts of sources and machine: one JSON object on stdout. A missing fact does not cost the others.

Exit status 2: there is no NVIDIA GPU that torch can use (not checked in a dry run).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gpu_run.sections import DRY

ROOT = Path(__file__).resolve().parents[3]


def output(*command: str) -> str:
    """The output of a command; RuntimeError or OSError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def or_none(fact: Callable[[], object]) -> object:
    try:
        return fact()
    except Exception as error:
        print(f"facts: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def nvml() -> dict[str, object]:
    """Clocks in MHz, watts, degrees Celsius, driver: each read alone, as a VM may refuse some."""
    import pynvml  # of nvidia-ml-py

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    queries = {
        "driver": pynvml.nvmlSystemGetDriverVersion,
        "clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "max_clock_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "power_limit_w": lambda: pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(
            handle, pynvml.NVML_TEMPERATURE_GPU
        ),
    }
    return {name: or_none(fact) for name, fact in queries.items()}


def nvcc() -> str:
    found = os.environ.get("CUDACXX") or "nvcc"
    return output(found, "--version").splitlines()[-1]


def commit() -> dict[str, object]:
    """The commit from git, or from VFENGINE_COMMIT if the sources have no git."""
    if given := os.environ.get("VFENGINE_COMMIT"):
        return {"commit": given, "dirty": None}
    return {
        "commit": or_none(lambda: output("git", "rev-parse", "--short", "HEAD")),
        "dirty": or_none(lambda: bool(output("git", "status", "--porcelain", "-uno"))),
    }


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


def main() -> int:
    import torch

    if not DRY and not torch.cuda.is_available():
        return 2
    facts = {
        "gpu": "none (dry run)" if DRY else torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": or_none(lambda: __import__("triton").__version__),
        "nvcc": or_none(nvcc),
        "python": platform.python_version(),
        "cpu": or_none(cpu),
        "cores": os.cpu_count(),
        **commit(),
        **(or_none(nvml) or {}),
    }
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
        }
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
