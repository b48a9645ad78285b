"""The compiled kernels, checked to be of this version: `vfengine_native`.

On a CPU they take the best instruction set that it has, or that of VFENGINE_CPU_ISA: one of
`vfengine_native.cpu_isas`, else a ValueError says what it lacks.
"""

import os
import warnings

import torch  # noqa: F401  first, so that the extension shares torch's OpenMP threads

from vfengine import __version__
from vfengine.forks import survive_forks

try:
    import vfengine_native
except ImportError as error:
    raise ImportError(
        f"vfengine {__version__} cannot load its compiled kernels (vfengine_native: {error}); "
        "in the repository, run `pip install .` again"
    ) from error

if vfengine_native.__version__ != __version__:
    raise ImportError(
        f"vfengine {__version__} found vfengine_native {vfengine_native.__version__} "
        f"({vfengine_native.__file__}); in the repository, run `pip install .` again"
    )

if vfengine_native.refused_isa:
    warnings.warn(
        f"{vfengine_native.refused_isa}; {vfengine_native.cpu_isa()} is in use, which is slower",
        stacklevel=2,
    )
if _isa := os.environ.get("VFENGINE_CPU_ISA"):
    try:
        vfengine_native.set_cpu_isa(_isa)
    except ValueError as error:
        raise ValueError(f"VFENGINE_CPU_ISA: {error}") from error

survive_forks(vfengine_native.__file__)
