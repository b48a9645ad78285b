"""The costs of a call, counted from its dispatched operations: FLOPs, bytes, launches, peak memory.

Nothing is timed, and the tensors may be fake (torch's FakeTensorMode), so a network of billions of
parameters is counted on a machine that could not hold it. `to_fake` makes such a network out of one
built on the meta device. Counted is what torch dispatches for these tensors and this device type:

FLOPs       torch.utils.flop_counter's formulas: two per multiply-add of matrix products,
            convolutions and attention; nothing else counts
bytes       of every launch: each tensor read once, each tensor written once, as if no cache held
            anything between two launches. A dimension of stride 0 is one element long, a lookup
            reads the rows it returns
launches    operations that make or write a tensor. Views and bare allocations are none; an
            operation that a library runs as several kernels (the backward of a norm, a convolution
            and its bias) is one, and so is one over a list of tensors (AdamW's)
peak        the largest sum of the bytes of storages alive at once, exact: views share a storage,
            writing in place allocates nothing, what autograd saves lives until it is freed.
            Storages that existed before the call count where `live` names them. Not counted: what
            a kernel allocates for itself, an allocator's rounding and fragmentation, a CUDA context

Attention: on CPU tensors, fake or not, torch dispatches scaled_dot_product_attention as one fused
operation each way, which never writes out the logits, as the fused kernels of a GPU. The formulas
of those are used for it.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# torch's registry has formulas for the CUDA kernels only; the arguments used are the same
FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
_SILENT = ("prim", "profiler")  # namespaces of questions and marks, which run nothing on a device
# write their first argument without reading it
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_")
# read as many bytes of their first argument as they return
_LOOKUPS = ("embedding", "index", "index_select", "gather")


@dataclass(frozen=True)
class Device:
    """The ceilings of a roofline: FLOP/s of dense bf16 matrix products, bytes/s of memory."""

    name: str
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Op:
    """One launch: the operation's name, its FLOPs, the bytes it reads and writes."""

    name: str
    flops: int
    bytes: int

    def seconds(self, device: Device) -> float:
        """The roofline: whichever takes longer, computing or moving."""
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


@dataclass(frozen=True)
class Costs:
    """The costs of one call (`trace`).

    ops              its launches, in order
    live_bytes       of the storages that `live` named
    peak_bytes       the most bytes alive at once, live_bytes included
    allocated_bytes  the sum of all that was allocated, whether freed or not
    """

    ops: tuple[Op, ...]
    live_bytes: int
    peak_bytes: int
    allocated_bytes: int

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    @property
    def bytes(self) -> int:
        return sum(op.bytes for op in self.ops)

    @property
    def launches(self) -> int:
        return len(self.ops)

    @property
    def by_op(self) -> dict[str, tuple[int, int, int]]:
        """name -> (launches, FLOPs, bytes), in order of falling bytes."""
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for op in self.ops:
            for i, value in enumerate((1, op.flops, op.bytes)):
                sums[op.name][i] += value
        return {k: tuple(v) for k, v in sorted(sums.items(), key=lambda kv: -kv[1][2])}

    def seconds(self, device: Device) -> float:
        """Σ over launches of max(FLOPs / peak, bytes / bandwidth): nothing fused, none overlaps."""
        return sum(op.seconds(device) for op in self.ops)

    def beside(self, size: int) -> Costs:
        """The same call while `size` further bytes are resident."""
        return replace(self, live_bytes=self.live_bytes + size, peak_bytes=self.peak_bytes + size)

    def then(self, other: Costs) -> Costs:
        """This call and then another: the larger of their peaks, the sum of all else."""
        return Costs(
            self.ops + other.ops,
            max(self.live_bytes, other.live_bytes),
            max(self.peak_bytes, other.peak_bytes),
            self.allocated_bytes + other.allocated_bytes,
        )


def trace(call: Callable[[], object], live: Iterable[object] = ()) -> Costs:
    """Run call() once and count it. Works through autograd's backward and under torch.autocast.

    live: what holds memory before the call: tensors, modules, optimizers, containers of them

    What call() returns is dropped after the last operation. Fake tensors need their FakeTensorMode
    around the call of `trace`.
    """
    tracer, collects = Tracer(live), gc.isenabled()
    gc.disable()  # memory that waits in a cycle is memory held, whenever a collection comes
    try:
        with tracer:
            call()
    finally:
        if collects:
            gc.enable()
    return tracer.costs()


class Tracer(TorchDispatchMode):
    """The mode behind `trace`: counts what runs inside its `with` block."""

    def __init__(self, live: Iterable[object] = ()):
        super().__init__()
        self._ops: list[Op] = []
        self._sizes: dict[int, int] = {}  # of every storage alive
        self._finalizers: dict[int, weakref.finalize] = {}
        self._alive = self._peak = self._allocated = 0
        for tensor in tensors_of(live):
            self._watch(tensor)
        self._live, self._allocated = self._alive, 0

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for finalizer in self._finalizers.values():
            finalizer.detach()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.prim.device.default:
            return args[0].fake_device  # what op would answer, without a detour for every question
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if op.namespace in _SILENT:
            return out
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        known = {_storage_id(tensor) for tensor in inputs}
        made = [tensor for tensor in outputs if _storage_id(tensor) not in known]
        for tensor in made:
            self._watch(tensor)
        written, overwritten = _written(op, args, kwargs)
        name = op.overloadpacket._qualified_op_name.replace("::", ".")
        if (made or written) and "empty" not in name:
            formula = FORMULAS.get(op.overloadpacket)
            flops = formula(*args, **kwargs, out_val=out) if formula else 0
            read = _read(inputs, overwritten)
            if _short(op) in _LOOKUPS:
                read[0] = min(read[0], sum(_extent(tensor) for tensor in made))
            moved = sum(read) + sum(_extent(tensor) for tensor in made + written)
            self._ops.append(Op(name, int(flops), moved))
        return out

    def costs(self) -> Costs:
        return Costs(tuple(self._ops), self._live, self._peak, self._allocated)

    def _watch(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage_id(tensor)
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self._alive += size
        self._allocated += size
        self._peak = max(self._peak, self._alive)
        # torch keeps one Python object per storage for as long as anything, C++ included, holds it
        self._finalizers[key] = weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)
        self._finalizers.pop(key)


def tensors_of(things: Iterable[object]) -> list[Tensor]:
    """The tensors of tensors, modules (their gradients too), optimizers and containers of them."""
    found = []
    for thing in tree_leaves(list(things)):
        if isinstance(thing, nn.Module):
            found += [*thing.parameters(), *thing.buffers()]
            found += [p.grad for p in thing.parameters() if p.grad is not None]
        elif isinstance(thing, torch.optim.Optimizer):
            found += _tensors(list(thing.state.values()))
        elif isinstance(thing, Tensor):
            found.append(thing)
    return found


def bytes_of(things: Iterable[object]) -> int:
    """Bytes of the storages behind `tensors_of(things)`, each counted once."""
    storages = {_storage_id(t): t.untyped_storage().nbytes() for t in tensors_of(things)}
    return sum(storages.values())


def to_fake(module: nn.Module, device: str = "cpu") -> nn.Module:
    """Replace, in place, every meta parameter and buffer by a fake tensor of the same strides.

    Call it under the FakeTensorMode that the module is to run under. (Built there directly, a
    module cannot be moved or cast: Module.to refuses to swap fake parameters.)
    """
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                tensors[name] = new
    return module


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _short(op) -> str:
    return op.overloadpacket.__name__


def _written(op, args, kwargs) -> tuple[list[Tensor], list[Tensor]]:
    """The arguments that the schema says are written; and those of them that are not read."""
    written, overwritten = [], []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            tensors = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
            written += tensors
            if argument.name == "out" or _short(op) in _OVERWRITES:
                overwritten += tensors
    return written, overwritten


def _read(inputs: list[Tensor], overwritten: list[Tensor]) -> list[int]:
    """The bytes read of each input; one that is given twice is read once."""
    seen = {_place(tensor) for tensor in overwritten}
    sizes = []
    for tensor in inputs:
        sizes.append(0 if _place(tensor) in seen else _extent(tensor))
        seen.add(_place(tensor))
    return sizes


def _place(tensor: Tensor) -> tuple:
    return (_storage_id(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())


def _extent(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension (stride 0) holds one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n if stride else min(n, 1) for n, stride in sizes)
