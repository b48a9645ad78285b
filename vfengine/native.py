"""The compiled kernels, checked to be of this version: `vfengine_native`."""

import torch  # noqa: F401  first, so that the extension shares torch's OpenMP threads

from vfengine import __version__

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
