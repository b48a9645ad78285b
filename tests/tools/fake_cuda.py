"""Shows without a GPU that a step can be captured in a CUDA graph: `install`, then `audit`.

A captured step may not wait for the device, copy between host and device, or depend on a value of
the host; and its buffers must stay where they are. None of that needs memory or kernels, so the
step runs on fake CUDA tensors, of which torch keeps only shape, strides and storage identity.

Not visible from here: what a custom op does inside (its fake runs instead; see `ops_within`), what
a CUDA library does, and calls that bypass torch's dispatcher.
"""

import ctypes
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_NEEDS_VALUES_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Of aten, by name: they make views, or memory that nothing fills. In inference mode torch hands on
# those that it would else take apart.
_NO_LAUNCH = {"view", "_unsafe_view", "as_strided", "slice", "select", "split", "split_with_sizes"}
_NO_LAUNCH |= {"chunk", "unbind", "permute", "transpose", "unsqueeze", "flatten", "unflatten"}
_NO_LAUNCH |= {"expand", "expand_as", "detach", "alias", "empty", "empty_like", "new_empty"}
# Tagged dynamic_output_shape for their masks; indices on the device are fine.
_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


@dataclass(frozen=True)
class Report:
    """The findings of `audit`; `clean` says whether a CUDA graph could replay the step."""

    ops: list[list[str]]  # of every call
    problems: list[str]
    moved: list[str]  # buffers that do not lie where they lay before the first call
    allocated: list[str]  # ops of the last call that made memory: harmless in a graph

    @property
    def clean(self) -> bool:
        return not self.problems and not self.moved


class Audit(TorchDispatchMode):
    """Records the ops that run under it, in `ops`, and what no CUDA graph takes, in `problems`."""

    def __init__(self):
        super().__init__()
        self.ops: list[str] = []
        self.constants: list[list[str]] = []  # of each op: the arguments that are no tensors
        self.allocated: list[str] = []  # the ops with an output in memory that is none of an input
        self.problems: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace in ("prim", "profiler"):  # a fake tensor's device; an optimizer's mark
            return op(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        self.ops.append(str(op))
        self.constants.append([repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor)])
        self.problems += _problems(op, args, kwargs)
        try:
            out = op(*args, **kwargs)
        except _NEEDS_VALUES:
            self.problems.append(f"{op}: waits for the device")
            raise
        if set(storages(_tensors(out))) - set(storages(_tensors(leaves))):
            self.allocated.append(str(op))
        return out


def install(build_dir: Path) -> Callable[[], None]:
    """Let FakeTensorMode take device="cuda" in a torch built without CUDA (fake_cuda.cpp).

    Compiles into `build_dir`, unless that was done before. Returns a function that undoes it.
    """
    if torch.backends.cuda.is_built():
        return lambda: None  # has a guard of its own
    library = Path(build_dir) / "libfake_cuda.so"
    if not library.exists():
        _compile(Path(__file__).with_suffix(".cpp"), library)
    functions = ctypes.CDLL(str(library))
    functions.fake_cuda_install()
    return functions.fake_cuda_remove


def audit(step: Callable[[], object], buffers: Mapping[str, object], calls: int = 2) -> Report:
    """Run step() again and again on fake CUDA tensors: report what a CUDA graph could not replay.

    buffers: the mapping through which step reaches the tensors that live across calls, such as a
             dict or vars(object); it is read before and after, its other values are passed over.
             The tensors are fake, made with device="cuda" under one FakeTensorMode.
    calls:   at least 2; every call is compared with the first
    """
    before = {name: t for name, t in buffers.items() if isinstance(t, Tensor)}
    modes = {t.fake_mode if isinstance(t, FakeTensor) else None for t in before.values()}
    if len(modes) != 1 or None in modes:
        raise ValueError("audit: expected buffers to be fake tensors of one FakeTensorMode")
    (fake_mode,) = modes
    runs = [Audit() for _ in range(calls)]
    for run in runs:
        with suppress(*_NEEDS_VALUES), fake_mode, run:
            step()
    problems = [problem for run in runs for problem in run.problems]
    for run in runs[1:]:
        problems += _differences(runs[0], run)
    moved = [name for name, t in before.items() if not _same_memory(t, buffers.get(name))]
    return Report(
        [run.ops for run in runs], list(dict.fromkeys(problems)), moved, runs[-1].allocated
    )


def to_fake_cuda(thing: object, fake_mode: FakeTensorMode, memo: dict | None = None):
    """A module or loop made on the CPU, its tensors replaced by fake CUDA ones of the same strides.

    A loop's own helper objects are followed; memo keeps shared tensors shared. `.to` cannot do it.
    """
    memo = {} if memo is None else memo

    def fake(t: Tensor) -> Tensor:
        if id(t) not in memo:
            with fake_mode:
                twin = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            memo[id(t)] = (t, twin)  # t stays alive, so that its id stays its own
        return memo[id(t)][1]

    if isinstance(thing, nn.Module):
        for part in thing.modules():
            for name, t in part._parameters.items():
                if t is not None:
                    part._parameters[name] = nn.Parameter(fake(t), requires_grad=False)
            for name, t in part._buffers.items():
                if t is not None:
                    part._buffers[name] = fake(t)
        return thing
    for name, value in vars(thing).items():
        if isinstance(value, Tensor):
            setattr(thing, name, fake(value))
        elif isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):
            setattr(thing, name, tuple(fake(v) for v in value))
        elif isinstance(value, torch.device):
            setattr(thing, name, torch.device("cuda", 0))
        elif type(value).__name__ == "Mixing":
            to_fake_cuda(value, fake_mode, memo)
    return thing


def ops_within(call: Callable[[], object]) -> list[str]:
    """The ops that call() runs on real CPU tensors, and those inside its custom ops."""
    ops = []

    class Within(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            ops.append(str(op))
            if op.namespace == "aten":
                return op(*args, **(kwargs or {}))
            # Called by name under the mode, the op would come back here; outside, hide its ops.
            cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            with self:
                return op.redispatch(cpu, *args, **(kwargs or {}))

    with Within():
        call()
    return ops


def launched(ops: Iterable[str]) -> list[str]:
    """The ops that start a kernel, of those that a report names."""
    return [op for op in ops if op.split(".")[1] not in _NO_LAUNCH]


def storages(tensors: Iterable[Tensor]) -> list[int]:
    """An identity of each tensor's memory; valid while the tensors live."""
    return [t.untyped_storage()._cdata for t in tensors]


def _problems(op, args, kwargs) -> list[str]:
    found = []
    if op.overloadpacket in _INDEXING:
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            found.append(f"{op}: waits for the device, to count a mask")
    elif _NEEDS_VALUES_TAGS & set(op.tags) or op is aten._local_scalar_dense.default:
        found.append(f"{op}: waits for the device")
    if op is aten.lift_fresh.default:
        found.append(f"{op}: makes a tensor from values of the host")

    tensors = _tensors(args, kwargs)
    devices = {t.device.type for t in tensors}
    if op is aten._to_copy.default and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    if {"cpu", "cuda"} <= devices:
        if op in (aten._to_copy.default, aten.copy_.default):
            found.append(f"{op}: copies between host and device")
        elif any(t.ndim == 0 and t.device.type == "cpu" for t in tensors):
            found.append(f"{op}: a graph would keep the value of this 0-dim CPU tensor")
        else:
            found.append(f"{op}: takes a CPU tensor among CUDA tensors")
    return found


def _differences(first: Audit, later: Audit) -> list[str]:
    """The differences of a later call from the first, which a graph would repeat."""
    if first.ops != later.ops:
        return ["a later call runs other ops than the first"]
    pairs = zip(first.ops, first.constants, later.constants, strict=True)
    return [
        f"{op}: a graph would keep [{', '.join(was)}], a later call has [{', '.join(now)}]"
        for op, was, now in pairs
        if was != now
    ]


def _same_memory(before: Tensor, after: object) -> bool:
    return isinstance(after, Tensor) and storages([before]) == storages([after])


def _tensors(*trees) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def _compile(source: Path, library: Path) -> None:
    # Slow to import, and needed only here. One file of c10 headers needs no ninja.
    from torch.utils.cpp_extension import include_paths, library_paths

    command = ["g++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-isystem{path}" for path in include_paths()]
    command += [f"-L{path}" for path in library_paths()] + ["-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
