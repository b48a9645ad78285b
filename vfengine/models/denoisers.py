"""Denoisers: UNets wrapped as estimators of the noise ε, for decomposed and plain models.

Samplers and losses use noise estimates (ε), but the UNets here predict clean pixels. A wrapper
scales the UNet's input to unit variance and turns its output into ε. Published UNets predict ε or v
(PretrainedGenerator).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..diffusion.decompose import Lam, base_index, frame_weights
from ..diffusion.schedule import NoiseSchedule, batch_timesteps, check_input
from .tied import TiedGenerator
from .unet import UNet

if TYPE_CHECKING:
    from ..sampling.features import Kept
    from ..sampling.in_loop import Steps

PREDICTION_TYPES = ("epsilon", "v_prediction")


class _Generator(nn.Module):
    """The common part: the UNet, ᾱ of all timesteps, the standard deviation of what it predicts."""

    takes_labels = True  # whether labels, and so guidance, change the estimate
    conditioned = False  # whether the base frame is an input of the UNet for every frame

    def __init__(self, unet: UNet, schedule: NoiseSchedule, data_std: float):
        super().__init__()
        self.unet, self.data_std = unet, data_std
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        """Move and cast the network; ᾱ moves but stays float64."""
        alphas_cumprod = self.alphas_cumprod
        super()._apply(fn, recurse)
        self.alphas_cumprod = alphas_cumprod.to(self.alphas_cumprod.device)
        return self

    def _alphas_cumprod(self, t: Tensor, z: Tensor) -> Tensor:
        """ᾱ_t of each sample of z, fp32 [B, 1, ...]; ValueError for a t outside the schedule."""
        name, last = type(self).__name__, len(self.alphas_cumprod) - 1
        check_input(name, z)
        t = batch_timesteps(name, t, z)
        if t.is_floating_point():
            raise TypeError(f"{name}: t must be int64, got {t.dtype}")
        try:
            a = self.alphas_cumprod.index_select(0, t)
        except IndexError as error:  # on a CPU; CUDA's kernel ends the process's CUDA
            raise ValueError(f"{name}: t must lie in 0 … {last}, got {t.tolist()}") from error
        return a.float().view(-1, *[1] * (z.dim() - 1))

    def in_loop(
        self,
        steps: Steps,
        class_labels: Tensor | None = None,
        lam: Lam | None = None,
        guidance_scale: float = 1.0,
        context: Tensor | None = None,
        guidance: float | None = None,
    ) -> TiedGenerator | None:
        """This generator in a loop (tied.py); None if its UNet has not the form for CUDA.

        class_labels: int64 [B]; under guidance [2 B], those of the condition first
        lam:          as in `forward` of a ResidualGenerator
        context:      [B, M, C'] of what the UNet attends to; under guidance [2 B, M, C']
        guidance:     the guidance scale, of a UNet whose input it is

        Raises ValueError where the UNet does.
        """
        if not hasattr(self.unet, "rows") or steps.dtype == torch.float64:
            return None
        frames = steps.shape[1] if len(steps.shape) == 5 else 1
        a = self.alphas_cumprod[steps.timesteps].float().double()[:, None]  # [S, 1]
        columns = torch.broadcast_tensors(*self._coefficients(a, frames, lam))
        shape = (len(a), frames, len(columns))
        coeffs = torch.stack(columns, -1).expand(shape).float().contiguous()
        labels = class_labels if self.takes_labels else None
        conditions = {"labels": labels, "context": context, "guidance": guidance}
        return TiedGenerator(
            self.unet, steps, coeffs, guidance_scale, conditioned=self.conditioned, **conditions
        )

    def _coefficients(self, a: Tensor, num_frames: int, lam: Lam | None) -> tuple[Tensor, ...]:
        """The columns of vfengine/ops/_generator_ops.py, for ᾱ float64 [S, 1]: each [S, N or 1]."""
        raise NotImplementedError


class _BlendGenerator(_Generator):
    """An ε estimate from a clean image that is a blend of two, pixel by pixel.

    The first is the noisy image, shrunk according to its noise. The UNet paints the second. What
    is visible through the noise thus need not be painted. The UNet outputs the second image and
    its weight (as a logit): C inputs, C + 1 outputs.
    """

    def __init__(self, unet: UNet, schedule: NoiseSchedule, data_std: float = 0.5):
        _check_channels(type(self).__name__, unet, inputs=1, weights=1)
        super().__init__(unet, schedule, data_std)

    def denoise(self, z: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """Clean estimate x̂ of noisy images z [..., C, H, W]."""
        a = self._alphas_cumprod(t, z)
        total = a * self.data_std**2 + (1 - a)  # the variance of z
        out = self.unet(z * total.rsqrt(), t, **conditions)
        paint, logit = out.to(z.dtype).split([z.shape[-3], 1], dim=-3)
        shrunk = z * (a.sqrt() * self.data_std**2 / total)  # E[x | z] of a Gaussian x
        return torch.lerp(paint, shrunk, logit.sigmoid())

    def forward(self, z: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        """ε̂ = (z - √ᾱ x̂) / √(1-ᾱ).

        z [B, C, H, W] of images, [B, N, C, H, W] of clips, t int64 [B]; class_labels, context,
        kept: see UNet
        """
        a = self._alphas_cumprod(t, z)
        return (z - a.sqrt() * self.denoise(z, t, **conditions)) / (1 - a).sqrt()

    def _coefficients(self, a: Tensor, num_frames: int, lam: Lam | None) -> tuple[Tensor, ...]:
        total = a * self.data_std**2 + (1 - a)
        shrink = a.sqrt() * self.data_std**2 / total
        return torch.ones_like(a), total.rsqrt(), shrink, a.sqrt(), (1 - a).rsqrt()


class BaseGenerator(_BlendGenerator):
    """z_φ: the noise estimate b̂ of base frames z_m [B, C, H, W] (VideoFusion, eq. 6).

    An image diffusion model.
    """


class PretrainedGenerator(_Generator):
    """The noise estimate of a published UNet, of images or of clips, which predicts ε or v.

    v = √ᾱ ε - √(1-ᾱ) x (Salimans & Ho 2022, arXiv 2202.00512). A UNet without classes ignores
    labels. One of images may be the base generator z_φ.
    """

    def __init__(self, unet: UNet, schedule: NoiseSchedule, prediction_type: str = "epsilon"):
        super().__init__(unet, schedule, data_std=1.0)
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"PretrainedGenerator: prediction_type must be one of {PREDICTION_TYPES}, "
                f"got {prediction_type!r}"
            )
        self.prediction_type = prediction_type
        self.takes_labels = unet.class_embedding is not None

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        class_labels: Tensor | None = None,
        context: Tensor | None = None,
        kept: Kept | None = None,
    ) -> Tensor:
        """ε̂ of z, [B, C, H, W] of images or [B, N, C, H, W] of clips, in its dtype.

        t int64 [B]; class_labels, context, kept: see UNet
        """
        conditions = {"class_labels": class_labels if self.takes_labels else None}
        conditions |= {"context": context, "kept": kept}
        conditions = {name: value for name, value in conditions.items() if value is not None}
        out = self.unet(z, t, **conditions).to(z.dtype)
        if self.prediction_type == "epsilon":
            return out
        a = self._alphas_cumprod(t, z)
        return a.sqrt() * out + (1 - a).sqrt() * z

    def _coefficients(self, a: Tensor, num_frames: int, lam: Lam | None) -> tuple[Tensor, ...]:
        one, none = torch.ones_like(a), torch.zeros_like(a)
        if self.prediction_type == "epsilon":
            return one, one, none, one, none
        return one, one, none, a.sqrt(), (1 - a).sqrt()


class VideoGenerator(_BlendGenerator):
    """The noise estimate of whole clips z [B, N, C, H, W] by one video UNet: VDM* (`vdm_config`).

    It is the plain video diffusion that the paper compares with. If its temporal layers are zero,
    it is the BaseGenerator of the same weights, frame by frame.
    """

    def __init__(self, unet: UNet, schedule: NoiseSchedule, data_std: float = 0.5):
        super().__init__(unet, schedule, data_std)
        if not unet.config.is_video:
            raise ValueError("VideoGenerator: needs a video UNet, got one of images")


class ResidualGenerator(_Generator):
    """z_ψ: the estimate r̂_i of each frame's own noise, from z' = z - √λ √(1-ᾱ) b̂.

    The base frame z'_m = √ᾱ x̂_m has no residual noise, and is an input for every frame. A clean
    frame is a blend of three images, pixel by pixel: the base frame, where nothing moves; the noisy
    frame, shrunk towards the base frame according to its noise, where it is visible through the
    noise; and one that the UNet paints, elsewhere. The UNet outputs the last image and the three
    weights (as logits), so it has 2 C inputs and C + 3 outputs.

    lam is the λ of training. A call may pass another, a number or [N]. In a captured step [N] must
    be on the device.
    """

    conditioned = True

    def __init__(self, unet: UNet, schedule: NoiseSchedule, lam: float, data_std: float = 0.35):
        _check_channels("ResidualGenerator", unet, inputs=2, weights=3)
        super().__init__(unet, schedule, data_std)
        self.lam = lam

    def denoise(self, z: Tensor, t: Tensor, lam: Lam | None = None, **conditions) -> Tensor:
        """Clean estimate of all frames from z' [B, N, C, H, W]; on the base frame x̂_m itself."""
        base, _, change = self._change(z, t, lam, conditions)
        return base + change

    def forward(self, z: Tensor, t: Tensor, lam: Lam | None = None, **conditions) -> Tensor:
        """r̂ = (z' - √ᾱ x̂) / (√(1-ᾱ) √(1-λ)), zero on the base frame.

        z' [B, N, C, H, W], t int64 [B], lam as in `decompose.frame_weights`; class_labels, context,
        kept: see UNet
        """
        _, difference, change = self._change(z, t, lam, conditions)
        return (difference - change) / self._variance(z, t, lam).sqrt()

    def _variance(self, z: Tensor, t: Tensor, lam: Lam | None) -> Tensor:
        """σ² = (1-λ) (1-ᾱ)/ᾱ, the variance of z'_i / √ᾱ about x_i: [B, N, 1, 1, 1]."""
        a = self._alphas_cumprod(t, z)
        own = self._own_share(z.shape[1], lam, z.device).view(-1, 1, 1, 1)
        return own * (1 - a) / a

    def _own_share(self, num_frames: int, lam: Lam | None, device: torch.device) -> Tensor:
        """1-λ [N], the share of a frame's noise that is its own.

        Where λ = 1 a frame has no noise of its own, and r̂ no meaning; a floor keeps it finite.
        """
        weights = _weights_on_device(self.lam if lam is None else lam, num_frames, device)
        return (1 - weights).clamp(min=1e-4)

    def _coefficients(self, a: Tensor, num_frames: int, lam: Lam | None) -> tuple[Tensor, ...]:
        variance = self._own_share(num_frames, lam, a.device).double() * (1 - a) / a
        total, one = self.data_std**2 + variance, torch.ones_like(a)
        return a.rsqrt(), total.rsqrt(), self.data_std**2 / total, one, variance.rsqrt()

    def _change(self, z: Tensor, t: Tensor, lam: Lam | None, conditions: dict):
        """x̂_m [B, 1, C, H, W]; z'_i / √ᾱ - x̂_m; and x̂_i - x̂_m, which is 0 in frame m."""
        frames = z / self._alphas_cumprod(t, z).sqrt()  # x_i + σ r_i, and x̂_m
        m, channels = base_index(z.shape[1]), z.shape[2]
        base = frames[:, m : m + 1]
        difference = frames - base
        total = self.data_std**2 + self._variance(z, t, lam)
        condition = (base * 2).expand_as(frames)  # about unit variance
        out = self.unet(torch.cat([difference * total.rsqrt(), condition], 2), t, **conditions)
        paint, logits = out.to(z.dtype).split([channels, 3], dim=2)
        _, seen, painted = logits.softmax(2).split(1, dim=2)  # the first: base frame, no change
        shrunk = difference * (self.data_std**2 / total)
        change = seen * shrunk + painted * (paint - base)
        others = torch.arange(z.shape[1], device=z.device, dtype=torch.int64) != m
        return base, difference, change * others.view(-1, 1, 1, 1)


def _weights_on_device(lam: Lam, num_frames: int, device: torch.device) -> Tensor:
    """`frame_weights`; of a number, or a tensor on the device, without a copy from the host.

    A captured step can neither copy from the host nor read values of the device.
    """
    if not (isinstance(lam, Tensor) and lam.device == device and lam.shape == (num_frames,)):
        return frame_weights(lam, num_frames, device=device)
    weights = lam.to(torch.float32, copy=True)
    weights[base_index(num_frames)].fill_(1.0)
    return weights


def _check_channels(name: str, unet: UNet, inputs: int, weights: int) -> None:
    """ValueError unless the UNet takes `inputs` images, and outputs one and `weights` weights."""
    given, made = unet.config.in_channels, unet.config.out_channels
    if given % inputs or made != given // inputs + weights:
        raise ValueError(
            f"{name}: needs a UNet of {inputs} C inputs and C + {weights} outputs, "
            f"got {given} and {made}"
        )
