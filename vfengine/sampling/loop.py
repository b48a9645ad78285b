"""The common part of sampling loops: steps over static buffers, which a CUDA graph can replay.

A loop allocates its buffers once. `start` fills them; every `step` applies one row of the solver's
table to them. A counter on the device selects the row, so that all steps are the same operations on
the same memory. A loop can be started again, with other noise.

The loops and their mathematics are in two_phase.py and interleaved.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..diffusion.noise import NoisePlace
from ..diffusion.solvers import SolverTable
from ..ops import Clock
from .cuda_graph import CapturedStepper, Stepper, captured
from .features import Kept, check_reuse_every
from .in_loop import LoopModel
from .run import Callback

if TYPE_CHECKING:
    from typing import Self  # of Python 3.11 on


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """Everything that a loop is made from except its network: loops of equal specs do the same.

    shape, dtype, device: those of the initial noise
    table:                the solver's table
    place:                place of the noise that steps add; None where the table adds none, so
                          that specs do not differ by an unused seed
    backend:              backend of the step's ops (vfengine/ops)
    reuse_every:          N: the whole network runs on every N-th step, from the first on, and its
                          shallow part on the others (features.py)
    """

    phase: ClassVar[str]  # name in progress reports: "base", "residual", "interleaved", "video"

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    table: SolverTable
    place: NoisePlace | None
    backend: str = "auto"
    reuse_every: int = 1

    @classmethod
    def of(
        cls,
        noise: Tensor,
        table: SolverTable,
        place: NoisePlace,
        backend: str = "auto",
        **more: Any,
    ) -> Self:
        """The spec of a loop that starts from such noise; more: fields of the subclass."""
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
    """A loop's common part: the table on the device, the counter, the timestep of every sample.

    phase: its spec's
    """

    def __init__(self, spec: LoopSpec) -> None:
        self.phase, self.table, self.backend = spec.phase, spec.table, spec.backend
        self.device, self.dtype = spec.device, spec.dtype
        self.state_dtype = torch.promote_types(spec.dtype, torch.float32)
        self.coeffs = spec.table.coeffs.to(self.device, self.state_dtype)
        self.timesteps = spec.table.timesteps.to(self.device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=self.device)  # steps done
        self.ticket = torch.zeros_like(self.counter)
        self.reuse_every = check_reuse_every(spec.reuse_every)
        self.kept = Kept() if self.reuse_every > 1 else None
        self.t = self.timesteps[:1].repeat(spec.shape[0])
        # The least and the largest number of `sample` after a step, 0 where nothing was looked at.
        self.extremes = torch.zeros(2, len(spec.table), dtype=self.state_dtype, device=self.device)
        self._captured: dict[int, CapturedStepper] = {}  # by the steps in a graph
        # Of its steps beside another loop's (overlap.py); gone when that loop is.
        self.beside: WeakKeyDictionary[Loop, CapturedStepper] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def clock(self) -> Clock:
        """Counter and timestep, which the last op of a step moves on."""
        return Clock(self.counter, self.ticket, self.timesteps, self.t)

    def step(self, shallow: bool = False) -> None:
        """One step of the solver on the buffers.

        shallow: with the features that the last whole step has kept
        """
        if self.kept is not None:
            self.kept.shallow = shallow
        self._step()

    def _step(self) -> None:
        raise NotImplementedError

    def stepper(self, capture: bool, at_once: int | None = None) -> Stepper:
        """`step`, or with capture on CUDA a graph of some steps; call this before `start`.

        at_once: steps in a graph, a divisor of all; None: `steps_in_a_graph`. One where features
                 are reused: a graph of a whole step and one of a shallow step take turns

        Raises RuntimeError for a step that cannot be captured, such as one in float64, whose
        reference ops wait for the device.
        """
        shallow, every = partial(self.step, shallow=True), self.reuse_every
        if not capture or self.device.type != "cuda":
            return Stepper(self.step, shallow=shallow, every=every)
        if self.dtype == torch.float64:
            raise RuntimeError("steps of float64 clips cannot be captured in a CUDA graph")
        count = steps_in_a_graph(len(self)) if at_once is None else at_once
        count = count if every == 1 else 1
        if len(self) % count:
            raise ValueError(f"at_once must divide the loop's {len(self)} steps, got {count}")
        if count not in self._captured:
            made = captured(self.step, self.device, self._rewind, count)
            if every > 1:
                between = captured(shallow, self.device, self._rewind)
                made = replace(made, shallow=between, every=every)
            self._captured[count] = made
        return self._captured[count]

    def run(self, stepper: Stepper, callback: Callback | None = None) -> None:
        """Takes all steps, by what `stepper` returned; call `start` first."""
        for done in range(0, len(self), stepper.count):
            stepper(done)
            self.report(callback, done, stepper.count)

    def sample(self, done: int) -> Tensor:
        """What `done` steps have made; once it is not finite, it stays so."""
        raise NotImplementedError

    def look(self, done: int) -> None:
        """Notes the extremes of `sample(done)`, without waiting for the device."""
        found = torch.stack(torch.aminmax(self.sample(done)))
        self.extremes[:, done - 1] = found

    def first_not_finite(self) -> int | None:
        """The first step looked at after which `sample` was not finite; waits for the device."""
        bad = (~self.extremes.isfinite()).any(0)
        return int(bad.int().argmax()) + 1 if bool(bad.any()) else None

    def report(self, callback: Callback | None, done: int, count: int) -> None:
        """Looks at what `count` steps after `done` made, and tells the callback of each."""
        self.look(done + count)
        if callback is not None:
            for k in range(done, done + count):
                callback(self.phase, k + 1, len(self))

    def _rewind(self) -> None:
        self.clock.rewind()
        self.extremes.zero_()


def steps_in_a_graph(total: int) -> int:
    """How many of a loop's steps share a graph: 5, where that divides a loop of 20 or more.

    More would gain nothing, for a graph is launched while the one before it runs. Callbacks come
    after a graph's last step, and its capture takes the time of as many plain steps: fewer than 5
    where they would be more than a quarter of the loop, or do not divide it.
    """
    return max(k for k in range(1, 6) if total % k == 0 and (k == 1 or 4 * k <= total))


class Mixing:
    """(ε̃, h) <- mixing[k] (ε, h): the history of multistep solvers, in fp32 or float64.

    It multiplies and adds element by element, so that results do not depend on the batch size.
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
        """ε̃ in the dtype of eps, at the row int [1]; one-step solvers get eps itself."""
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


def estimate(name: str, model: LoopModel, z: Tensor, t: Tensor, kept: Kept | None = None) -> Tensor:
    """The model's estimate; ValueError when it does not have the shape of its input."""
    out = model(z, t) if kept is None else model(z, t, kept)
    if not isinstance(out, Tensor) or out.shape != z.shape:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"{name} must return noise of its input's shape {list(z.shape)}, got {got}"
        )
    return out


def unshared(out: Tensor, state: Tensor) -> Tensor:
    """out, contiguous and apart from the state's memory, which is about to be written."""
    shared = out.untyped_storage()._cdata == state.untyped_storage()._cdata
    return out.clone() if shared else out.contiguous()
