"""An adversary for the autoencoder's decoder: a network that tells real pictures from decoded ones.

Absolute errors are least for the median of what a latent may stand for, which is too soft. The
decoder is therefore also pushed to where this network takes its pictures for real ones. That is a
patch discriminator (Isola et al. 2017, arXiv 1611.07004): one score for every patch of 36 x 36
pixels. Its loss is the hinge loss, and the decoder's is minus the mean score. Beside a picture it
sees the picture's fine waves, eight times as large: they are what decoded pictures lack, and are so
small that it would be long in finding them. Noise of one grey level is added to real and decoded
ones alike, so that it cannot tell them by the rounding of real ones to 8 bits.

The weights are divided by their largest singular value (Miyato et al. 2018, arXiv 1802.05957),
which keeps scores from running away; a gradient penalty would cost a second backward pass.

The decoder's two gradients differ in scale, and the scale of one drifts as the discriminator
learns. So it is set at every step, by their norms at the decoder's last convolution (Esser et al.
2021, arXiv 2012.09841, equation 7). Nothing here waits for the device.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.empty import new_weights
from .options import TrainingOptions
from .updates import adam_states, adamw

_WIDTHS = (6, 64, 128, 192)
_STRIDES = (2, 2, 1)
_FINE = 8.0  # of the picture less its means over 3 x 3 pixels, which are of its size then
_NOISE = 2 / 255  # standard deviation: a grey level
_SLOPE = 0.2  # of LeakyReLU below 0
_FIRST_ITERATIONS = 20  # of the power method, before the first step
_ALONE = 0.05  # share of the steps, the first, in which only the discriminator learns
_LARGEST_SCALE = 1e4  # of the decoder's second gradient
_TINY = 1e-12  # of norms that are divided by


class Adversary:
    """Owns a discriminator and its optimizer.

    last: the weight of the decoder's last convolution
    """

    def __init__(self, options: TrainingOptions, last: Tensor, device: torch.device | str):
        self.options, self.last = options, last
        with new_weights():
            self.network = Discriminator().to(device)
        self.parameters = list(self.network.parameters())
        self.optimizer = adamw(self.parameters, options.learning_rate, (0.5, 0.9), 0.0)

    def step(
        self, real: Tensor, decoded: Tensor, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the discriminator, the step-th from 0.

        real, decoded: [B, 3, H, W] in -1..1, decoded with its graph; loss: the decoder's own

        Returns the decoder's second loss, scaled, of which only the gradient has a meaning; and
        the losses of both sides for the log.
        """
        options = self.options
        self.network.iterate()
        fake = decoded.detach().requires_grad_()
        seen = torch.cat([real, fake])
        seed = int(np.random.default_rng((options.seed, step, 1)).integers(2**62))
        generator = torch.Generator(seen.device).manual_seed(seed)
        noise = torch.randn(
            seen.shape, device=seen.device, generator=generator, dtype=torch.float32
        )
        with torch.autocast(fake.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            scores = self.network(seen + _NOISE * noise).float()
        of_real, of_fake = scores.chunk(2)
        fooled = -of_fake.mean()
        told = hinge(of_real, of_fake)
        share = torch.zeros_like(loss)
        if step >= _ALONE * options.steps:
            (push,) = torch.autograd.grad(fooled, fake, retain_graph=True)
            share = scaled(push, decoded, loss, self.last, options.adversary)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate_at(step)
        gradients = torch.autograd.grad(told, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.reshape(-1).view_as(parameter)  # AdamW wants its strides
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return share, {"adversary": fooled.detach(), "discriminator": told.detach()}

    def state(self) -> list[Tensor]:
        """All that it goes on from: weights, singular vectors and the optimizer's moments."""
        moments = adam_states(self.optimizer).values()
        return [*self.parameters, *self.network.buffers(), *(x for xs in moments for x in xs)]


class Discriminator(nn.Module):
    """forward(pictures [B, 3, H, W] in -1..1) -> scores [B, 1, H/4 - 2, W/4 - 2], high for real.

    Takes any height and width of at least 12.
    """

    def __init__(self):
        super().__init__()
        pairs = zip(pairwise(_WIDTHS), _STRIDES, strict=True)
        self.layers = nn.ModuleList(_Conv(a, b, stride) for (a, b), stride in pairs)
        self.scores = _Conv(_WIDTHS[-1], 1, 1)
        for _ in range(_FIRST_ITERATIONS):
            self.iterate()

    def forward(self, x: Tensor) -> Tensor:
        means = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = torch.cat([x, _FINE * (x - means)], 1).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), _SLOPE)
        return self.scores(x)

    def iterate(self) -> None:
        """One iteration of the power method for every layer, before a step."""
        for layer in (*self.layers, self.scores):
            layer.iterate()


class _Conv(nn.Conv2d):
    """4x4, its weight [out, in, 4, 4] divided by the largest singular value of [out, in * 16].

    left, right: the singular vectors, [out] and [in * 16]
    """

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__(channels, out_channels, 4, stride=stride, padding=1)
        self.register_buffer(
            "left", F.normalize(torch.randn(out_channels, dtype=torch.float32, device="cpu"), dim=0)
        )
        self.register_buffer("right", torch.zeros(channels * 16, dtype=torch.float32, device="cpu"))

    @torch.no_grad()
    def iterate(self) -> None:
        matrix = self.weight.flatten(1)
        self.right.copy_(F.normalize(self.left @ matrix, dim=0))
        self.left.copy_(F.normalize(matrix @ self.right, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in fp32, as the weight is
            largest = torch.dot(self.left, self.weight.flatten(1) @ self.right)
            weight = self.weight / largest
        return self._conv_forward(x, weight, self.bias)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss on scores of any shape: 0 above 1 for real ones, below -1 for fake.

    2 for scores that tell nothing.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def scaled(push: Tensor, decoded: Tensor, loss: Tensor, last: Tensor, weight: float) -> Tensor:
    """A scalar whose gradient with respect to decoded is push [B, 3, H, W] times a factor.

    By that factor the gradients of this scalar and of loss with respect to last have norms of
    ratio `weight`. The factor is at most 10,000. Graphs are kept.
    """
    (own,) = torch.autograd.grad(loss, last, retain_graph=True)
    (second,) = torch.autograd.grad(decoded, last, push, retain_graph=True)
    ratio = own.float().norm() / (second.float().norm() + _TINY)
    factor = (weight * ratio).clamp(max=_LARGEST_SCALE)
    return factor * (push * decoded).sum()
