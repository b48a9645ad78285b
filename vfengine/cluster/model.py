"""The model of a run on any machine: read from its own path there, or sent through Ray.

A machine has the model if it has the same files at the same path: their names and sizes, and the
SHA-256 of the small ones, of which a checkpoint's `config.json` names those of its weights. To any
other machine the files go through the object store, once, and stay in its folder of temporary
files. They are read there as anywhere: without executing code.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formats.lora_files import LoraFile

if TYPE_CHECKING:
    from ..pipelines.pipeline import Pipeline

_SMALL = 2**20  # bytes of a file that is hashed rather than measured


@dataclass(frozen=True)
class Source:
    """A file or folder of the driver's machine.

    files: what tells its content, by the path inside of it; "" for a file itself
    """

    path: str
    files: Mapping[str, str]

    @classmethod
    def of(cls, path: str | Path) -> Source:
        """That of a path; raises OSError."""
        path = Path(path).absolute()
        return cls(str(path), dict(_told(path)))

    @property
    def sent_to(self) -> Path:
        """Where a machine keeps it that was sent it."""
        digest = hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()[:32]
        folder = Path(tempfile.gettempdir()) / f"vfengine-models-{os.getuid()}"
        return folder / digest / Path(self.path).name

    def here(self) -> Path | None:
        """Where this machine has it; None where it has not."""
        for path in (Path(self.path), self.sent_to):
            try:
                if dict(_told(path)) == dict(self.files):
                    return path
            except OSError:
                continue
        return None

    def read(self, name: str) -> bytes:
        return _file(Path(self.path), name).read_bytes()

    def keep(self, contents: Mapping[str, bytes]) -> None:
        """Writes what was sent, whole or not at all; raises OSError."""
        from ..files import replacing_folder

        target = self.sent_to
        top = target.parent.parent
        top.mkdir(mode=0o700, exist_ok=True)
        if top.stat().st_uid != os.getuid():
            raise PermissionError(f"{top}: belongs to another user")
        with replacing_folder(target.parent) as folder:
            for name, content in contents.items():
                file = _file(folder / target.name, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)


@dataclass(frozen=True)
class Model:
    """What every worker opens: the arguments of `load_pipeline`, all of them decided.

    sources: "model" and "base_unet", where they are named, and each LoRA
    dtype:   by its name in torch
    """

    sources: Mapping[str, Source]
    scales: Sequence[float]
    device: str
    dtype: str
    capture: bool

    @classmethod
    def of(
        cls,
        model: str | None,
        base_unet: str | None,
        lora: Sequence[LoraFile] | None,
        device: str,
        dtype: str,
        capture: bool,
    ) -> Model:
        """Of the settings of a command; raises OSError for files that cannot be read."""
        named = {"model": model, "base_unet": base_unet}
        named |= {f"lora {k}": file.path for k, file in enumerate(lora or ())}
        sources = {name: Source.of(path) for name, path in named.items() if path is not None}
        scales = [file.scale for file in lora or ()]
        return cls(sources, scales, device, dtype, capture)

    def missing(self) -> list[str]:
        """The sources that this machine has not."""
        return [name for name, source in self.sources.items() if source.here() is None]

    def sent(self) -> dict[str, dict[str, Any]]:
        """The files of all sources as references of the object store; raises OSError."""
        return {name: parts(source) for name, source in self.sources.items()}

    def fetched(self, sent: Mapping[str, Mapping[str, Any]]) -> Model:
        """This model, once this machine has all of it; sent: of `sent`."""
        import ray

        for name in self.missing():
            if name not in sent:
                path = self.sources[name].path
                raise FileNotFoundError(f"{path}: a worker's machine has it not")
            contents = ray.get(list(sent[name].values()))
            self.sources[name].keep(dict(zip(sent[name], contents, strict=True)))
        return self

    def open(self) -> Pipeline:
        """The pipeline, on this machine; raises what `load_pipeline` does."""
        import torch

        from ..pipelines.load import load_pipeline

        places = {name: source.here() for name, source in self.sources.items()}
        lora = [LoraFile(places[f"lora {k}"], scale) for k, scale in enumerate(self.scales)]
        return load_pipeline(
            places.get("model"),
            device=self.device,
            dtype=getattr(torch, self.dtype),
            capture=self.capture,
            base_unet=places.get("base_unet"),
            lora=lora or None,
        )


def _told(path: Path) -> list[tuple[str, str]]:
    """What tells the files of a path from others: names, and sizes or hashes; raises OSError."""
    if path.is_file():
        return [("", _tells(path))]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.relative_to(path).as_posix(), _tells(file)) for file in files]


def _tells(file: Path) -> str:
    size = file.stat().st_size
    return f"{size} bytes" if size > _SMALL else hashlib.sha256(file.read_bytes()).hexdigest()


def _file(path: Path, name: str) -> Path:
    return path / name if name else path


def parts(source: Source) -> dict[str, Any]:
    """The files of a source as references of the object store, by name; raises OSError."""
    import ray

    return {name: ray.put(source.read(name)) for name in source.files}
