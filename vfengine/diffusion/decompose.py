"""Decomposed diffusion (VideoFusion, arXiv 2303.08320): noise law, forward process, joint loss.

Symbols: x_i frames of a clip, m = N // 2 the base frame, λ_i the share of frame i's noise that all
frames have in common (λ_m = 1), b that common noise, r_i each frame's own. Equation numbers are
the lines of this list; the code below cites them.

    (1) ε_i  = √λ_i b + √(1-λ_i) r_i                          noise, and the networks' combination
    (2) z_i  = √ᾱ_t x_i + √(1-ᾱ_t) ε_i                        forward process
    (3) z'_i = z_i - √λ_i √(1-ᾱ_t) b̂                          removal;  b̂ = base_model(z_m, t)
    (4) L_m  = ‖b - b̂‖²                                       base loss
    (5) L_i  = ‖ε_i - √λ_i sg[b̂] - √(1-λ_i) r̂_i‖²     others;  r̂ = residual_model(z', t)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .schedule import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]  # (z, t int64 [B]) -> noise of the shape of z
Lam = float | Sequence[float] | Tensor  # λ: one number, or one per frame


def base_index(num_frames: int) -> int:
    """m = N // 2, the frame whose noise is b alone. Raises ValueError for N < 1."""
    if num_frames < 1:
        raise ValueError(f"a clip needs at least one frame, got {num_frames}")
    return num_frames // 2


def frame_weights(
    lam: Lam,
    num_frames: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """λ as fp32 [N]; the base frame's entry is 1 whatever is passed.

    lam: one number for all frames, or N of them (sequence or tensor), each in [0, 1]

    Raises ValueError for another length or a value outside [0, 1].
    """
    m = base_index(num_frames)
    if isinstance(lam, float | int) and not isinstance(lam, bool) and 0 <= lam <= 1:
        device = "cpu" if device is None else device  # written there: a captured step copies none
        weights = torch.full((num_frames,), lam, dtype=torch.float32, device=device)
        weights[m].fill_(1.0)
        return weights
    try:
        dtype = None if hasattr(lam, "dtype") or isinstance(lam, bool) else torch.float32
        weights = torch.as_tensor(lam, dtype=dtype, device=getattr(lam, "device", "cpu")).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lam must be a number or [{num_frames}], got {lam!r}") from error
    if weights.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"lam must be a number or [{num_frames}], got {weights.dtype}")
    weights = weights.to("cpu", torch.float32)
    if weights.ndim > 1 or (weights.ndim == 1 and weights.numel() != num_frames):
        raise ValueError(f"lam must be a number or [{num_frames}], got {list(weights.shape)}")
    if not bool(((weights >= 0) & (weights <= 1)).all()):  # also false for NaN
        raise ValueError(f"lam must be in [0, 1], got {weights.tolist()}")
    weights = weights.expand(num_frames).clone()
    weights[m] = 1.0
    return weights.to(device, non_blocking=True)


def _shares(lam: Lam, like: Tensor) -> tuple[Tensor, Tensor]:
    """√λ_i and √(1-λ_i), both [N, 1, 1, 1] on the device of like [B, N, C, H, W].

    In float64 when like is float64, else in fp32: half-precision clips keep an fp32 share.
    """
    if like.ndim != 5:
        raise ValueError(f"expected a clip [B, N, C, H, W], got {list(like.shape)}")
    weights = frame_weights(lam, like.shape[1], device=like.device).view(-1, 1, 1, 1).double()
    at_least_fp32 = torch.promote_types(like.dtype, torch.float32)
    return weights.sqrt().to(at_least_fp32), (1.0 - weights).sqrt().to(at_least_fp32)


def combine(base: Tensor, residual: Tensor, lam: Lam) -> Tensor:
    """Eq. (1): ε_i = √λ_i b + √(1-λ_i) r_i; of noise, or of the networks' estimates.

    base: [B, C, H, W], residual: [B, N, C, H, W]; returns [B, N, C, H, W], frame m equal to base
    """
    base_share, residual_share = _shares(lam, residual)
    _check_image("base", base, residual)
    dtype = torch.promote_types(base.dtype, residual.dtype)
    return (base_share * base.unsqueeze(1) + residual_share * residual).to(dtype)


def add_noise(x: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Eq. (2): z = √ᾱ_t x + √(1-ᾱ_t) ε.

    x, eps: [B, N, C, H, W] or [B, C, H, W], equal shapes; t: int64 [B]

    Raises ValueError for unequal shapes or a t outside the schedule.
    """
    if x.shape != eps.shape:
        raise ValueError(f"add_noise: x {list(x.shape)} and eps {list(eps.shape)} differ in shape")
    signal, noise = schedule.signal_and_noise(t, x)
    return (signal * x + noise * eps).to(torch.promote_types(x.dtype, eps.dtype))


def remove_base(
    z: Tensor,
    b_hat: Tensor,
    lam: Lam,
    t: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """Eq. (3): z'_i = z_i - √λ_i √(1-ᾱ_t) b̂.

    z: [B, N, C, H, W], b_hat: [B, C, H, W], t: int64 [B]; returns [B, N, C, H, W]
    """
    base_share, _ = _shares(lam, z)
    _check_image("b_hat", b_hat, z)
    _, noise = schedule.signal_and_noise(t, z)
    dtype = torch.promote_types(z.dtype, b_hat.dtype)
    return (z - base_share * noise * b_hat.unsqueeze(1)).to(dtype)


def joint_loss(
    base_model: Model,
    residual_model: Model,
    x: Tensor,
    t: Tensor,
    base_noise: Tensor,
    residual_noise: Tensor,
    *,
    schedule: NoiseSchedule,
    lam: Lam,
    stop_gradient: bool = True,
    exact_base: bool | Tensor | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    cell_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The joint training loss, eq. (4) and (5): per-sample means, base [B] and residual [B].

    base_model:     (z_m [B, C, H, W], t [B]) -> b̂; called once, on the base frames
    residual_model: (z' [B, N, C, H, W], t [B]) -> r̂
    x:              clips [B, N, C, H, W];  t: int64 [B]
    base_noise:     b [B, C, H, W];  residual_noise: r [B, N, C, H, W]
    stop_gradient:  sg[b̂] in (5) and in the z' it is fed; False lets (5) train the base network too
    exact_base:     bool, or bool [B]: samples on which (3) and (5) take the true b for b̂, so that
                    the residual network also learns base_path="clean"
    weights:        (base [B], residual [B]) factors on the squared errors, such as (1-ᾱ_t)/ᾱ_t for
                    errors of the predicted clean frames
    cell_weights:   [B, N, 1, H, W] factors on the squared errors, pixel by pixel

    residual_loss averages over the frames that are not the base frame (0 when there is none).
    Raises ValueError for shapes that do not fit, of arguments or of a model's output.
    """
    if x.ndim != 5 or residual_noise.shape != x.shape:
        raise ValueError(
            f"joint_loss: x and residual_noise must both be [B, N, C, H, W], "
            f"got {list(x.shape)} and {list(residual_noise.shape)}"
        )
    cells = (
        torch.ones(1, 1, 1, 1, 1, device=x.device, dtype=torch.float32)
        if cell_weights is None
        else cell_weights
    )
    if cell_weights is not None and cells.shape != (*x.shape[:2], 1, *x.shape[3:]):
        raise ValueError(
            f"joint_loss: cell_weights must be [B, N, 1, H, W], got {list(cells.shape)} for x "
            f"{list(x.shape)}"
        )
    m = base_index(x.shape[1])
    eps = combine(base_noise, residual_noise, lam)  # (1)
    z = add_noise(x, eps, t, schedule)  # (2)

    b_hat = base_model(z[:, m], t)
    _check_image("the base model's output", b_hat, x)
    of_base = cells.expand(-1, x.shape[1], -1, -1, -1)[:, m]
    base_loss = ((base_noise - b_hat).square() * of_base).flatten(1).mean(1)  # (4)

    removed = b_hat.detach() if stop_gradient else b_hat  # sg[b̂]
    removed = _exact_where(exact_base, base_noise, removed)
    r_hat = residual_model(remove_base(z, removed, lam, t, schedule), t)  # (3)
    if r_hat.shape != x.shape:
        raise ValueError(
            f"the residual model's output must be {list(x.shape)}, got {list(r_hat.shape)}"
        )
    error = (eps - combine(removed, r_hat, lam)).square() * cells  # (5)
    error = error.flatten(2).mean(2)  # [B, N]
    residual_loss = mean_of_others(error)

    if weights is not None:
        return base_loss * weights[0], residual_loss * weights[1]
    return base_loss, residual_loss


def mean_of_others(error: Tensor) -> Tensor:
    """The mean over the frames that are not the base frame, of [B, N]; 0 where there is none."""
    m = base_index(error.shape[1])
    others = torch.cat([error[:, :m], error[:, m + 1 :]], 1)
    return others.sum(1) / max(others.shape[1], 1)


def _exact_where(exact: bool | Tensor | None, exact_b: Tensor, b_hat: Tensor) -> Tensor:
    """b on the samples marked exact, b̂ on the others."""
    if exact is None or exact is False:
        return b_hat
    mask = torch.as_tensor(exact, device=exact_b.device)
    if mask.dtype != torch.bool or mask.shape not in ((), exact_b.shape[:1]):
        raise ValueError(
            f"exact_base must be a bool or bool [{exact_b.shape[0]}], "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return torch.where(mask.reshape(-1, 1, 1, 1), exact_b, b_hat)


def _check_image(name: str, image: Tensor, clip: Tensor) -> None:
    """ValueError unless image [B, C, H, W] is one frame of clip [B, N, C, H, W]."""
    expected = (clip.shape[0], *clip.shape[2:])
    if image.shape != expected:
        raise ValueError(f"{name} must be {list(expected)}, got {list(image.shape)}")
