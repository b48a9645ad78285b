"""How every Triton kernel begins, and how it is launched                  csrc/common/cuda_launch.h

From sm_90 on launches are programmatic dependent ones: a kernel's programs are set up while those
of the kernel before it still run.
"""

import functools

import torch
import triton
import triton.language as tl

from vfengine.devices import dependent_launches

# The interpreter, which is chosen as kernels are defined, runs one kernel after the other.
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def wait_for_inputs():
    """Waits until the kernels before this one have ended; the first line of every kernel.

    Without it a kernel could end before those that it depends on, and the next one would take them
    for ended too. From here on the next one may be set up.
    """
    if _COMPILED:
        if tl.target_info.cuda_capability_geq(9, 0):
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()


def launch_kernel(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: tuple,
    constants: dict[str, object],
) -> None:
    """Launch a kernel that begins with `wait_for_inputs`, where the first argument is.

    CPU tensors run in Triton's interpreter.
    """
    device = arguments[0].device
    dependent = {"launch_pdl": True} if _can_depend(device) and dependent_launches() else {}
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **dependent)


@functools.cache
def _can_depend(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
