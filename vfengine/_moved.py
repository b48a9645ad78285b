"""Import paths of earlier releases: `vfengine.schedule` is `vfengine.diffusion.schedule`.

They warn, as every deprecated name does (docs/releases.md).
"""

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "vfengine.base_cache": "vfengine.pipelines.base_cache",
    "vfengine.capture": "vfengine.sampling.cuda_graph",
    "vfengine.checkpoint": "vfengine.formats.checkpoint",
    "vfengine.models.attention": "vfengine.ops.attention",
    "vfengine.models.generators": "vfengine.models.denoisers",
    "vfengine.models.peers": "vfengine.formats.load",
    "vfengine.models.planned": "vfengine.plan.network",
    "vfengine.noise": "vfengine.diffusion.noise",
    "vfengine.overlap": "vfengine.sampling.overlap",
    "vfengine.pictures": "vfengine.media.pictures",
    "vfengine.pipeline": "vfengine.pipelines.videofusion",
    "vfengine.pretrained": "vfengine.pipelines.base_unet",
    "vfengine.schedule": "vfengine.diffusion.schedule",
    "vfengine.solvers": "vfengine.diffusion.solvers",
    "vfengine.trajectory": "vfengine.diffusion.base_path",
    "vfengine.video_io": "vfengine.media.video",
    "vfengine.windows": "vfengine.sampling.windows",
}
_LEAVES = "1.0.0"
SPLIT = {"vfengine.decompose": ("vfengine.diffusion.decompose", "vfengine.diffusion.noise")}


def warn_deprecated(old: str, new: str, leaves: str, stacklevel: int = 2) -> None:
    """A DeprecationWarning at the line that uses an old name.

    old, new:   the name and what takes its place
    leaves:     the release that no longer has the old one, at least one minor release away
    stacklevel: 1 is the caller of this function, 2 its caller, and so on
    """
    words = f"{old} is deprecated and leaves with vfengine {leaves}: use {new}"
    warnings.warn(words, DeprecationWarning, stacklevel + 1)


class _OldPaths:
    """Imports an old path as the module that took its place: one module under two names.

    A module that was split is a new one with the names of its parts.
    A finder and a loader, without the base classes: importing importlib.abc takes 4 ms.
    """

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED or name in SPLIT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = [MOVED[spec.name]] if spec.name in MOVED else SPLIT[spec.name]
        warn_deprecated(spec.name, " and ".join(new), _LEAVES)  # frames of importlib do not count
        if spec.name in SPLIT:
            module = ModuleType(spec.name)
            for part in map(importlib.import_module, SPLIT[spec.name]):
                names = {name: value for name, value in vars(part).items() if name[:2] != "__"}
                vars(module).update(names)
            module.__spec__ = spec
            return module
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__  # importing it under the old name replaces this
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state or module.__spec__


def install() -> None:
    """From now on the old paths can be imported."""
    sys.meta_path.append(_OldPaths())
