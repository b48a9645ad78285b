"""What a checkpoint's config.json says: a model apart from its weights.

There are two kinds: a decomposed model, and plain video diffusion (checkpoint.py). Either may have
an autoencoder, whose latents its networks then denoise in place of pixels, and a text encoder,
whose rows they attend to in place of class labels. The base network of a decomposed model may be a
published one, with its own autoencoder and text encoder (published_base.py).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..diffusion.schedule import NoiseSchedule
from ..diffusion.solvers import SolverTable, solver_table, usual_spacing
from ..files import parse_json
from ..models import (
    AutoencoderConfig,
    BaseGenerator,
    ResidualGenerator,
    TextEncoderConfig,
    UNet,
    UNetConfig,
    VideoGenerator,
)
from ..models.denoisers import PretrainedGenerator
from ..names import BASE_PATHS
from .checks import check_number, object_of, positive
from .few_steps import FewSteps, UsualSteps
from .published_base import FOLDERS, PublishedBase

Generator = BaseGenerator | PretrainedGenerator | ResidualGenerator | VideoGenerator

# The order of the entries in config.json, of both kinds.
_ENTRIES = (
    *("num_frames", "height", "width", "channels", "lam", "labels", "fps", "schedule"),
    *("base", "residual", "base_std", "residual_std", "base_path", "clean_share"),
    *("video", "video_std"),
    *("autoencoder", "latent_mean", "latent_std", "text_encoder", "prompts", "distilled"),
    *("usual_steps", "published", "sha256"),
)
_LATER = (
    *("clean_share", "autoencoder", "latent_mean", "latent_std", "text_encoder", "prompts"),
    *("distilled", "usual_steps", "published"),
)
_PART_CONFIGS = {
    "autoencoder": AutoencoderConfig,
    "text_encoder": TextEncoderConfig,
    "published": PublishedBase,
}


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(ABC):
    """A model apart from its weights; `DecomposedConfig` or `PlainConfig`.

    num_frames, height, width, channels   of the clips it was trained on; pixels in -1..1
    labels      class names in the order of the class indices; the null class follows them
    fps         frames a second at which a clip plays at its natural speed
    schedule    NoiseSchedule.to_dict()
    sha256      of the weight files, filled in by save_checkpoint

    Of models with parts; None, and absent from config.json, where there is none:
    autoencoder its clips are then latents z of it, and height, width and channels those of z
    latent_mean, latent_std   per channel of z: the networks see (z - mean) / std
    text_encoder   what the networks attend to; they then have no classes
    prompts     what each label stands for

    distilled   by name, the networks that were distilled to few steps; None: there are none
    usual_steps how others are sampled where nobody says; None: in 50 steps of DDIM

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
    autoencoder: AutoencoderConfig | None = None
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    text_encoder: TextEncoderConfig | None = None
    prompts: tuple[str, ...] | None = None
    distilled: dict[str, FewSteps] | None = None
    usual_steps: UsualSteps | None = None

    def __post_init__(self):
        for name in ("num_frames", "height", "width", "channels"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 2**16:
                raise ValueError(f"{name} must be an int from 1 to {2**16}, got {value!r}")
        check_number("fps", self.fps, positive)
        if not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels must be strings, got {self.labels!r}")
        twice = [label for k, label in enumerate(self.labels) if label in self.labels[:k]]
        if twice:
            raise ValueError(f"labels must differ, got {twice[0]!r} more than once")
        if not isinstance(self.schedule, dict):
            raise ValueError(f"schedule must be an object, got {self.schedule!r}")
        if not isinstance(self.sha256, dict) or not all(
            isinstance(digest, str) for digest in self.sha256.values()
        ):
            raise ValueError(f"sha256 must be an object of strings, got {self.sha256!r}")
        self._check_autoencoder()
        self._check_prompts()
        for name, num_images in zip(self.networks, self._num_images, strict=True):
            unet = self.unet_config(name)
            if not isinstance(unet, UNetConfig):
                raise TypeError(f"{name} must be a UNetConfig, got {unet!r}")
            if unet.in_channels != num_images * self.channels:
                raise ValueError(
                    f"{name} takes {unet.in_channels} channels, not those of the clips"
                )
            self._check_condition(name, unet)
        self._check_distilled()
        if not isinstance(self.usual_steps, UsualSteps | None):
            raise TypeError(f"usual_steps must be UsualSteps, got {self.usual_steps!r}")

    def _check_distilled(self) -> None:
        """ValueError unless networks that were distilled, and no others, are told the guidance."""
        found = {} if self.distilled is None else self.distilled
        if not isinstance(found, dict) or (self.distilled is not None and not found):
            raise ValueError(f"distilled must be an object of networks, got {found!r}")
        if odd := sorted(map(str, set(found) - set(self.networks))):
            raise ValueError(f"distilled names {odd[0]!r}, which is none of its networks")
        for name in self.networks:
            if (name in found) is not self.unet_config(name).guidance_embedding:
                raise ValueError(
                    f"{name} is distilled, but has no guidance_embedding"
                    if name in found
                    else f"{name} has a guidance_embedding, but was not distilled"
                )
        for name, few in found.items():
            if not isinstance(few, FewSteps):
                raise TypeError(f"distilled: {name} must be FewSteps, got {few!r}")

    def _check_condition(self, name: str, unet: UNetConfig) -> None:
        """ValueError unless the UNet takes the labels, or what the text encoder makes."""
        if self.text_encoder is None:
            if (unet.num_classes or 0) != len(self.labels):
                raise ValueError(f"{name} has {unet.num_classes} classes, not {len(self.labels)}")
            return
        if unet.num_classes is not None:
            raise ValueError(f"{name} has {unet.num_classes} classes, but prompts replace labels")
        if unet.context_dim != self.text_encoder.width:
            raise ValueError(
                f"{name} has a context_dim of {unet.context_dim}, the text encoder makes rows of "
                f"{self.text_encoder.width}"
            )

    def _check_autoencoder(self) -> None:
        """ValueError unless the clips are what the autoencoder decodes."""
        scales = {"latent_mean": lambda mean: abs(mean) <= 1e15, "latent_std": positive}
        if self.autoencoder is None:
            for name in scales:
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is of latents, but there is no autoencoder")
            return
        if not isinstance(self.autoencoder, AutoencoderConfig):
            raise TypeError(f"autoencoder must be an AutoencoderConfig, got {self.autoencoder!r}")
        if self.autoencoder.latent_channels != self.channels:
            raise ValueError(
                f"the autoencoder has {self.autoencoder.latent_channels} latent channels, the "
                f"networks' clips {self.channels}"
            )
        for name, fits in scales.items():
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != self.channels:
                raise ValueError(f"{name} must be {self.channels} numbers, got {values!r}")
            for value in values:
                check_number(name, value, fits)

    def _check_prompts(self) -> None:
        """ValueError unless a model with a text encoder, and no other, has a prompt a label."""
        if self.text_encoder is None:
            if self.prompts is not None:
                raise ValueError("there are prompts, but there is no text_encoder")
            return
        if not isinstance(self.text_encoder, TextEncoderConfig):
            raise TypeError(f"text_encoder must be a TextEncoderConfig, got {self.text_encoder!r}")
        if not isinstance(self.prompts, tuple) or len(self.prompts) != len(self.labels):
            raise ValueError(
                f"a text_encoder needs prompts, one for each of {len(self.labels)} labels, got "
                f"{self.prompts!r}"
            )
        if not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"prompts must be strings, got {self.prompts!r}")

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the files beside the networks': of the autoencoder and the text encoder."""
        text = () if self.text_encoder is None else ("text_encoder", "tokenizer")
        return (() if self.autoencoder is None else ("autoencoder",)) + text

    @property
    def foreign(self) -> tuple[str, ...]:
        """The networks and parts that lie in folders of diffusers, by our names."""
        return ()

    def place(self, folder: Path, name: str) -> Path:
        """Where the weights of a network or part lie: a file, or a folder of diffusers."""
        return folder / (FOLDERS[name] if name in self.foreign else f"{name}.safetensors")

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the clips in pixels."""
        scale = 1 if self.autoencoder is None else self.autoencoder.scale
        return self.height * scale, self.width * scale

    @property
    def picture_channels(self) -> int:
        """Channels of the clips' pictures."""
        return self.channels if self.autoencoder is None else self.autoencoder.out_channels

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

    def table(
        self,
        solver: str,
        num_inference_steps: int,
        eta: float = 0.0,
        timesteps: Sequence[int] | None = None,
    ) -> SolverTable:
        """What a solver does, step by step, on the model's schedule; see `solver_table`.

        timesteps: None for those that the model names for so many steps, or else the solver's
        """
        if timesteps is None and self.usual_steps is not None:
            timesteps = self.usual_steps.own_timesteps(solver, num_inference_steps)
        how = self._timesteps(solver) | {"timesteps": timesteps}
        return solver_table(solver, self.noise_schedule(), num_inference_steps, eta, **how)

    def _timesteps(self, solver: str) -> dict[str, Any]:
        """The arguments of `solver_table` that say which timesteps the networks are asked at."""
        return {"spacing": usual_spacing(solver)}

    def fingerprint(self) -> str:
        """16 hex digits that name its first network; base paths of another one are refused."""
        return self.sha256.get(self.networks[0], "")[:16]

    def _check_timesteps(self) -> None:
        """ValueError for a schedule that is none, or too short for timesteps that are named."""
        total = self.noise_schedule().num_train_timesteps
        for first, *_ in () if self.usual_steps is None else self.usual_steps.timesteps:
            if first >= total:
                raise ValueError(f"usual_steps: a row begins at {first} of {total} steps")
        for name, few in (self.distilled or {}).items():
            if few.timesteps[0] >= total:
                raise ValueError(f"distilled: {name} begins at {few.timesteps[0]} of {total} steps")

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
        for name in _LATER:
            if values.get(name, 0) is None:
                del values[name]
        for name in self.networks:
            values[name] = values[name].to_dict()
        for name in (*_PART_CONFIGS, "usual_steps"):
            if name in values:
                values[name] = asdict(values[name])
        if "distilled" in values:
            values["distilled"] = {name: asdict(few) for name, few in self.distilled.items()}
        return json.dumps({"format": self._format, **values}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> CheckpointConfig:
        """The configuration in a JSON text; ValueError if the text is none."""
        try:
            values = parse_json(text)
        except ValueError as error:
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
            for name in ("labels", "latent_mean", "latent_std", "prompts"):
                if name == "labels" or values.get(name) is not None:
                    if not isinstance(values[name], list):
                        raise ValueError(f"{name} must be a list, got {values[name]!r}")
                    values[name] = tuple(values[name])
            for name in kind.networks:
                values[name] = UNetConfig(**object_of(name, values[name]))
            for name, part in _PART_CONFIGS.items():
                if values.get(name) is not None:
                    values[name] = part(**object_of(name, values[name]))
            if values.get("usual_steps") is not None:
                values["usual_steps"] = UsualSteps.from_dict(values["usual_steps"])
            if values.get("distilled") is not None:
                entries = object_of("distilled", values["distilled"])
                values["distilled"] = {n: FewSteps.from_dict(few) for n, few in entries.items()}
            config = kind(**values)
            config._check_timesteps()  # refused here, where the file's name is known
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
    published   how the base network is sampled, if it is a published one; else None, and absent
                from config.json
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
    published: PublishedBase | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.published is not None:
            if not isinstance(self.published, PublishedBase):
                raise TypeError(f"published must be a PublishedBase, got {self.published!r}")
            if self.autoencoder is None or self.text_encoder is None:
                raise ValueError("a published base network needs an autoencoder and a text_encoder")
            if self.base.out_channels != self.channels:
                raise ValueError(
                    f"a published base network makes {self.channels} channels, as the clips have, "
                    f"not {self.base.out_channels}"
                )
        check_number("lam", self.lam, lambda lam: 0 <= lam < 1)
        check_number("base_std", self.base_std, positive)
        check_number("residual_std", self.residual_std, positive)
        if self.clean_share is not None:
            check_number("clean_share", self.clean_share, lambda share: 0 <= share <= 1)
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

    @property
    def foreign(self) -> tuple[str, ...]:
        return () if self.published is None else self.published.parts

    def _timesteps(self, solver: str) -> dict[str, Any]:
        if self.published is None:
            return super()._timesteps(solver)
        return self.published.timesteps

    def generator(self, name: str, unet: UNet) -> Generator:
        schedule = self.noise_schedule()
        if name == "base" and self.published is not None:
            return PretrainedGenerator(unet, schedule, self.published.prediction_type)
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
        check_number("video_std", self.video_std, positive)

    def generator(self, name: str, unet: UNet) -> Generator:
        return VideoGenerator(unet, self.noise_schedule(), self.video_std)


KINDS = {kind.objective: kind for kind in (DecomposedConfig, PlainConfig)}
