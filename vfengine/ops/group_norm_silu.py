"""group_norm_silu: group norm, scale and shift and SiLU in one pass after its sums.

    y = SiLU(((x - μ) / √(σ² + ε) weight + bias) (1 + scale) + shift)

μ, σ² of a group are those of its channels at all pixels of num_frames consecutive images.
Kernels: csrc/group_norm_silu.h, csrc/{cpu,cuda}/group_norm_silu.*, kernels/group_norm_silu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from vfengine.ops._dispatch import (
    DTYPE_NUMBERS,
    address,
    check_dtype,
    check_kinds,
    check_no_grad,
    check_overlap,
    check_table,
    choose_backend,
    register,
    run_native,
)

_NAME = "group_norm_silu"
_CHUNKS = 512  # of rows, in a whole batch: what fills a large GPU, and costs a small one nothing
_MIN_CHUNK = 32  # rows


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    eps: float = 1e-5,
    num_frames: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """SiLU(norm(x) (1 + scale) + shift) (Wu and He 2018; Dhariwal and Nichol 2021).

    x:            [B, C, H, W] in channels_last memory, fp32, fp16 or bf16
    num_groups:   divides C + C2
    weight, bias: fp32 [C + C2], or None for 1 and 0
    second:       [B, C2, H, W], as x: channels that follow those of x, a concatenation that is
                  never made; None: C2 = 0. A group may have channels of both
    num_frames:   images that share their statistics, one after another; divides B
    scale, shift: fp32 [R, C + C2], both or neither; row r is of images r B/R to (r + 1) B/R - 1.
                  Rows may be apart, as slices of a wider table are, both alike
    silu:         False leaves SiLU out
    out:          [B, C + C2, H, W], as x, memory that no argument shares; None: allocated
    backend:      "auto", "cpu", "cuda", "triton" or "reference" (vfengine/ops/_dispatch.py)

    Returns out. Sums are in fp32, of centred squares (σ² is never E[x²] - μ²), in an order that
    depends on the shape alone: the same bits at every call of one backend.

    Raises TypeError for a dtype, ValueError for a shape, layout, device or shared memory that the
    kernels cannot take, and under autograd: the op has no derivative.
    """
    others = {"num_groups": num_groups, "eps": eps, "num_frames": num_frames, "silu": silu}
    plain = check_kinds(_NAME, {"x": x}, **others, backend=backend)
    num_groups, eps, num_frames, silu, backend = plain
    given = {"second": second, "weight": weight, "bias": bias, "scale": scale, "shift": shift}
    given["out"] = out
    check_kinds(_NAME, {name: t for name, t in given.items() if t is not None})
    if out is None:
        out = _make_out(x, second)
    workspace = None
    if x.is_cuda and _has_plan(out, num_frames):  # made here, where captures and fakes see it
        workspace = make_workspace(out, num_groups, num_frames)
    tables = (weight, bias, scale, shift)
    _OP(x, second, *tables, num_groups, eps, num_frames, silu, backend, out, workspace)
    return out


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    eps: float = 1e-5,
    num_frames: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The formula of `group_norm_silu` in plain PyTorch, in fp32, or in fp64 for fp64 pictures.

    Returns a new tensor in the dtype it was computed in.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch = len(x)
    x = x if second is None else torch.cat([x, second], 1)
    y = x.to(dtype).reshape(batch // num_frames, num_frames, num_groups, -1)
    centred = y - y.mean((1, 3), keepdim=True)
    variance = centred.square().mean((1, 3), keepdim=True)
    y = (centred / (variance + eps).sqrt()).reshape(x.shape)
    if weight is not None:
        y = y * weight.to(dtype).view(-1, 1, 1)
    if bias is not None:
        y = y + bias.to(dtype).view(-1, 1, 1)
    if scale is not None:
        scale, shift = (
            table.to(dtype).repeat_interleave(batch // len(table), 0)[..., None, None]
            for table in (scale, shift)
        )
        y = y * (1 + scale) + shift
    if silu:
        y = y * y.sigmoid()
    return y


def chunk_plan(images: int, rows: int, num_frames: int) -> tuple[int, int]:
    """Chunks that each set of statistics is cut into on a GPU, and the rows (pixels) of one."""
    sets, set_rows = images // num_frames, rows * num_frames
    chunks = max(1, min(_CHUNKS // sets, set_rows // _MIN_CHUNK))
    chunk_rows = -(-set_rows // chunks)
    return -(-set_rows // chunk_rows), chunk_rows


def make_workspace(out: Tensor, num_groups: int, num_frames: int) -> Tensor:
    """fp32: (mean, squares) of [set, chunk, channel], then (mean, 1/deviation) of [set, group]."""
    size = _workspace_size(out, num_groups, num_frames)
    return torch.empty(size, dtype=torch.float32, device=out.device)


def _workspace_size(out: Tensor, num_groups: int, num_frames: int) -> int:
    images, channels, height, width = out.shape
    chunks, _ = chunk_plan(images, height * width, num_frames)
    return 2 * (images // num_frames) * (chunks * channels + num_groups)


def _has_plan(out: Tensor, num_frames: int) -> bool:
    """Whether `chunk_plan` has a meaning; `_check` names what is wrong where it has none."""
    return out.ndim == 4 and out.numel() > 0 and 0 < num_frames <= out.shape[0]


def _make_out(x: Tensor, second: Tensor | None) -> Tensor:
    """Memory for the result; `_check` names what is wrong where there is none."""
    if second is None:
        return torch.empty_like(x, memory_format=torch.channels_last if x.ndim == 4 else None)
    if x.ndim != 4 or second.ndim != 4:
        return torch.empty_like(x)
    images, channels, height, width = x.shape
    shape = (images, channels + second.shape[1], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _run(
    x,
    second,
    weight,
    bias,
    scale,
    shift,
    num_groups,
    eps,
    num_frames,
    silu,
    backend,
    out,
    workspace,
):
    tables, numbers = (weight, bias, scale, shift), (num_groups, eps, num_frames, silu)
    _check(x, second, *tables, *numbers, backend, out, workspace)
    increment_version(out)  # as torch's own ops do, so that autograd sees the write
    named = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    check_overlap(_NAME, out, {"x": x, "second": second, **named})
    backend = choose_backend(_NAME, backend, x.device)
    if backend == "reference":
        options = {"second": second, "eps": eps, "num_frames": num_frames, "silu": silu}
        out.copy_(group_norm_silu_reference(x, num_groups, **named, **options))
        return
    if backend != "cpu" and workspace is None:  # CPU tensors, in tests
        workspace = make_workspace(out, num_groups, num_frames)
    if backend == "triton":
        from vfengine.kernels.group_norm_silu import launch

        launch(x, second, *tables, *numbers, out, workspace)
        return
    images, channels, height, width = x.shape
    chunked = {}
    if backend == "cuda":
        _, chunk_rows = chunk_plan(images, height * width, num_frames)
        chunked = {"workspace": workspace.data_ptr(), "chunk_rows": chunk_rows}
    run_native(
        _NAME,
        backend,
        x,
        x=x.data_ptr(),
        x2=address(second),
        **{name: address(table) for name, table in named.items()},
        modulation_stride=0 if scale is None else scale.stride(0),
        modulation_images=1 if scale is None else images // len(scale),
        out=out.data_ptr(),
        images=images,
        rows=height * width,
        channels=channels,
        channels2=out.shape[1] - channels,
        groups=num_groups,
        num_frames=num_frames,
        eps=eps,
        silu=silu,
        dtype=DTYPE_NUMBERS[x.dtype],
        **chunked,
    )


def _check(
    x,
    second,
    weight,
    bias,
    scale,
    shift,
    num_groups,
    eps,
    num_frames,
    silu,
    backend,
    out,
    workspace,
):
    check_dtype(_NAME, "x", x)
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"{_NAME}: x must be [B, C, H, W] and not empty, got {list(x.shape)}")
    images, channels = x.shape[:2]
    pictures = {"x": (x, channels)}
    if second is not None:
        if second.ndim != 4 or second.numel() == 0:
            raise ValueError(
                f"{_NAME}: second must be [B, C2, H, W] and not empty, got {list(second.shape)}"
            )
        pictures["second"] = (second, second.shape[1])
        channels += second.shape[1]
    pictures["out"] = (out, channels)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{_NAME}: num_groups must divide {channels} channels, got {num_groups}")
    if num_frames < 1 or images % num_frames:
        raise ValueError(f"{_NAME}: num_frames must divide {images} images, got {num_frames}")
    if not eps >= 0:
        raise ValueError(f"{_NAME}: eps must not be negative, got {eps}")
    for name, (tensor, depth) in pictures.items():
        _check_picture(name, tensor, depth, x)
    check_table(_NAME, "weight", weight, (channels,), x)
    check_table(_NAME, "bias", bias, (channels,), x)
    if (scale is None) != (shift is None):
        raise ValueError(f"{_NAME}: expected scale and shift, or neither")
    if scale is not None:
        _check_modulation(scale, shift, out)
    size = _workspace_size(out, num_groups, num_frames)
    check_table(_NAME, "workspace", workspace, (size,), x)
    check_no_grad(_NAME, x, second, weight, bias, scale, shift, out)


def _check_modulation(scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """Raise unless these are fp32 [R, C] where out is, R divides its images, and rows are alike."""
    images, channels = out.shape[:2]
    for name, table in (("scale", scale), ("shift", shift)):
        if table.dtype is not torch.float32:
            raise TypeError(f"{_NAME}: {name} must be torch.float32, got {table.dtype}")
        if table.device != out.device:
            raise ValueError(f"{_NAME}: {name} must be on {out.device}, got {table.device}")
        shape = table.shape
        if len(shape) != 2 or shape[1] != channels or not shape[0] or images % shape[0]:
            raise ValueError(
                f"{_NAME}: {name} must be [{images}, {channels}], or have fewer rows that divide "
                f"{images}, got {list(shape)}"
            )
        if (channels > 1 and table.stride(1) != 1) or table.stride(0) < channels:
            raise ValueError(f"{_NAME}: rows of {name} must be contiguous, got {table.stride()}")
    if scale.shape != shift.shape or (len(scale) > 1 and scale.stride(0) != shift.stride(0)):
        raise ValueError(
            f"{_NAME}: scale and shift must have the same rows, got {list(scale.shape)} with "
            f"strides {scale.stride()} and {list(shift.shape)} with {shift.stride()}"
        )


def _check_picture(name: str, tensor: Tensor, channels: int, x: Tensor) -> None:
    """Raise unless `tensor` has these channels, else is like x, and is in channels_last memory."""
    if tensor.dtype is not x.dtype:
        raise TypeError(f"{_NAME}: {name} must be {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{_NAME}: {name} must be on {x.device}, got {tensor.device}")
    shape = [x.shape[0], channels, *x.shape[2:]]
    if list(tensor.shape) != shape:
        raise ValueError(f"{_NAME}: {name} must be {shape}, got {list(tensor.shape)}")
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{_NAME}: {name} must be in channels_last memory, got strides {tensor.stride()}"
        )


_OP = register(
    f"{_NAME}(Tensor x, Tensor? second, Tensor? weight, Tensor? bias, Tensor? scale, "
    "Tensor? shift, int num_groups, float eps, int num_frames, bool silu, str backend, "
    "Tensor(a!) out, Tensor(b!)? workspace) -> ()",
    _run,
    _check,
)
