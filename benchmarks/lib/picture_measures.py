"""What an eye sees at once and no classifier minds: blurred frames, and speckled figures.

Both measures are of one clip, and mean something beside those of real clips of the same scenes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vfengine.media.pictures import pixels_to_network

_MOVED = 0.16  # of -1..1: how far a pixel of the figure is from its median over time
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def fine_share(clips: np.ndarray, wave: float) -> np.ndarray:
    """The share of the energy of brightness that is in waves shorter than `wave` pixels, [M].

    clips: uint8 [M, N, H, W, 3];  returns float64 in 0..1

    A frame's mean has no part in it. A Hann window keeps the picture's rim out. A clip's share is
    that of its frames together.
    """
    height, width = clips.shape[2:4]
    window = torch.outer(_hann(height), _hann(width))
    down, across = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    fine = torch.hypot(down[:, None], across) > 1 / wave
    shares = []
    for clip in clips:
        light = _brightness(_planes(clip))
        light = light - light.mean((1, 2), keepdim=True)
        energy = torch.fft.fft2(light * window).abs().square().sum(0).double()
        shares.append(float(energy[fine].sum() / energy.sum().clamp(min=1e-12)))
    return np.array(shares)


def speckle(clips: np.ndarray) -> np.ndarray:
    """How much the colour of limbs varies from a pixel to its neighbours: mean and median, [M, 2].

    clips: uint8 [M, N, H, W, 3];  returns float64, NaN for a clip in which nothing moves

    It is the variance of the two chroma channels (range 2) in windows of 3 x 3 pixels that lie
    inside the moving figure. Most of the mean is at the seams of garments, which blur makes less.
    The median is of plain cloth, where a hardly visible grain multiplies it. So one needs both.
    """
    return np.array([_speckle(_planes(clip)) for clip in clips])


def moving(planes: Tensor) -> Tensor:
    """Where a clip differs from its median over time, two pixels at the rim left out.

    planes: [N, 3, H, W] in -1..1;  returns bool [N, H, W]

    It is the figure where it moves. It needs no knowledge of how the clip was made, and so is the
    same for real and for generated clips.
    """
    differs = (planes - planes.median(0).values).abs().amax(1) > _MOVED
    return F.max_pool2d((~differs).float()[:, None], 5, 1, 2)[:, 0] == 0


def _speckle(planes: Tensor) -> tuple[float, float]:
    red, _, blue = planes.unbind(1)
    light = _brightness(planes)
    chroma = torch.stack([(blue - light) / 1.772, (red - light) / 1.402], 1)
    mean, square = (F.avg_pool2d(values, 3, 1, 1) for values in (chroma, chroma.square()))
    variance = (square - mean.square()).clamp(min=0).sum(1)
    inside = variance[moving(planes)].double()
    return float(inside.mean()), float(inside.median())


def _planes(clip: np.ndarray) -> Tensor:
    return pixels_to_network(torch.from_numpy(clip))


def _brightness(planes: Tensor) -> Tensor:
    return sum(weight * planes[:, i] for i, weight in enumerate(_LUMA))


def _hann(size: int) -> Tensor:
    return torch.hann_window(size, periodic=False)
