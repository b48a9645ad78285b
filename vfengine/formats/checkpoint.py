"""A model on disk: a folder of config.json and one .safetensors file per network.

There are two kinds. A decomposed model has base.safetensors and residual.safetensors. Plain video
diffusion, the baseline (VDM* in the paper, "vdm" in files), has video.safetensors. The
configuration holds everything that sampling needs to know (shapes, labels, schedule, λ). Weights
are read without executing code, and checked against the SHA-256 in the configuration.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.schedule import NoiseSchedule
from ..files import parse_tensors, replacing_folder, write_tensors
from ..models import BaseGenerator, ResidualGenerator, UNet, UNetConfig, VideoGenerator
from ..models.unet import empty_unet
from ..names import BASE_PATHS

DEFAULT = Path(__file__).parent.parent / "assets" / "default"

Generator = BaseGenerator | ResidualGenerator | VideoGenerator

# The order of the entries in config.json, of both kinds.
_ENTRIES = (
    *("num_frames", "height", "width", "channels", "lam", "labels", "fps", "schedule"),
    *("base", "residual", "base_std", "residual_std", "base_path", "clean_share"),
    *("video", "video_std", "sha256"),
)


# -- configurations --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(ABC):
    """A model apart from its weights; `DecomposedConfig` or `PlainConfig`.

    num_frames, height, width, channels   of the clips it was trained on; pixels in -1..1
    labels      class names in the order of the class indices; the null class follows them
    fps         frames a second at which a clip plays at its natural speed
    schedule    NoiseSchedule.to_dict()
    sha256      of the weight files, filled in by save_checkpoint

    Of its kind:
    objective   what it was trained for, as --objective takes it: "decomposed" or "vdm"
    networks    the names of its networks, and of their files
    """

    objective: ClassVar[str]
    networks: ClassVar[tuple[str, ...]]
    _format: ClassVar[str]  # its name in config.json
    _kind: ClassVar[str]  # its name in error texts
    _num_images: ClassVar[tuple[int, ...]]  # in each network's input, concatenated

    num_frames: int
    height: int
    width: int
    channels: int
    labels: tuple[str, ...]
    fps: float
    schedule: dict
    sha256: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("num_frames", "height", "width", "channels"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 2**16:
                raise ValueError(f"{name} must be an int from 1 to {2**16}, got {value!r}")
        _check_number("fps", self.fps, _positive)
        if not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels must be strings, got {self.labels!r}")
        if not isinstance(self.schedule, dict):
            raise ValueError(f"schedule must be an object, got {self.schedule!r}")
        if not isinstance(self.sha256, dict) or not all(
            isinstance(digest, str) for digest in self.sha256.values()
        ):
            raise ValueError(f"sha256 must be an object of strings, got {self.sha256!r}")
        for name, num_images in zip(self.networks, self._num_images, strict=True):
            unet = self.unet_config(name)
            if not isinstance(unet, UNetConfig):
                raise TypeError(f"{name} must be a UNetConfig, got {unet!r}")
            if unet.in_channels != num_images * self.channels:
                raise ValueError(
                    f"{name} takes {unet.in_channels} channels, not those of the clips"
                )
            if (unet.num_classes or 0) != len(self.labels):
                raise ValueError(f"{name} has {unet.num_classes} classes, not {len(self.labels)}")

    @property
    def animates_pictures(self) -> bool:
        """Whether it can animate a given base frame (base_path="clean")."""
        return False

    @property
    def null_class(self) -> int:
        """The class index that means "no label" in classifier-free guidance."""
        return len(self.labels)

    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_dict(self.schedule)

    def fingerprint(self) -> str:
        """16 hex digits that name its first network; base paths of another one are refused."""
        return self.sha256.get(self.networks[0], "")[:16]

    def unet_config(self, name: str) -> UNetConfig:
        """The configuration of one of its networks; ValueError for a name that is none of them."""
        if name not in self.networks:
            own = " and ".join(self.networks)
            raise ValueError(f"{self._kind} has no {name} network, but {own}")
        return getattr(self, name)

    @abstractmethod
    def generator(self, name: str, unet: UNet) -> Generator:
        """The network of this name around its UNet: what turns the UNet's output into ε."""

    def to_json(self) -> str:
        """Its entries as JSON, but an entry that the format gained later only where it is set."""
        names = sorted((f.name for f in fields(self)), key=_ENTRIES.index)
        values = {name: getattr(self, name) for name in names}
        if values.get("clean_share", 0) is None:
            del values["clean_share"]
        for name in self.networks:
            values[name] = values[name].to_dict()
        return json.dumps({"format": self._format, **values}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> CheckpointConfig:
        """The configuration in a JSON text; ValueError if the text is none."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error})") from error
        form = values.pop("format", None) if isinstance(values, dict) else None
        kind = next((kind for kind in KINDS.values() if kind._format == form), None)
        if kind is None:
            formats = ", ".join(kind._format for kind in KINDS.values())
            raise ValueError(f'"format" is not one of {formats}')
        unknown = set(values) - {f.name for f in fields(kind)}
        if unknown:
            raise ValueError(f"unknown entries: {', '.join(sorted(unknown))}")
        try:
            if not isinstance(values["labels"], list):
                raise ValueError(f"labels must be a list, got {values['labels']!r}")
            values["labels"] = tuple(values["labels"])
            for name in kind.networks:
                values[name] = UNetConfig(**values[name])
            config = kind(**values)
            config.noise_schedule()  # refused here, where the file's name is known
            return config
        except (TypeError, KeyError) as error:
            raise ValueError(f"incomplete or of another version ({error})") from error


@dataclass(frozen=True, kw_only=True)
class DecomposedConfig(CheckpointConfig):
    """A base network for what all frames share, and a residual network for the rest.

    lam         λ of the non-base frames in training, and so of sampling
    base, residual   UNetConfig of the two networks
    base_std, residual_std   standard deviation of what each network predicts (see
                models/denoisers.py)
    base_path   "stepwise" or "clean": how the base path is followed by default
    clean_share share of the training clips on which the residual network saw the exact base noise;
                None: not recorded
    """

    objective = "decomposed"
    networks = ("base", "residual")
    _format = "vfengine-decomposed-1"
    _kind = "a decomposed model"
    _num_images = (1, 2)

    lam: float
    base: UNetConfig
    residual: UNetConfig
    base_std: float = 0.5
    residual_std: float = 0.35
    base_path: str = "stepwise"
    clean_share: float | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_number("lam", self.lam, lambda lam: 0 <= lam < 1)
        _check_number("base_std", self.base_std, _positive)
        _check_number("residual_std", self.residual_std, _positive)
        if self.clean_share is not None:
            _check_number("clean_share", self.clean_share, lambda share: 0 <= share <= 1)
        if self.base_path not in BASE_PATHS:
            raise ValueError(f"base_path must be one of {BASE_PATHS}, got {self.base_path!r}")
        if self.base_path == "clean" and self.clean_share == 0:
            raise ValueError('base_path="clean" needs a clean_share above 0 in training')

    @property
    def animates_pictures(self) -> bool:
        """Whether its residual network has seen exact base noise, as base_path="clean" shows it.

        Where the share is not recorded, base_path decides.
        """
        return self.base_path == "clean" if self.clean_share is None else self.clean_share > 0

    def generator(self, name: str, unet: UNet) -> Generator:
        schedule = self.noise_schedule()
        if name == "base":
            return BaseGenerator(unet, schedule, self.base_std)
        return ResidualGenerator(unet, schedule, self.lam, self.residual_std)


@dataclass(frozen=True, kw_only=True)
class PlainConfig(CheckpointConfig):
    """Plain video diffusion: one network of whole clips, each frame with noise of its own.

    video       UNetConfig of the network
    video_std   standard deviation of what it predicts (see models/denoisers.py)
    """

    objective = "vdm"
    networks = ("video",)
    _format = "vfengine-vdm-1"
    _kind = "a VDM*"
    _num_images = (1,)

    video: UNetConfig
    video_std: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        _check_number("video_std", self.video_std, _positive)

    def generator(self, name: str, unet: UNet) -> Generator:
        return VideoGenerator(unet, self.noise_schedule(), self.video_std)


KINDS = {kind.objective: kind for kind in (DecomposedConfig, PlainConfig)}


def _check_number(name: str, value: object, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not fits(value):
        raise ValueError(f"{name} is out of range: {value!r}")


def _positive(value: float) -> bool:
    return 0 < value < math.inf


# -- folders ---------------------------------------------------------------------------------------


def read_config(folder: str | Path | None = None) -> CheckpointConfig:
    """The configuration of a checkpoint folder; None is the default checkpoint in the package.

    Raises FileNotFoundError when there is none, ValueError when it is not one of ours.
    """
    folder = _folder(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it has no config.json")
    try:
        return CheckpointConfig.from_json(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not the configuration of a model: {error}") from error


def build_network(config: CheckpointConfig, name: str) -> Generator:
    """A network with freshly initialised weights; ValueError for a name that is none of config's.

    name: one of config.networks: "base" or "residual" of a decomposed model, "video" of a plain one
    """
    return config.generator(name, UNet(config.unet_config(name)))


def load_network(
    folder: str | Path | None,
    config: CheckpointConfig,
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Generator:
    """A network of a checkpoint, in eval mode on `device`, with exactly its file's weights.

    name: as for `build_network`

    Raises FileNotFoundError without the file, ValueError for a name that is none of the model's and
    for a file that is damaged, exchanged or of another architecture.
    """
    folder = _folder(folder)
    try:
        unet_config = config.unet_config(name)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    state = read_weights(folder, name, config)
    unet = empty_unet(unet_config)
    expected = {k: v.shape for k, v in unet.state_dict().items()}
    found = {k: v.shape for k, v in state.items()}
    if found != expected:
        odd = next(k for k in sorted({**expected, **found}) if expected.get(k) != found.get(k))
        raise ValueError(
            f"{folder / name}.safetensors is of another architecture than its config.json: {odd} "
            f"should be {_shape(expected.get(odd))}, is {_shape(found.get(odd))}"
        )
    unet.load_state_dict({k: v.to(device, dtype) for k, v in state.items()}, assign=True)
    generator = config.generator(name, unet.to(memory_format=torch.channels_last))
    return generator.to(device).eval().requires_grad_(False)


def save_checkpoint(
    folder: str | Path,
    config: CheckpointConfig,
    *states: dict[str, Tensor],
    dtype: torch.dtype = torch.float16,
) -> CheckpointConfig:
    """Write a checkpoint from the UNets' state dicts; an interrupted write leaves the old one.

    states: one per network, in the order of config.networks

    Returns the configuration as written, with the SHA-256 of the weights. Raises ValueError rather
    than replace a folder or file that is no checkpoint.
    """
    if len(states) != len(config.networks):
        raise ValueError(
            f"a {config.objective} model has the networks {', '.join(config.networks)}, "
            f"got {len(states)} state dicts"
        )
    folder = Path(folder)
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()
    ):
        raise ValueError(f"{folder} exists and is no checkpoint: it is not overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as fresh:
        digests = {}
        for name, state in zip(config.networks, states, strict=True):
            file = fresh / f"{name}.safetensors"
            write_tensors(file, {key: value.to("cpu", dtype) for key, value in state.items()})
            digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        config = replace(config, sha256=digests)
        (fresh / "config.json").write_text(config.to_json() + "\n", encoding="utf-8")
    return config


def read_weights(
    folder: str | Path | None, name: str, config: CheckpointConfig
) -> dict[str, Tensor]:
    """The tensors of `name`.safetensors ("base", "residual", "video"), as stored, once found whole.

    Raises FileNotFoundError without the file, ValueError for a damaged or exchanged one.
    """
    file = _folder(folder) / f"{name}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint {file.parent} has no {file.name}")
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != config.sha256.get(name, digest):
        raise ValueError(f"{file} is truncated or not the file its config.json was written with")
    return parse_tensors(data, file)


def _folder(folder: str | Path | None) -> Path:
    return DEFAULT if folder is None else Path(folder)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
