"""`vfengine.kernels.<op>`: the Triton kernels, one module per op; each imports triton.

They live in the repository's kernels/ and are shipped as vfengine/_kernels. Setting `__path__`
makes this module a package over whichever of the two is there.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

_INSTALLED, _CHECKOUT = _HERE / "_kernels", _HERE.parent / "kernels"

__path__ = [str(_INSTALLED if _INSTALLED.is_dir() else _CHECKOUT)]
