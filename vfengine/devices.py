"""Where networks run, in which dtype and precision.

"auto" stands for what suits this machine.
"""

from __future__ import annotations

import os
import resource
import sys

import torch

from .names import AUTO

_LEAST_GAIN = 1.4  # of products in bfloat16, for a gain in whole networks
NETWORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable_device(device: torch.device | str) -> torch.device:
    """The device, once it is known to be there; ValueError when it is not."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {device!r}, expected cpu, cuda or cuda:<index>"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported, expected cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"{count} CUDA devices" if count else "no CUDA device"
            raise ValueError(f"device {str(device)!r} asked for, but torch finds {found} here")
    return device


def chosen_device(device: torch.device | str) -> torch.device:
    """`usable_device`, where "auto" is CUDA if torch can use it, and else the CPU."""
    if device == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(device)


def chosen_devices(
    device: torch.device | str,
    base_device: torch.device | str | None = None,
    residual_device: torch.device | str | None = None,
) -> tuple[torch.device, torch.device]:
    """The devices of the base and the residual phase; None is `device`.

    Two names of one device become one. Raises ValueError as `usable_device` does, naming the phase.
    """
    found = {"base_device": chosen_device(device)}
    found["residual_device"] = found["base_device"]
    for name, own in (("base_device", base_device), ("residual_device", residual_device)):
        if own is not None:
            try:
                found[name] = chosen_device(own)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    base, residual = found.values()
    return (residual if _is_same(base, residual) else base), residual


def _is_same(one: torch.device, other: torch.device) -> bool:
    """Whether two devices are one: "cuda" is CUDA's current one."""
    indices = {one.index, other.index}
    if one == other or one.type != other.type or None not in indices:
        return one == other
    return one.type == "cpu" or torch.cuda.current_device() in indices


def chosen_dtype(dtype: torch.dtype | str, *devices: torch.device) -> torch.dtype:
    """The dtype of networks, where "auto" is bfloat16 if it is faster on all devices, else float32.

    Raises ValueError for a dtype that is neither "auto" nor one of NETWORK_DTYPES.
    """
    if dtype == AUTO:
        return torch.bfloat16 if all(map(bfloat16_is_faster, devices)) else torch.float32
    if dtype not in NETWORK_DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {NETWORK_DTYPES}, got {dtype!r}")
    return dtype


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether the networks of this device are faster in bfloat16 than in float32.

    CUDA: tensor cores multiply bfloat16 from compute capability 8.0 on.
    CPU:  plans (vfengine/plan/network.py) need AVX512_BF16 or AMX, and a core that multiplies
          faster with it than in float32. That is measured, for cores differ: on AMD's EPYC (Zen 5)
          AVX512_BF16 doubles the products, and a warm default clip takes 1.0 s instead of 1.6
          (`python benchmarks/bench_unet.py --case clip-bf16 clip-fp32`). On a Xeon with AMX,
          before its tiles were used, bfloat16 was the slower one.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    from .native import vfengine_native

    return vfengine_native.cpu_has_bf16() and vfengine_native.bf16_gain() >= _LEAST_GAIN


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far: of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matmul_in_tf32() -> bool:
    """Whether torch multiplies fp32 matrices on CUDA in TF32, by the settings of the process.

    Torch 2.9 has a second interface to this setting. Once that is used, reading the first raises.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def dependent_launches() -> bool:
    """Whether kernels may be launched as programmatic dependent ones: VFENGINE_PDL, on by default.

    Raises ValueError for a value that is neither "on" nor "off".
    """
    value = os.environ.get("VFENGINE_PDL") or "on"
    if value not in ("on", "off"):
        raise ValueError(f"VFENGINE_PDL must be on or off, got {value!r}")
    return value == "on"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the machine's lack of memory, or a device's."""
    signs = ("out of memory", "not enough memory", "bad_alloc", "alloc_failed")
    signs += ("can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)
