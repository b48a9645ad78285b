"""What residual_step, decomposed_step and remove_base share: all but the formula and the words.

    out_i = w.x x_i + w.base g + w.base_noise b + w.residual r_i + w.noise ξ_i

x, r: [B, N, C, H, W], g: [B, C, H, W]; csrc/common/frames.h has the rest.
"""

import functools
import importlib
from collections.abc import Callable

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
    check_tensor,
    choose_backend,
    native,
    register,
    run_native,
    unobserved,
)
from vfengine.ops.decomposed_noise import check_place, check_seed, signed_seed, unsigned_seed

# What an op may take, and its type in a schema. The names are those of csrc/common/frames.h.
_TYPES = {
    "x": "Tensor",
    "g": "Tensor",
    "r": "Tensor",
    "r_uncond": "Tensor?",
    "lam": "Tensor",
    "coeffs": "Tensor",
    "step": "Tensor",
    "guidance_scale": "float",
    "base_seed": "int?",
    "residual_seed": "int?",
    "sample_offset": "int",
    "frame_offset": "int",
}
_CLIPS = ("x", "r", "r_uncond")
_SEEDS = ("base_seed", "residual_seed")
_OFFSETS = ("sample_offset", "frame_offset")


class FrameOp:
    """One of the three ops: its schema, checks, kernels and registration, from its arguments.

    op(out, backend, *values) checks everything, writes the result into out and returns it.

    name:      of the op, of its kernels and of their files
    arguments: of its public function in order, x first; {name there: name in _TYPES}
    columns:   of coeffs
    reference: the formula in PyTorch, of the same arguments
    """

    def __init__(
        self, name: str, arguments: dict[str, str], columns: int, reference: Callable[..., Tensor]
    ) -> None:
        self.name, self.columns, self.reference = name, columns, reference
        self.fields = tuple(arguments.values())
        self.names = {field: name for name, field in arguments.items()} | {"out": "out"}
        self.tensors = tuple(f for f in self.fields if _TYPES[f].startswith("Tensor"))
        self.clips = tuple(f for f in self.fields if f in _CLIPS)
        self.seeds = tuple(f for f in self.fields if f in _SEEDS)
        self.offsets = tuple(f for f in self.fields if f in _OFFSETS)
        (first, _), *others = arguments.items()
        rest = ", ".join(f"{_TYPES[field]} {argument}" for argument, field in others)
        schema = f"{name}(Tensor {first}, {rest}, str backend, Tensor(a!) out) -> ()"
        in_place = f"{name}_(Tensor(a!) {first}, {rest}, str backend) -> ()"
        self._op = register(schema, self._run, self._check_call)
        self._op_in_place = register(in_place, self._run, self._check_call)

    def __call__(self, out: Tensor, backend: str, *values: object) -> Tensor:
        if unobserved(values[0]) and self._fast(out, backend, torch.get_num_threads(), *values):
            increment_version(out)  # as torch's own ops do, so that autograd sees the write
            return out
        given = dict(zip(self.fields, values, strict=True))
        self._check_kinds(given, out)
        check_kinds(self.name, {}, backend=backend)
        given |= check_place(self.name, **{field: given[field] for field in self.offsets})
        for field in self.seeds:
            if given[field] is not None:
                given[field] = signed_seed(check_seed(given[field], self.names[field]))
        if out is given["x"]:
            self._op_in_place(*given.values(), backend)
        else:
            self._op(*given.values(), backend, out)
        return out

    @functools.cached_property
    def _fast(self) -> Callable[..., bool]:
        """The short way for ordinary CPU tensors; says whether it was taken."""
        return native().fast_call(self.name, self.fields)

    def _run(self, *values: object) -> None:
        """The op itself. values: as in its schema, seeds as int64."""
        given, backend, out = self._named(values)
        self._check(given, out)
        increment_version(out)
        x = given["x"]
        inputs = {self.names[field]: given[field] for field in self.tensors}
        if x.data_ptr() == out.data_ptr():
            del inputs[self.names["x"]]
        check_overlap(self.name, out, inputs)
        backend = choose_backend(self.name, backend, x.device)
        for field in self.seeds:
            if given[field] is not None:
                given[field] = unsigned_seed(given[field])
        if backend == "reference":
            out.copy_(self.reference(**{self.names[f]: value for f, value in given.items()}))
        elif backend == "triton":
            from vfengine.kernels.frames import launch_frames

            rule = importlib.import_module(f"vfengine.kernels.{self.name}").RULE
            launch_frames(rule, out=out, **given)
        else:
            run_native(self.name, backend, x, **self._args(given, out))

    def _args(self, given: dict[str, object], out: Tensor) -> dict[str, object]:
        """The fields of csrc/common/frames.h; uses `given` up."""
        (batch, frames, c, h, w), num_steps = out.shape, given["coeffs"].shape[0]
        for field in self.tensors:
            given[field] = address(given[field])
        draw = False
        for field in self.seeds:
            draw |= given[field] is not None
            given[field] = given[field] or 0
        return {
            **given,
            "out": out.data_ptr(),
            "batch": batch,
            "frames": frames,
            "pixels": c * h * w,
            "num_steps": num_steps,
            "draw": draw,
            "dtype": DTYPE_NUMBERS[out.dtype],
        }

    def _check_call(self, *values: object) -> None:
        given, _, out = self._named(values)
        self._check(given, out)

    def _check(self, given: dict[str, object], out: Tensor) -> None:
        """Raise unless dtypes, shapes, strides and devices fit; looks at no memory."""
        op, names, x = self.name, self.names, given["x"]
        for field in self.tensors:
            if given[field] is None and _TYPES[field] == "Tensor":  # which an op lets through
                self._check_kinds(given, out)
        check_dtype(op, names["x"], x)
        if x.ndim != 5 or x.numel() == 0:
            raise ValueError(
                f"{op}: {names['x']} must be [B, N, C, H, W] and not empty, got {list(x.shape)}"
            )
        shape, dtype, device = x.shape, x.dtype, x.device
        for field in self.clips:
            if given[field] is not None:
                check_tensor(op, names[field], given[field], shape, dtype, device)
        check_tensor(op, "out", out, shape, dtype, device)
        check_tensor(op, names["g"], given["g"], shape[:1] + shape[2:], dtype, device)
        check_tensor(op, "lam", given["lam"], shape[1:2], torch.float32, device)
        coeffs = given["coeffs"]
        rows = (coeffs.shape[0] if coeffs.ndim else 0,)
        expected = (*rows, self.columns) if self.columns > 1 else rows
        check_tensor(op, names["coeffs"], coeffs, expected, torch.float32, device)
        check_tensor(op, "step", given["step"], (1,), torch.int32, device)
        check_no_grad(op, *[given[field] for field in self.tensors], out)

    def _check_kinds(self, given: dict[str, object], out: Tensor) -> None:
        """Raise TypeError for what is no tensor, or no number; r_uncond may be None.

        Puts Python's numbers into given.
        """
        tensors = {self.names[field]: given[field] for field in self.tensors} | {"out": out}
        if "r_uncond" in tensors and tensors["r_uncond"] is None:
            del tensors["r_uncond"]
        scale = {field: given[field] for field in ("guidance_scale",) if field in given}
        given |= zip(scale, check_kinds(self.name, tensors, **scale), strict=True)

    def _named(self, values: tuple) -> tuple[dict[str, object], str, Tensor]:
        """(values by field, backend, out) of an op's arguments; in place, out is x."""
        count = len(self.fields)
        out = values[-1] if len(values) > count + 1 else values[0]
        return dict(zip(self.fields, values, strict=False)), values[count], out


def row_of(op: str, coeffs: Tensor, step: Tensor) -> Tensor:
    """The row of this step, for references; ValueError where it lies outside."""
    if not 0 <= int(step) < coeffs.shape[0]:
        raise ValueError(
            f"{op}: step {int(step)} lies outside coeffs, which has {coeffs.shape[0]} rows"
        )
    return coeffs[int(step)]


def shares(op: str, lam: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """√λ and √(1-λ), [N, 1, 1, 1], for references; ValueError for λ outside [0, 1]."""
    if not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"{op}: lam must lie in [0, 1], got {lam.tolist()}")
    lam = lam.to(dtype).view(-1, 1, 1, 1)
    return lam.sqrt(), (1 - lam).sqrt()


def guided(r: Tensor, r_uncond: Tensor | None, guidance_scale: float, dtype: torch.dtype) -> Tensor:
    """The residual estimate in dtype, for references."""
    if r_uncond is None:
        return r.to(dtype)
    return r_uncond.to(dtype) + float(guidance_scale) * (r.to(dtype) - r_uncond.to(dtype))
