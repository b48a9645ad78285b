"""Random arguments of every public op: the right result, or TypeError or ValueError."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage import odd_value
from torch import Tensor

from vfengine import ops
from vfengine.native import vfengine_native
from vfengine.ops.attention import attend

Arguments = dict[str, Any]
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
OTHER_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64),
    *(torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn),
)
# Distance from the fp32 reference, of results of about one; inputs are exact in both.
BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-12}
ODD_NUMBERS = (*(0, -1, 1, 2, 2**24, 2**31, 2**64, -(2**63), 10**30), *(True, 0.5, "1", None, []))


class Draw:
    """Tensors and sizes that chance decides; `dtype` is that of the case."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.dtype = chance, chance.choice(DTYPES)
        self.generator = torch.Generator().manual_seed(chance.randrange(2**31))

    def size(self, most: int) -> int:
        """Mostly small."""
        return self.chance.randint(1, min(most, self.chance.choice((1, 3, most))))

    def maybe(self, value: Callable[[], Any]) -> Any:
        return value() if self.chance.random() < 0.5 else None

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Sometimes not at the beginning of its memory."""
        offset = self.chance.choice((0, 0, 1, 3))
        count = int(np.prod(shape)) + offset
        values = torch.randn(count, generator=self.generator).to(dtype or self.dtype)
        return values[offset:].view(shape)

    def table(self, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=torch.float32)

    def out(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.normal(*shape, dtype=dtype) * float("nan")

    def pixels(self, *shape: int) -> Tensor:
        """[B, C, H, W] in channels_last memory."""
        return self.normal(*shape).contiguous(memory_format=torch.channels_last)

    def clip(self) -> tuple[int, ...]:
        return tuple(self.size(most) for most in (3, 7, 4, 9, 33))

    def lam(self, frames: int) -> Tensor:
        return torch.rand(frames, generator=self.generator)

    def step(self, steps: int) -> Tensor:
        return torch.tensor([self.chance.randrange(steps)], dtype=torch.int32)

    def seed(self) -> int:
        return self.chance.choice((0, 7, 2**32, 2**63, 2**64 - 1))

    def clock(self, steps: int, batch: int) -> ops.Clock:
        counter = self.step(steps)
        times = torch.arange(steps - 1, -1, -1, dtype=torch.int64)
        t = times[int(counter)].repeat(batch)
        return ops.Clock(counter, torch.zeros(1, dtype=torch.int32), times, t)

    def rows(self, seeded: bool, steps: int) -> Tensor:
        """Coefficients of a solver; σ is 0 where there is no seed."""
        coeffs = self.table(steps, 3)
        coeffs[:, 2] = coeffs[:, 2].abs() if seeded else 0
        return coeffs


def _base_step(d: Draw) -> Arguments:
    b, _, *image = d.clip()
    steps, seed = d.size(4), d.maybe(d.seed)
    shape, d.dtype = (b, *image), torch.float32
    values = {"z": d.normal(*shape), "b": d.normal(*shape), "states": d.normal(steps + 1, *shape)}
    values |= {"noise_levels": d.table(steps), "coeffs": d.rows(seed is not None, steps)}
    values |= {"clock": d.clock(steps, b), "mixed": d.maybe(lambda: d.normal(*shape))}
    return values | {"seed": seed, "sample_offset": d.chance.choice((0, 5, 2**31 - 4))}


def _path_step(d: Draw) -> Arguments:
    shape = b, n, *image = d.clip()
    steps, seed = d.size(4), d.maybe(d.seed)
    values = {"u": d.normal(*shape), "r": d.normal(*shape), "lam": d.lam(n)}
    values |= {"coeffs": d.rows(seed is not None, steps), "clock": d.clock(steps, b)}
    states = d.maybe(lambda: d.table(steps + 1, d.chance.choice((1, b)), *image))
    c1 = d.maybe(lambda: d.table(steps).double())
    values |= {"states": states, "c1": c1, "base_frame": d.chance.randrange(n), "seed": seed}
    return values | {"sample_offset": d.size(9), "frame_offset": d.size(9)}


def _residual_step(d: Draw) -> Arguments:
    shape = b, n, *image = d.clip()
    steps, seed = d.size(4), d.maybe(d.seed)
    values = {"u": d.normal(*shape), "r": d.normal(*shape), "g": d.normal(b, *image)}
    values |= {"lam": d.lam(n), "coeffs": d.rows(seed is not None, steps), "step": d.step(steps)}
    values |= {"r_uncond": d.maybe(lambda: d.normal(*shape)), "guidance_scale": 1.5, "seed": seed}
    values |= {"sample_offset": d.size(9), "frame_offset": d.size(9)}
    return values | {"out": d.maybe(lambda: d.out(*shape))}


def _decomposed_step(d: Draw) -> Arguments:
    shape = b, n, *image = d.clip()
    steps, seed = d.size(4), d.maybe(d.seed)
    values = {"z": d.normal(*shape), "b": d.normal(b, *image), "r": d.normal(*shape)}
    values |= {"lam": d.lam(n), "coeffs": d.rows(seed is not None, steps), "step": d.step(steps)}
    values |= {"base_seed": seed, "residual_seed": seed, "out": d.maybe(lambda: d.out(*shape))}
    return values | {"sample_offset": d.size(9), "frame_offset": d.size(9)}


def _remove_base(d: Draw) -> Arguments:
    shape = b, n, *image = d.clip()
    steps = d.size(4)
    values = {"z": d.normal(*shape), "b": d.normal(b, *image), "lam": d.lam(n)}
    values |= {"noise_levels": d.table(steps), "step": d.step(steps)}
    return values | {"out": d.maybe(lambda: d.out(*shape))}


def _decomposed_noise(d: Draw) -> Arguments:
    b, n, *image = d.clip()
    part = d.chance.choice(("base", "residual"))
    out = d.out(*((b, *image) if part == "base" else (b, n, *image)))
    place = {"step": d.chance.choice((0, 1, 2**24 - 1)), "sample_offset": d.size(9)}
    return {"out": out, f"{part}_seed": d.seed(), **place, "frame_offset": d.size(9)}


def _geglu(d: Draw) -> Arguments:
    shape = tuple(d.size(5) for _ in range(d.chance.randrange(3)))
    width = d.size(70)
    return {"x": d.normal(*shape, 2 * width), "out": d.maybe(lambda: d.out(*shape, width))}


def _layer_norm(d: Draw) -> Arguments:
    shape = (*(d.size(5) for _ in range(d.chance.randrange(3))), d.size(130) + 1)
    values = {"x": d.normal(*shape), "weight": d.maybe(lambda: d.table(shape[-1]))}
    values |= {"bias": d.maybe(lambda: d.table(shape[-1])), "out": d.maybe(lambda: d.out(*shape))}
    return values | {"eps": d.chance.choice((1e-5, 1e-2))}


def _geglu_backward(d: Draw) -> Arguments:
    shape = tuple(d.size(5) for _ in range(d.chance.randrange(3)))
    width = d.size(70)
    values = {"grad": d.normal(*shape, width), "x": d.normal(*shape, 2 * width)}
    return values | {"out": d.maybe(lambda: d.out(*shape, 2 * width))}


def _layer_norm_backward(d: Draw) -> Arguments:
    values = _layer_norm(d)
    del values["bias"]
    return {"grad": d.normal(*values["x"].shape), **values}


def _group_norm_silu(d: Draw) -> Arguments:
    groups, frames, rows = d.size(6), d.size(3), d.size(3)
    images = frames * rows
    channels, size = groups * d.size(9), (d.size(9), d.size(9))
    first = d.chance.randint(1, channels)
    second = d.pixels(images, channels - first, *size) if first < channels else None
    wide = d.table(rows, 2 * channels + 1)
    scaled = d.chance.random() < 0.5
    out = d.maybe(lambda: d.pixels(images, channels, *size) * float("nan"))
    values = {"x": d.pixels(images, first, *size), "num_groups": groups, "second": second}
    values |= {"weight": d.maybe(lambda: d.table(channels)), "num_frames": frames, "out": out}
    values |= {"bias": d.maybe(lambda: d.table(channels)), "silu": d.chance.random() < 0.5}
    values |= {"scale": wide[:, :channels] if scaled else None, "eps": 1e-2}
    return values | {"shift": wide[:, channels + 1 :] if scaled else None}


def _spatial_attention(d: Draw) -> Arguments:
    frames, heads, width = d.size(4), d.size(3), 8 * d.size(32)
    queries, keys = d.size(70), d.size(80)
    q = d.normal(frames, queries, 3 * heads * width)[..., : heads * width]
    kv = d.normal(d.chance.choice((1, frames)), keys, 2 * heads * width).chunk(2, -1)
    q = q.contiguous() if d.chance.random() < 0.5 else q
    out = d.maybe(lambda: d.out(frames, queries, heads * width))
    return {"q": q, "k": kv[0], "v": kv[1], "num_heads": heads, "out": out}


def _temporal_attention(d: Draw) -> Arguments:
    b, n, p, heads, width = d.size(2), d.size(128), d.size(9), d.size(3), 8 * d.size(32)
    values = {"qkv": d.normal(b, n, p, 3 * heads * width), "num_heads": heads}
    values |= {"bias": d.maybe(lambda: d.table(heads, n, n))}
    return values | {"out": d.maybe(lambda: d.out(b, n, p, heads * width))}


def _temporal_attention_backward(d: Draw) -> Arguments:
    values = _temporal_attention(d)
    *leading, width = values["qkv"].shape
    values["out"] = d.maybe(lambda: d.out(*leading, width))
    return {"grad": d.normal(*leading, width // 3), **values}


def _attend(d: Draw) -> Arguments:
    lead = tuple(d.size(3) for _ in range(d.chance.randrange(3)))
    heads, queries, keys, width = d.size(3), d.size(30), d.size(30), d.size(40)
    q, (k, v) = (
        d.normal(*lead, heads, queries, width),
        (d.normal(*lead, heads, keys, width) for _ in range(2)),
    )
    return {"q": q, "k": k, "v": v, "bias": d.maybe(lambda: d.table(heads, queries, keys))}


def _attend_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    return (logits if bias is None else logits + bias).softmax(-1) @ v.double()


def _implicit_gemm(d: Draw) -> Arguments:
    kernel = d.chance.choice(((3, 3), (1, 1), (3, 1)))
    padding = tuple(extent // 2 * d.chance.randint(0, 1) for extent in kernel)
    b, c, c2, n = d.size(3), d.size(20), d.chance.choice((0, 0, 5)), d.size(20)
    h, w = d.size(9) + 2, d.size(9) + 2
    gated = kernel == (1, 1) and d.chance.random() < 0.3
    values = {"x": d.normal(b, h, w, c), "bias": d.table(n * (1 + gated)), "padding": padding}
    values |= {"weight": d.normal(n * (1 + gated), *kernel, c + c2), "gated": gated}
    values |= {"second": d.normal(b, h, w, c2) if c2 else None, "stride": d.chance.randint(1, 2)}
    values |= {"upsample": d.chance.choice((1, 1, 2)), "silu": False}
    if not gated:
        values |= {"shift": d.maybe(lambda: d.table(d.chance.choice((1, b)), n))}
    return values


def _generated(d: Draw) -> tuple[Arguments, int, tuple[int, ...]]:
    """Clip and table of `model_input` and `noise_estimate`, the patch, and the images' shape."""
    b, n, c, *_ = d.clip()
    patch, h, w, steps = d.size(3), d.size(5), d.size(5), d.size(3)
    values = {"z": d.normal(b, n, c, h * patch, w * patch), "coeffs": d.table(steps, n, 5)}
    return {**values, "step": d.step(steps)}, patch, (d.size(2) * b * n, h, w)


def _model_input(d: Draw) -> Arguments:
    values, patch, images = _generated(d)
    conditioned = d.chance.random() < 0.5
    width = values["z"].shape[2] * (1 + conditioned) * patch**2 + d.chance.choice((0, 0, 3))
    return {**values, "out": d.out(*images, width), "conditioned": conditioned}


def _model_input_reference(z, coeffs, step, out, *, conditioned=False) -> Tensor:
    images, rows, _, width = out.shape
    made = ops.model_input_reference(
        z, coeffs, step, patch_size=z.shape[-2] // rows, conditioned=conditioned
    )
    made = torch.nn.functional.pad(made, (0, width - made.shape[-1]))
    return made.repeat(images // made.shape[0], 1, 1, 1)


def _noise_estimate(d: Draw) -> Arguments:
    values, patch, images = _generated(d)
    channels = values["z"].shape[2] + d.chance.choice((0, 1, 3))
    values |= {"rows": d.table(*images, channels * patch**2), "guidance_scale": 1.5}
    return {**values, "out": d.maybe(lambda: d.out(*values["z"].shape))}


def _noise_reference(out: Tensor, **options: object) -> Tensor:
    words = out.dtype is torch.int32
    drawn = ops.decomposed_noise_reference(out.shape, **options, words=words)
    return drawn.to(torch.int32) if words else drawn


# name: arguments, the reference where it is another function than the op's own, backends
OPS = {
    "base_step": (_base_step, None, ("auto", "cpu")),
    "path_step": (_path_step, None, ("auto", "cpu")),
    "residual_step": (_residual_step, None, ("auto", "cpu", "reference")),
    "decomposed_step": (_decomposed_step, None, ("auto", "cpu", "reference")),
    "remove_base": (_remove_base, None, ("auto", "cpu", "reference")),
    "decomposed_noise": (_decomposed_noise, _noise_reference, ("auto", "cpu", "reference")),
    "geglu": (_geglu, None, ("auto", "cpu", "reference")),
    "layer_norm": (_layer_norm, None, ("auto", "cpu", "reference")),
    "geglu_backward": (_geglu_backward, None, ("auto", "cpu", "reference")),
    "layer_norm_backward": (_layer_norm_backward, None, ("auto", "cpu", "reference")),
    "group_norm_silu": (_group_norm_silu, None, ("auto", "cpu", "reference")),
    "spatial_attention": (_spatial_attention, None, ("auto", "cpu", "reference")),
    "temporal_attention": (_temporal_attention, None, ("auto", "cpu", "reference")),
    "temporal_attention_backward": (
        _temporal_attention_backward,
        None,
        ("auto", "cpu", "reference"),
    ),
    "attend": (_attend, _attend_reference, ("auto", "math", "sdpa")),
    "implicit_gemm": (_implicit_gemm, None, ("reference",)),
    "model_input": (_model_input, _model_input_reference, ("reference",)),
    "noise_estimate": (_noise_estimate, None, ("reference",)),
}
IN_PLACE = ("base_step", "path_step")  # what they write beside the result is compared too


# -- damage ----------------------------------------------------------------------------------------


def _other_tensor(chance: random.Random, x: Tensor) -> Any:
    """Another dtype, shape, stride, device or kind; sometimes one that is as good."""
    if x.layout is not torch.strided or x.is_meta or x.requires_grad:
        return x  # damaged before
    dim = chance.randrange(x.ndim) if x.ndim else None
    ways = [
        lambda: x.to(chance.choice(OTHER_DTYPES)),
        lambda: x[None],
        lambda: x.flatten(),
        lambda: x.to("meta"),
        lambda: x.clone().requires_grad_() if x.is_floating_point() else None,
        lambda: torch.nn.Parameter(x.clone(), requires_grad=False),
        lambda: chance.choice((None, 1, 0.5, "x", [1.0], x.tolist(), object())),
        lambda: x.numpy() if x.dtype is not torch.bfloat16 else None,
        lambda: x.to_sparse() if x.ndim else x,
        lambda: torch.empty(0, dtype=x.dtype),
        lambda: x.reshape(()) if x.numel() == 1 else x.new_zeros(()),
    ]
    if dim is not None:
        ways += [
            lambda: x.transpose(dim, chance.randrange(x.ndim)),
            lambda: x.narrow(dim, 0, chance.randrange(x.shape[dim])),
            lambda: torch.cat((x, x), dim),
            lambda: x.repeat_interleave(2, dim).index_select(
                dim, torch.arange(0, 2 * x.shape[dim], 2)
            ),
            lambda: torch.cat((x, x), dim).unfold(dim, x.shape[dim], x.shape[dim]).select(dim, 0),
            lambda: x.select(dim, 0).unsqueeze(dim).expand_as(x),
            lambda: x.flip(dim).contiguous(memory_format=torch.preserve_format),
            lambda: x.contiguous(),
        ]
    try:
        return chance.choice(ways)()
    except (RuntimeError, TypeError, ValueError):  # where there is no such tensor
        return x


def _other_number(chance: random.Random, value: Any) -> Any:
    return chance.choice(ODD_NUMBERS) if chance.random() < 0.5 else odd_value(chance, value)


def _damage(chance: random.Random, given: Arguments) -> None:
    name = chance.choice(sorted(given))
    value = given[name]
    if isinstance(value, ops.Clock):
        part = chance.choice(value._fields)
        given[name] = value._replace(**{part: _other_tensor(chance, getattr(value, part))})
    elif isinstance(value, Tensor):
        others = [v for k, v in given.items() if isinstance(v, Tensor) and k != name]
        shared = chance.random() < 0.15 and others
        given[name] = chance.choice(others) if shared else _other_tensor(chance, value)
    else:
        given[name] = _other_number(chance, value)


# -- one case --------------------------------------------------------------------------------------


def case(chance: random.Random, folder: Path | None = None, isas: tuple[str, ...] = ()) -> str:
    """isas: instruction sets of which one is taken; none are the CPU's own"""
    torch.set_num_threads(chance.choice((1, 1, 2)))
    vfengine_native.set_cpu_isa(chance.choice(isas or vfengine_native.cpu_isas))
    name = chance.choice(sorted(OPS))
    build, reference, backends = OPS[name]
    given = build(Draw(chance))
    damaged = chance.random() < 0.6 and name != "attend"  # the networks' own, which torch checks
    for _ in range(chance.choice((1, 1, 2)) if damaged else 0):
        _damage(chance, given)
    backend = chance.choice(backends)
    if damaged and chance.random() < 0.05:
        backend = chance.choice(("cuda", "triton", "", "flash", None, 3, "reference"))
    told = f"{name}(backend={backend!r}, {_words(given)})"
    try:
        return _compared(name, given, backend, reference)
    except (TypeError, ValueError) as error:
        assert damaged, f"{told} is refused: {error}"
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{told}: {type(error).__name__}: {error}") from error


def _compared(name: str, given: Arguments, backend: str, reference: Callable | None) -> str:
    op = attend if name == "attend" else getattr(ops, name)
    try:
        twin, before = copy.deepcopy(given), copy.deepcopy(given)
    except RuntimeError:  # a sparse tensor, or one of a graph: no op takes it
        op(**given, backend=backend)
        raise AssertionError("taken, though it cannot be copied") from None
    result = op(**given, backend=backend)
    results = tensors_of(result)
    if not results or results[0].is_meta:
        return "meta"
    twin.pop("out", None) if name not in ("model_input", "decomposed_noise") else None
    with torch.no_grad():
        try:
            expected = (reference or getattr(ops, f"{name}_reference"))(**twin)
        except BaseException as error:
            raise AssertionError(f"taken, but its reference raises {error!r}") from error
    for one, other in zip(results, tensors_of(expected), strict=True):
        _close(one, other, "the result")
    for key, value in given.items():
        if key == "out" or value is results[0]:
            continue
        written = name in IN_PLACE
        for one, other in zip(
            tensors_of(value), tensors_of((twin if written else before)[key]), strict=True
        ):
            if not one.is_meta:
                _close(one, other, key)
    return "done"


def tensors_of(value: Any) -> list[Tensor]:
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, Tensor)]


def _close(result: Tensor, expected: Tensor, what: str) -> None:
    assert result.shape == expected.shape, f"{what}: {result.shape} for {expected.shape}"
    if not result.is_floating_point():
        assert torch.equal(result, expected.to(result.dtype)), f"{what} differs"
        return
    bound = BOUNDS[result.dtype]
    result, expected = result.double(), expected.to(result.dtype).double()  # both may overflow
    scale = expected.nan_to_num(0, 0, 0).abs().amax().clamp(min=1) if expected.numel() else 1
    off = (result - expected).abs() / scale
    bad = ~(off <= bound) & ~(result.isnan() & expected.isnan()) & (result != expected)
    assert not bool(bad.any()), f"{what} is off by {float(off.amax()):.3g} > {bound}"


def _words(given: Arguments) -> str:
    def one(value: Any) -> str:
        if isinstance(value, ops.Clock):
            return f"({', '.join(map(one, value))})"
        if not isinstance(value, Tensor):
            return repr(value)[:60]
        tail = f" at {value.storage_offset()}" if not (value.is_meta or value.is_sparse) else ""
        strides = "" if value.is_sparse else f" by {list(value.stride())}"
        return f"{value.dtype}{list(value.shape)}{strides}{tail} on {value.device}"

    return ", ".join(f"{name}={one(value)}" for name, value in given.items())
