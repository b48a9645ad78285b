"""A model on disk: a folder of config.json and one .safetensors file per network.

A decomposed model has base.safetensors and residual.safetensors; a VDM* (plain video diffusion)
has video.safetensors. The configuration holds everything that sampling needs to know (shapes,
labels, schedule, λ); the weights are read without executing code, and held against the SHA-256 that
it records.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.schedule import NoiseSchedule
from ..files import parse_tensors, replacing_folder, write_tensors
from ..models import BaseGenerator, ResidualGenerator, UNet, UNetConfig, VideoGenerator
from ..models.unet import empty_unet
from ..names import BASE_PATHS

FORMATS = {"decomposed": "vfengine-decomposed-1", "vdm": "vfengine-vdm-1"}  # by objective
DEFAULT = Path(__file__).parent.parent / "assets" / "default"

# by objective: a model's networks, and the entries of the other that it has no place for
NETWORKS = {"decomposed": ("base", "residual"), "vdm": ("video",)}
_FOREIGN = {
    "decomposed": ("video", "video_std"),
    "vdm": ("lam", "base", "residual", "base_std", "residual_std", "base_path", "clean_share"),
}
_PICTURES = {"base": 1, "residual": 2, "video": 1}  # in a network's input, side by side


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a model is, apart from its weights.

    num_frames, height, width, channels   of the clips it was trained on; pixels in -1..1
    labels      class names in the order of the class indices; the null class follows them
    fps         frames a second at which a clip plays at its natural speed
    schedule    NoiseSchedule.to_dict()
    sha256      of the weight files, filled in by save_checkpoint

    Of a decomposed model alone:
    lam         λ of the non-base frames in training, and so of sampling
    base, residual   UNetConfig of the two networks
    base_std, residual_std   standard deviation of what each network predicts (see
                models/generators.py)
    base_path   "stepwise" or "clean": how the base path is walked by default
    clean_share share of the training clips on which the residual network saw the exact base noise;
                None: not recorded

    Of a VDM* alone (with a video network the configuration is that of one):
    video, video_std   as base and base_std, for the network of whole clips
    """

    num_frames: int
    height: int
    width: int
    channels: int
    lam: float | None = None
    labels: tuple[str, ...]
    fps: float
    schedule: dict
    base: UNetConfig | None = None
    residual: UNetConfig | None = None
    base_std: float = 0.5
    residual_std: float = 0.35
    base_path: str = "stepwise"
    clean_share: float | None = None
    video: UNetConfig | None = None
    video_std: float = 0.5
    sha256: dict = field(default_factory=dict)

    def __post_init__(self):
        self._check_owners()
        for name in ("num_frames", "height", "width", "channels"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 2**16:
                raise ValueError(f"{name} must be an int from 1 to {2**16}, got {value!r}")
        for name in ("lam", "fps", "base_std", "residual_std", "video_std", "clean_share"):
            value = getattr(self, name)
            if name in _FOREIGN[self.objective] or (name == "clean_share" and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            shares = {"lam": 0 <= value < 1, "clean_share": 0 <= value <= 1}
            if not shares.get(name, 0 < value < math.inf):
                raise ValueError(f"{name} is out of range: {value!r}")
        if self.base_path not in BASE_PATHS:
            raise ValueError(f"base_path must be one of {BASE_PATHS}, got {self.base_path!r}")
        if self.base_path == "clean" and self.clean_share == 0:
            raise ValueError('base_path="clean" needs a clean_share above 0 in training')
        if not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels must be strings, got {self.labels!r}")
        if not isinstance(self.schedule, dict):
            raise ValueError(f"schedule must be an object, got {self.schedule!r}")
        if not isinstance(self.sha256, dict) or not all(
            isinstance(digest, str) for digest in self.sha256.values()
        ):
            raise ValueError(f"sha256 must be an object of strings, got {self.sha256!r}")
        for name in self.networks:
            unet = getattr(self, name)
            if unet.in_channels != _PICTURES[name] * self.channels:
                raise ValueError(
                    f"{name} takes {unet.in_channels} channels, not those of the clips"
                )
            if (unet.num_classes or 0) != len(self.labels):
                raise ValueError(f"{name} has {unet.num_classes} classes, not {len(self.labels)}")

    def _check_owners(self) -> None:
        """ValueError for a missing network, or for entries of another objective's models."""
        missing = [name for name in self.networks if getattr(self, name) is None]
        if missing:
            raise ValueError(f"no {' and no '.join(missing)} network")
        for f in fields(self):
            if f.name in _FOREIGN[self.objective] and getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name} has no place in a {self.objective} model")

    @property
    def objective(self) -> str:
        """What it was trained for: "decomposed" (VideoFusion) or "vdm" (plain video diffusion)."""
        return "decomposed" if self.video is None else "vdm"

    @property
    def networks(self) -> tuple[str, ...]:
        """The names of its networks, and of their files: ("base", "residual") or ("video",)."""
        return NETWORKS[self.objective]

    @property
    def animates_pictures(self) -> bool:
        """Whether base_path="clean" is open to it: its residual network has seen exact base noise.

        Where the share is not recorded, the base path that was found the better one says so.
        """
        if self.objective != "decomposed":
            return False
        return self.base_path == "clean" if self.clean_share is None else self.clean_share > 0

    @property
    def null_class(self) -> int:
        """The class index that means "no label" in classifier-free guidance."""
        return len(self.labels)

    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_dict(self.schedule)

    def fingerprint(self) -> str:
        """16 hex digits that name the base network: a base path of another one can be refused.

        Those of a VDM* name its video network.
        """
        return self.sha256.get(self.networks[0], "")[:16]

    def to_json(self) -> str:
        """Its own objective's entries; what format 1 has gained since only where it says more."""
        values = asdict(self)
        for name in _FOREIGN[self.objective]:
            del values[name]
        if values.get("clean_share", 0) is None:
            del values["clean_share"]
        for name in self.networks:
            values[name] = getattr(self, name).to_dict()
        return json.dumps({"format": FORMATS[self.objective], **values}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> CheckpointConfig:
        """Raises ValueError for text that is not the configuration of a model."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON ({error})") from error
        form = values.pop("format", None) if isinstance(values, dict) else None
        if form not in FORMATS.values():
            raise ValueError(f'"format" is not one of {", ".join(FORMATS.values())}')
        objective = next(name for name in FORMATS if FORMATS[name] == form)
        known = {f.name for f in fields(cls)} - set(_FOREIGN[objective])
        unknown = set(values) - known
        if unknown:
            raise ValueError(f"unknown entries: {', '.join(sorted(unknown))}")
        try:
            if not isinstance(values["labels"], list):
                raise ValueError(f"labels must be a list, got {values['labels']!r}")
            values["labels"] = tuple(values["labels"])
            for name in NETWORKS[objective]:
                values[name] = UNetConfig(**values[name])
            config = cls(**values)
            config.noise_schedule()  # refused here, where the file's name is known
            return config
        except (TypeError, KeyError) as error:
            raise ValueError(f"incomplete or of another version ({error})") from error


def build_base(config: CheckpointConfig) -> BaseGenerator:
    """The base generator with freshly initialised weights; ValueError for a VDM*."""
    return _generator(config, "base", UNet(_unet_config(config, "base")))


def build_residual(config: CheckpointConfig) -> ResidualGenerator:
    """The residual generator with freshly initialised weights; ValueError for a VDM*."""
    return _generator(config, "residual", UNet(_unet_config(config, "residual")))


def build_video(config: CheckpointConfig) -> VideoGenerator:
    """The VDM* with freshly initialised weights; ValueError for a decomposed model."""
    return _generator(config, "video", UNet(_unet_config(config, "video")))


def _unet_config(config: CheckpointConfig, name: str) -> UNetConfig:
    if name not in config.networks:
        kind, own = {"decomposed": "a decomposed model", "vdm": "a VDM*"}, config.networks
        raise ValueError(f"{kind[config.objective]} has no {name} network, but {' and '.join(own)}")
    return getattr(config, name)


def _generator(config: CheckpointConfig, name: str, unet: UNet):
    """The generator around the UNet of this name."""
    schedule = config.noise_schedule()
    if name == "base":
        return BaseGenerator(unet, schedule, config.base_std)
    if name == "residual":
        return ResidualGenerator(unet, schedule, config.lam, config.residual_std)
    return VideoGenerator(unet, schedule, config.video_std)


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


def load_base(
    folder: str | Path | None,
    config: CheckpointConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BaseGenerator:
    """The base generator of a checkpoint, in eval mode; faults of its file raise ValueError."""
    return _load(folder, config, "base", device, dtype)


def load_residual(
    folder: str | Path | None,
    config: CheckpointConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ResidualGenerator:
    """The residual generator of a checkpoint, in eval mode; faults of its file raise ValueError."""
    return _load(folder, config, "residual", device, dtype)


def load_video(
    folder: str | Path | None,
    config: CheckpointConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoGenerator:
    """The VDM* of a checkpoint, in eval mode; faults of its file raise ValueError."""
    return _load(folder, config, "video", device, dtype)


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


def _folder(folder: str | Path | None) -> Path:
    return DEFAULT if folder is None else Path(folder)


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


def _load(folder, config: CheckpointConfig, name: str, device, dtype):
    """The generator of this name, in eval mode on `device`, with exactly its file's weights."""
    folder = _folder(folder)
    try:
        unet_config = _unet_config(config, name)
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
    generator = _generator(config, name, unet.to(memory_format=torch.channels_last))
    return generator.to(device).eval().requires_grad_(False)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))
