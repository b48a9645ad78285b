"""What model_input and noise_estimate share: the coefficients of a step, and their checks.

A generator (vfengine/models/denoisers.py) wraps a UNet as an estimator of noise. What it multiplies
by depends on the timestep, and on λ of a frame. A loop knows all its timesteps, so these numbers
are a small table, from which the two ops read a row by the loop's counter:

    coeffs  fp32 [S, N, 5]: unit, input, shrink, signal and gain of each step and frame

In terms of them, with C channels a frame, m = N // 2, and all sums in fp32:

    f_i = unit z_i                                     frames; d_i = f_i, or of residuals f_i - f_m
    x_i = input d_i, of residuals followed by 2 f_m    what the UNet sees, of about unit variance
    (paint, w) = UNet(x)                               C channels, then the weights of a blend
    ε_i = gain d_i + signal paint                      no weight: the UNet predicts ε or v
    ε_i = gain (d_i - signal x̂_i)                      one weight, or three of residuals:
    x̂_i = (1 - σ(w)) paint + σ(w) shrink d_i
    x̂_i = s_1 shrink d_i + s_2 (paint - f_m),  s = softmax(w);  in frame m ε = 0
"""

import torch
from torch import Tensor

from vfengine.ops._dispatch import check_dtype, check_tensor
from vfengine.ops._frame_ops import row_of

COLUMNS = ("unit", "input", "shrink", "signal", "gain")
WEIGHTS = (0, 1, 3)  # channels that a UNet may put out beside the paint; 3: of residuals


def check_clip(op: str, z: Tensor, coeffs: Tensor, step: Tensor) -> None:
    """Raise unless dtypes, shapes, strides and devices fit; looks at no memory."""
    check_dtype(op, "z", z)
    if z.ndim != 5 or z.numel() == 0:
        raise ValueError(f"{op}: z must be [B, N, C, H, W] and not empty, got {list(z.shape)}")
    check_tensor(op, "z", z, z.shape, z.dtype, z.device)
    steps = coeffs.shape[0] if coeffs.ndim else 0
    shape = (steps, z.shape[1], len(COLUMNS))
    check_tensor(op, "coeffs", coeffs, shape, torch.float32, z.device)
    check_tensor(op, "step", step, (1,), torch.int32, z.device)


def patch_size(op: str, name: str, rows: Tensor, z: Tensor) -> int:
    """p of rows [copies * B * N, H/p, W/p, K] of a clip; ValueError for another shape."""
    images, (height, width) = z.shape[0] * z.shape[1], z.shape[-2:]
    if rows.ndim == 4 and rows.numel() > 0 and rows.shape[0] in (images, 2 * images):
        patch = height // rows.shape[1]
        if (height, width) == (rows.shape[1] * patch, rows.shape[2] * patch):
            return patch
    raise ValueError(
        f"{op}: {name} must be [{images} or {2 * images}, {height}/p, {width}/p, K], "
        f"got {list(rows.shape)}"
    )


def coefficients(op: str, coeffs: Tensor, step: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """This step's five numbers, each [N, 1, 1, 1], for references; ValueError for no such step."""
    row = row_of(op, coeffs, step).to(dtype)
    return [column.view(-1, 1, 1, 1) for column in row.unbind(-1)]
