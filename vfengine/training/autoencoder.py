"""Training of the autoencoder on rendered frames.

The loss is the mean absolute error of pixels and of the differences of neighbouring ones, which
keeps edges sharp. The figure, a small part of the picture and most of what is looked at, weighs
more. Two things are done to the latents, for the networks that will learn them:

- Noise is added, up to a tenth of each channel's standard deviation, before they are decoded. What
  is decoded in the end is an estimate and has errors. No further prior is needed: latents are
  normalised by the mean and standard deviation of each channel.
- Latents at half the size must decode to the picture at half the size (Kouzelis et al. 2025, arXiv
  2502.09509). That makes them as smooth as pictures are, and easier to predict.

With `adversary` in the options, a discriminator is trained beside it (adversary.py).

The first half of the steps sees crops of half the side: more figures for the same time. The second
half sees whole pictures, whose norms and rims differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..formats.parts import read_autoencoder, save_autoencoder
from ..media.pictures import network_to_pixels, pixels_to_network
from ..models.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder
from ..models.empty import new_weights
from .adversary import Adversary
from .arrays import kept
from .options import TrainingOptions
from .report import StepReport
from .samples import write_sheet
from .updates import Updates

CONFIG = AutoencoderConfig(
    latent_channels=8,
    block_out_channels=(48, 96, 128),
    layers_per_block=1,
    norm_groups=16,
    patch_size=2,
    quant_conv=False,
    post_quant_conv=False,
)
FRAMES_OF_A_SCENE = 3  # of the 16 of its clip, at random
_SCENES_AT_ONCE = 16  # with the same frames of each
_LARGEST_NOISE = 0.1  # of a channel's standard deviation
_FIGURE_WEIGHT = 4.0  # of the figure's pixels, and of those beside it, to 1 of others
_HALF_SIZE_WEIGHT = 0.25
_CROPS_OF_A_PICTURE = 3  # crops in place of a picture, for about the same time


def frame_pool(
    num_scenes: int,
    seed: int,
    size: int,
    device: torch.device,
    file: Path | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Frames of rendered scenes, uint8 [FRAMES_OF_A_SCENE * num_scenes, H, W, 4].

    The fourth channel is the figure's share of a pixel. They are on the device. With `file` they
    are kept there as .npy and found by the next call; a CPU maps them. progress(n) is called as
    scenes are finished. Raises ValueError for a file that is cut off or holds something else.
    """
    from .mocap import Renderer, draw_scene

    def parts() -> Iterator[Tensor]:
        renderer, rng = Renderer(size, device=device), np.random.default_rng(seed)
        for first in range(0, num_scenes, _SCENES_AT_ONCE):
            numbers = range(first, min(first + _SCENES_AT_ONCE, num_scenes))
            chosen = rng.choice(renderer.num_frames, FRAMES_OF_A_SCENE, replace=False)
            scenes, chosen = [draw_scene(seed, i) for i in numbers], sorted(chosen.tolist())
            yield renderer.frames(scenes, chosen, with_figure=True).flatten(0, 1)
            progress(len(numbers))

    if file is None:
        return torch.cat(list(parts()))
    chunks = (part.cpu().numpy() for part in parts())
    count = num_scenes * FRAMES_OF_A_SCENE
    frames = torch.from_numpy(kept(file, chunks, count, np.uint8, (size, size, 4)))
    return frames if device.type == "cpu" else frames.to(device)


class _Scale(nn.Module):
    """Running mean and standard deviation of each latent channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.mean = nn.Parameter(
            torch.zeros(channels, dtype=torch.float32, device="cpu"), requires_grad=False
        )
        self.std = nn.Parameter(
            torch.ones(channels, dtype=torch.float32, device="cpu"), requires_grad=False
        )

    @torch.no_grad()
    def update(self, z: Tensor, step: int) -> None:
        share = max(0.01, 1 / (step + 1))
        self.mean.lerp_(z.mean((0, 2, 3)), share)
        variance = (z - self.mean[:, None, None]).square().mean((0, 2, 3))
        self.std.lerp_(variance.sqrt(), share)


class AutoencoderTraining:
    """Owns encoder, decoder and optimizer; the surface is that of vfengine/cli/train_loop.py.

    frames: uint8 [M, H, W, 4] of `frame_pool`, on any device
    keep_encoder: train the decoder alone, which `warm_start` or `restore` gives an encoder: latents
                  stay those that other networks know
    """

    def __init__(
        self,
        options: TrainingOptions,
        frames: Tensor,
        device: torch.device | str = "cpu",
        config: AutoencoderConfig = CONFIG,
        keep_encoder: bool = False,
    ):
        multiple = 2 * config.scale  # of sides: half a crop is whole latents
        if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 4:
            found = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"expected uint8 frames [M, H, W, 4], got {found}")
        if not len(frames) or any(length % (2 * multiple) for length in frames.shape[1:3]):
            raise ValueError(
                f"expected frames whose sides are multiples of {2 * multiple}, "
                f"got {list(frames.shape)}"
            )
        self.options, self.frames, self.config = options, frames, config
        self.device, self.steps_done = torch.device(device), 0
        torch.manual_seed(options.seed)
        with new_weights():
            networks = {"encoder": Encoder(config), "decoder": Decoder(config)}
        self.networks = {name: network.to(device) for name, network in networks.items()}
        self.scale = _Scale(config.latent_channels).to(device)
        self.keep_encoder = keep_encoder
        trained, fixed = dict(self.networks), [self.scale]
        if keep_encoder:
            fixed.append(trained.pop("encoder").eval().requires_grad_(False))
        self.adversary, others = None, []
        if options.adversary > 0:
            last = self.networks["decoder"].conv_out.weight
            self.adversary = Adversary(options, last, device)
            others = self.adversary.state()
        self.updates = Updates(trained, options, fixed, others)
        self.averaged = {**self.networks, **self.updates.averaged}

    def step(self) -> StepReport:
        """One optimizer step on the pictures, or crops, of this step."""
        k = self.steps_done
        x, figure, generator = self._batch(k)
        encoder, decoder = self.networks["encoder"], self.networks["decoder"]
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"
        ):
            z = encoder(x).float()
            if not self.keep_encoder:
                self.scale.update(z, k)
            share = torch.rand(
                len(x), 1, 1, 1, generator=generator, dtype=torch.float32, device="cpu"
            ).to(self.device)
            noise = torch.randn(z.shape, generator=generator, dtype=torch.float32, device="cpu").to(
                self.device
            )
            noisy = z + _LARGEST_NOISE * share * self.scale.std[:, None, None] * noise
            decoded, real = decoder(noisy).float(), x
            whole = _error(decoded, x, figure)
            z, x, figure = (F.avg_pool2d(values, 2) for values in (z, x, figure))
            half = _error(decoder(z).float(), x, figure)
        loss = whole + _HALF_SIZE_WEIGHT * half
        losses = {"whole": whole.detach(), "half": half.detach()}
        if self.adversary is not None:
            share, of_both = self.adversary.step(real, decoded, loss, k)
            loss, losses = loss + share, losses | of_both
        self.updates.apply(loss, k)
        self.steps_done += 1
        report = StepReport(losses, step=k)
        if self.device.type == "cpu":
            _ = report.losses
        return report

    def _batch(self, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Pictures in -1..1 [B, 3, H, W] or crops of them, the figure's share of their pixels
        [B, 1, H, W], and a generator for what follows.
        """
        rng = np.random.default_rng((self.options.seed, step))
        generator = torch.Generator("cpu").manual_seed(int(rng.integers(2**62)))
        _, height, width, _ = self.frames.shape
        count = self.options.batch_size
        if 2 * step >= self.options.steps:
            chosen = torch.from_numpy(rng.integers(0, len(self.frames), count))
            pixels = self.frames[chosen.to(self.frames.device)]
        else:
            count *= _CROPS_OF_A_PICTURE
            chosen = rng.integers(0, len(self.frames), count)
            cells = self.config.scale
            top = rng.integers(0, height // 2 // cells + 1, count) * cells
            left = rng.integers(0, width // 2 // cells + 1, count) * cells
            crops = [
                self.frames[i, y : y + height // 2, x : x + width // 2]
                for i, y, x in zip(chosen, top, left, strict=True)
            ]
            pixels = torch.stack(crops)
        pixels = pixels.to(self.device)
        figure = pixels[..., 3:].movedim(-1, 1) / 255
        return pixels_to_network(pixels[..., :3]).contiguous(), figure, generator

    def describe(self) -> str:
        sizes = [
            f"{name} {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M"
            for name, net in self.networks.items()
        ]
        return (
            f"{len(self.frames)} frames; {' and '.join(sizes)} parameters; "
            f"{self.options.precision} on {self.device}"
        )

    # -- on disk -----------------------------------------------------------------------------------

    def warm_start(self, folder: Path) -> list[str]:
        """Starts from the folder of an autoencoder of the same configuration.

        Returns the names of the weights that stay fresh: none. Raises ValueError for another
        configuration, and what `read_autoencoder` raises.
        """
        config, state, mean, std = read_autoencoder(folder)
        if config != self.config:
            raise ValueError(f"{folder} holds another autoencoder: {config}, not {self.config}")
        for networks in (self.networks, self.averaged):
            for name, network in networks.items():
                own = {
                    k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(name)
                }
                network.load_state_dict(own)
        for values, parameter in ((mean, self.scale.mean), (std, self.scale.std)):
            parameter.data.copy_(torch.tensor(values, dtype=torch.float32, device="cpu"))
        return []

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Writes the averaged weights, and the latents' mean and standard deviation.

        The encoder's log-variance, which is not trained, becomes that of the noise it can bear.
        """
        module = Autoencoder(self.config, self.averaged["decoder"], self.averaged["encoder"])
        mean, std = (self.scale.mean, self.scale.std) if self.keep_encoder else self._measured()
        channels = self.config.latent_channels
        state = {name: value.clone() for name, value in module.state_dict().items()}
        state["encoder.conv_out.weight"][channels:] = 0
        state["encoder.conv_out.bias"][channels:] = 2 * (_LARGEST_NOISE * std).log()
        save_autoencoder(folder, self.config, state, tuple(mean.tolist()), tuple(std.tolist()))

    def _measured(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the averaged encoder's latents, per channel."""
        step = max(1, len(self.frames) // 512)
        z = torch.cat([self._encoded(part) for part in self.frames[::step].split(16)])
        return z.mean((0, 2, 3)), z.std((0, 2, 3))

    def _encoded(self, frames: Tensor) -> Tensor:
        x = pixels_to_network(frames[..., :3].to(self.device)).contiguous()
        return self.averaged["encoder"](x).float()

    @torch.no_grad()
    def write_samples(self, file: Path) -> None:
        """Eight frames of the pool, and below each what the autoencoder makes of it."""
        frames = self.frames[:: max(1, len(self.frames) // 8)][:8]
        decoded = self.averaged["decoder"](self._encoded(frames)).float()
        pictures = torch.stack([frames[..., :3].to(self.device), network_to_pixels(decoded)])
        write_sheet(pictures, file)

    def save(self, file: Path, checkpoint: str = "") -> None:
        """Writes everything that a run continues from to one .safetensors file, atomically.

        checkpoint: names the checkpoint that was exported of this state
        """
        self.updates.save(file, self._identity(), self.steps_done, checkpoint)

    def restore(self, file: Path) -> None:
        """Continues from `save`. Raises ValueError for a damaged file or another model's state."""
        self.steps_done = self.updates.restore(file, self._identity())

    def _identity(self) -> str:
        named = (
            asdict(self.config),
            tuple(self.frames.shape),
            self.options.seed,
            self.keep_encoder,
        )
        if self.adversary is not None:
            named += ("adversary",)
        text = repr(named)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of uint8 pictures [B, H, W, 3]."""
    error = (x.float() - y.float()).square().flatten(1).mean(1)
    return 10 * (255**2 / error.clamp(min=1e-9)).log10()


def _error(x: Tensor, y: Tensor, figure: Tensor) -> Tensor:
    """Mean absolute error of pixels, and of their differences along both axes.

    figure: its share of pixels, [B, 1, H, W]; errors on it and beside it weigh more
    """
    weight = 1 + (_FIGURE_WEIGHT - 1) * F.max_pool2d(figure, 5, 1, 2)
    difference = x - y
    across = difference[..., 1:] - difference[..., :-1]
    down = difference[..., 1:, :] - difference[..., :-1, :]
    errors = (
        (difference.abs() * weight).mean(),
        (across.abs() * weight[..., 1:]).mean(),
        (down.abs() * weight[..., 1:, :]).mean(),
    )
    return sum(errors) / weight.mean()
