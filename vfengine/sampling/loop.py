"""What all sampling loops share: steps over static buffers, which a CUDA graph can replay.

A loop allocates its buffers once. `start` fills them, every `step` moves them on by one row of the
solver's table; the row is a counter on the device, so all steps are the same list of operations on
the same memory. Loops can be started again, with other noise.

The loops themselves: two_phase.py and interleaved.py, with their mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..diffusion.decompose import Model
from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from .cuda_graph import Step, captured
from .run import Callback


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """All that a loop is made from, but its network: loops of equal specs do the same.

    shape, dtype, device: of the noise that it starts from
    table:                of the solver
    place:                of the noise on the way; None where the table adds none, so that no seed
                          tells two specs apart
    backend:              of the ops that step (vfengine/ops)
    """

    phase: ClassVar[str]  # of the loops, for progress: "base", "residual", "interleaved", "video"

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    table: SolverTable
    place: NoisePlace | None
    backend: str = "auto"

    @classmethod
    def of(
        cls,
        noise: Tensor,
        table: SolverTable,
        place: NoisePlace,
        backend: str = "auto",
        **more: Any,
    ) -> Self:
        """The spec of a loop that starts from such noise; more: what else this kind of loop has."""
        return cls(
            shape=noise.shape,
            dtype=noise.dtype,
            device=noise.device,
            table=table,
            place=place if table.stochastic else None,
            backend=backend,
            **more,
        )


class Loop:
    """What all have: the table on the device, the counter, the timestep of every sample.

    phase: as of its spec
    """

    def __init__(self, spec: LoopSpec) -> None:
        self.phase, self.table, self.backend = spec.phase, spec.table, spec.backend
        self.device, self.dtype = spec.device, spec.dtype
        self.state_dtype = torch.promote_types(spec.dtype, torch.float32)
        self.coeffs = spec.table.coeffs.to(self.device, self.state_dtype)
        self.timesteps = spec.table.timesteps.to(self.device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=self.device)  # of the steps done
        self.t = torch.empty(spec.shape[0], dtype=torch.int64, device=self.device)
        self._replay: Step | None = None

    def __len__(self) -> int:
        return len(self.table)

    def step(self) -> None:
        """One step of the solver on the buffers."""
        raise NotImplementedError

    def stepper(self, capture: bool) -> Step:
        """`step`, on CUDA captured in a graph if asked; to be called before `start`.

        Raises RuntimeError for a step that cannot be captured, as one of float64, whose references
        wait for the device.
        """
        if not capture or self.device.type != "cuda":
            return self.step
        if self.dtype == torch.float64:
            raise RuntimeError("steps of float64 clips cannot be captured in a CUDA graph")
        if self._replay is None:
            self._replay = captured(self.step, self.device, self._rewind)
        return self._replay

    def run(self, step: Step, callback: Callback | None = None) -> None:
        """All steps, from `stepper`, after `start`."""
        for k in range(len(self)):
            step()
            if callback is not None:
                callback(self.phase, k + 1, len(self))

    def _rewind(self) -> None:
        self.counter.zero_()

    def _set_timestep(self, row: Tensor) -> None:
        self.t.copy_(self.timesteps.index_select(0, row).expand_as(self.t))


class Mixing:
    """(ε̃, h) <- mixing[k] (ε, h): the history of multistep solvers, in fp32 or float64.

    Products and sums element by element, so that no element depends on the others' number.
    """

    def __init__(
        self, table: SolverTable, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.mixing = table.mixing.to(device, dtype)  # [S, 1+H, 1+H]
        history = torch.zeros(table.num_history, *shape, dtype=dtype, device=device)
        self.history = history.unbind()

    def clear(self) -> None:
        for slot in self.history:
            slot.zero_()

    def __call__(self, row: Tensor, eps: Tensor) -> Tensor:
        """ε̃ in the dtype of eps; one-step solvers get eps itself."""
        if not self.history:
            return eps
        mixing = self.mixing.index_select(0, row)[0]
        parts = (eps.to(mixing.dtype), *self.history)
        mixed, *history = [_dot(weights, parts) for weights in mixing.unbind()]
        for slot, value in zip(self.history, history, strict=True):
            slot.copy_(value)
        return mixed.to(eps.dtype)


def _dot(weights: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:].unbind(), parts[1:], strict=True):
        total = total + weight * part
    return total


def estimate(name: str, model: Model, z: Tensor, t: Tensor) -> Tensor:
    """The model's estimate; ValueError when it does not have the shape of its input."""
    out = model(z, t)
    if not isinstance(out, Tensor) or out.shape != z.shape:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name} must return noise of its input's shape {list(z.shape)}, got {got}"
        )
    return out


def unshared(out: Tensor, state: Tensor) -> Tensor:
    """Contiguous, and not in the state's memory, which is about to be written."""
    shared = out.untyped_storage()._cdata == state.untyped_storage()._cdata
    return out.clone() if shared else out.contiguous()
