"""Peak memory of a piece of work, in a process of its own, above what the process holds idle.

The work is a function that imports, warms up and makes its inputs, and returns what is to be
measured. Between the two the process gives freed memory back and is idle; from there on:

CPU     the kernel's high-water mark of the resident set (VmHWM), reset while idle through
        /proc/self/clear_refs, less the idle resident set. glibc would keep freed blocks up to a
        threshold of up to 32 MiB that it moves by itself; `MALLOC` fixes it, for every process
        alike, so that what is freed is given back at once and the mark is of memory in use
CUDA    the peak of torch's caching allocator less the same while idle, as it reserved memory from
        the driver: what is allocated leaves out the pools of captured graphs, whose blocks count as
        free. Beside it what was allocated, and what the driver counts for this process (NVML) after
        the work, less the same while idle

What the networks' libraries allocate for themselves is in all of these but the allocator's.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lib import child_environment

MIB = 2**20
MALLOC = {  # bytes, and the number of heaps; of glibc (man mallopt)
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True)
class Peak:
    """MiB. The last three on CUDA; driver is None where NVML does not tell processes apart.

    idle      resident set before the work
    resident  peak of the resident set above idle
    """

    idle: float
    resident: float
    allocated: float | None = None
    reserved: float | None = None
    driver: float | None = None

    @property
    def main(self) -> float:
        """The reported peak: of reserved memory on CUDA, of the resident set on a CPU."""
        return self.resident if self.reserved is None else self.reserved


def measure(target: str, arguments: dict[str, object], device: str = "cpu") -> Peak:
    """Runs target(**arguments)() in a new process; target: "module:function", as benches import.

    Raises RuntimeError with the process's output if it fails.
    """
    command = [sys.executable, __file__, target, json.dumps(arguments), device]
    done = subprocess.run(command, env=child_environment() | MALLOC, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"peak_memory: {target} {arguments} failed:\n{done.stderr}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def touch(mebibytes: int) -> Callable[[], None]:
    """A known allocation, for the test: so many MiB, written to and freed."""
    return lambda: bytearray(mebibytes * MIB).clear()


def status(name: str) -> float:
    """VmRSS or VmHWM of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"peak_memory: /proc/self/status has no {name}; this needs Linux")


def _probe(work: Callable[[], object], device: str) -> Peak:
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        driver = _driver_bytes()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM <- VmRSS (man proc_pid_clear_refs)
    idle = status("VmRSS")
    work()
    resident = status("VmHWM") - idle
    if device != "cuda":
        return Peak(idle, resident)
    torch.cuda.synchronize()
    return Peak(
        idle,
        resident,
        (torch.cuda.max_memory_allocated() - allocated) / MIB,
        (torch.cuda.max_memory_reserved() - reserved) / MIB,
        None if driver is None else (_driver_bytes() - driver) / MIB,
    )


def _driver_bytes() -> int | None:
    """NVML's count for this process; None where it does not know it, as in some containers."""
    import pynvml
    import torch

    uuid = torch.cuda.get_device_properties(0).uuid
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError as error:
        print(f"peak_memory: NVML does not answer: {error}", file=sys.stderr)
        return None
    for process in running:
        if process.pid == os.getpid():
            return process.usedGpuMemory
    return None


if __name__ == "__main__":
    module, function = sys.argv[1].split(":")
    prepare = getattr(importlib.import_module(module), function)
    print(json.dumps(asdict(_probe(prepare(**json.loads(sys.argv[2])), sys.argv[3]))))
