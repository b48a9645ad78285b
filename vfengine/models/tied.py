"""A generator in a loop on CUDA: two ops around the layers of its UNet.

What depends on timestep, label and frame alone is computed once for all steps of the loop, of which
a step reads its row: the coefficients of the two ops, and the UNet's modulation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops

if TYPE_CHECKING:
    from ..sampling.features import Kept
    from ..sampling.in_loop import Steps

MAX_BYTES = 256 << 20  # of all steps' modulation; beyond, each step computes its own


class TiedGenerator:
    """(z, t) -> ε̂ in the dtype of z, guided, of the step that the loop's counter says.

    unet:        `modulation`, `rows` and `input_width` are those of a CudaUNet (vfengine/plan)
    coeffs:      fp32 [S, N, 5] (vfengine/ops/_generator_ops.py)
    scale:       s of guidance; 1 is off
    labels:      int64 [B], or [2 B] under guidance; None: the UNet takes none
    context:     [B, M, C'], or [2 B, M, C'] under guidance; None: the UNet takes none
    conditioned: whether the base frame is an input for every frame
    guidance:    the guidance scale, of a UNet whose input it is; else None

    Labels and context are buffers whose values may change between runs.

    Raises ValueError where the UNet does.
    """

    def __init__(
        self,
        unet: nn.Module,
        steps: Steps,
        coeffs: Tensor,
        scale: float,
        *,
        labels: Tensor | None,
        context: Tensor | None,
        conditioned: bool,
        guidance: float | None = None,
    ) -> None:
        self.unet, self.coeffs, self.scale = unet, coeffs, scale
        self.labels, self.context, self.guidance = labels, context, guidance
        self.timesteps, self.counter, self.conditioned = steps.timesteps, steps.counter, conditioned
        self.samples = steps.shape[0] * (1 if scale == 1.0 else 2)  # of a call of the UNet
        self.frames = steps.shape[1] if unet.config.is_video else 1
        channels = steps.shape[-3] * (2 if conditioned else 1)
        size = (self.samples, *steps.shape[1:-3], channels, *steps.shape[-2:])
        t = torch.empty(self.samples, dtype=torch.int64, device="meta")
        unet.check_inputs(torch.empty(size, device="meta", dtype=torch.float32), t, context, labels)
        first = self._modulation(self.timesteps[:1])
        self.modulation: Tensor | None = None  # of all steps
        if first.nbytes * len(self.timesteps) <= MAX_BYTES:
            self.modulation = first.new_zeros(len(self.timesteps), *first.shape[1:])

    def start(self) -> None:
        """Computes the modulation of all steps, under the present labels."""
        if self.modulation is not None:
            self.modulation.copy_(self._modulation(self.timesteps))

    def __call__(self, z: Tensor, t: Tensor, kept: Kept | None = None) -> Tensor:
        clips = z if self.unet.config.is_video else z.unsqueeze(1)
        patch = self.unet.config.patch_size
        height, width = z.shape[-2] // patch, z.shape[-1] // patch
        images, channels = self.samples * self.frames, self.unet.input_width
        x = z.new_empty(images, height, width, channels, dtype=self.unet.dtype)
        step = self.coeffs, self.counter
        x = ops.model_input(clips, *step, x, conditioned=self.conditioned)
        if self.modulation is None:
            modulation = self._modulation(self.timesteps.index_select(0, self.counter))
        else:
            modulation = self.modulation.index_select(0, self.counter)
        rows = self.unet.rows(x, modulation[0], self.frames, self.context, kept)
        return ops.noise_estimate(clips, rows, *step, guidance_scale=self.scale).view(z.shape)

    def _modulation(self, timesteps: Tensor) -> Tensor:
        """The UNet's modulation at these timesteps [S'], fp32 [S', rows, columns]."""
        count, labels = len(timesteps), self.labels
        if labels is not None:
            labels = labels.repeat(count, *[1] * (labels.dim() - 1))
        t = timesteps.repeat_interleave(self.samples)
        modulation = self.unet.modulation(t, labels, self.frames, self.guidance)
        return modulation.view(count, -1, modulation.shape[-1])
