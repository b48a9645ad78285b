"""CUDA devices that are pretended on a CPU, each with a memory of its own.

A tensor of one is a CPU tensor that says it lies there. Its operations are the CPU's, so that clips
can be compared bit for bit. An operation on tensors of two memories raises, as on a GPU: only
copies pass from one to the other, and `Memories.crossed` lists them. Streams are stub_cuda's.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from stub_cuda import StubCuda
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from vfengine.ops import _dispatch
from vfengine.pipelines.session import Session

CPU, DEVICES = torch.device("cpu"), 2
_COPIES = ("to", "cpu", "copy_")


class Crossing(NamedTuple):
    """A copy from one memory to another."""

    source: str
    target: str
    shape: tuple[int, ...]


class Placed(Tensor):
    """A CPU tensor that says it is on a CUDA device."""

    place: torch.device
    device = property(lambda self: self.place)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, crossed=None)


class Memories(TorchFunctionMode):
    """Makes tensors on pretended devices, and notes the copies between memories.

    cuda: notes what streams wait for; those of the second device are called "... of cuda:1"
    """

    def __init__(self, cuda: StubCuda) -> None:
        super().__init__()
        self.crossed: list[Crossing] = []
        self.cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {}, self.crossed)


class PlacedNetwork(nn.Module):
    """A network of the CPU that takes tensors of one device only, and returns such."""

    def __init__(self, network: Callable[..., Tensor], device: torch.device) -> None:
        super().__init__()
        self.network, self.place = network, device

    def forward(self, *arguments, **options):
        return self._run(self.network, *arguments, **options)

    def decode(self, latents, **options):
        return self._run(self.network.decode, latents, **options)

    def encode(self, pictures):
        return self._run(self.network.encode, pictures)

    def _run(self, call, *arguments, **options):
        here = {place_of(leaf) for leaf in tree_leaves((arguments, options)) if _is_tensor(leaf)}
        if here != {_indexed(self.place)}:
            raise RuntimeError(f"a network on {self.place} was given tensors on {here}")
        with torch._C.DisableTorchFunction():
            out = call(*tree_map(_bare, arguments), **tree_map(_bare, options))
            return _placed(out, _indexed(self.place))

    def __getattr__(self, name):
        if name == "in_loop":  # would make the network's tensors itself
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)


@pytest.fixture
def memories(monkeypatch):
    """Pretends two CUDA devices, for pipelines and loops that the test makes; yields `Memories`."""
    cuda = StubCuda(monkeypatch)

    def current_stream(device: torch.device | None = None) -> StubCuda.Stream:
        index = 0 if device is None else _indexed(device).index
        return cuda.Stream(cuda, cuda.here() + (f" of cuda:{index}" if index else ""))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: DEVICES)
    choose, load, place = _dispatch.choose_backend, Session.load, Session.place
    for name, module in list(sys.modules.items()):
        if name.startswith("vfengine.ops.") and hasattr(module, "choose_backend"):
            monkeypatch.setattr(
                module,
                "choose_backend",
                lambda op, backend, device, *rest, **more: choose(op, backend, CPU, *rest, **more),
            )

    def load_on_the_cpu(session: Session, name: str) -> nn.Module:
        device = place(session, name)
        with monkeypatch.context() as patch, torch._C.DisableTorchFunction():
            patch.setattr(Session, "place", lambda *_: CPU)
            return PlacedNetwork(load(session, name), device)

    monkeypatch.setattr(Session, "load", load_on_the_cpu)
    with Memories(cuda) as found:
        yield found


def place_of(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, Placed) else CPU


def _call(func, args, kwargs, crossed):
    """What func gives on the CPU, on the device that its tensors or its arguments name."""
    if func is torch.device:
        return func(*args, **kwargs)
    name = getattr(func, "__name__", "")
    tensors = list(filter(_is_tensor, tree_leaves((args, kwargs))))
    target = _named(name, args, kwargs)
    here = place_of(tensors[0]) if tensors else CPU
    if name in _COPIES and tensors:
        source = tensors[-1] if name == "copy_" else tensors[0]
        target = here if name == "copy_" else target
        if target is not None and place_of(source) != target and crossed is not None:
            names = str(place_of(source)), str(target)
            crossed.append(Crossing(*names, tuple(_bare(source).shape)))
    else:
        here = _shared(name, tensors)
    there = here if target is None else target
    bare_args, bare_kwargs = tree_map(_on_cpu, (args, kwargs))
    with torch._C.DisableTorchFunction():
        out = func(*bare_args, **bare_kwargs)
        if there != here and tensors:
            out = out.clone()  # `to` may return its input
        if there == CPU:
            return out
        own = {id(bare): arg for bare, arg in zip(bare_args, args, strict=True)}
        return tree_map(lambda leaf: own.get(id(leaf), _placed(leaf, there)), out)


def _shared(name: str, tensors: list[Tensor]) -> torch.device:
    """The one device of the tensors; numbers of the CPU, without axes, may go with any."""
    places = {place_of(one) for one in tensors if _bare(one).ndim or isinstance(one, Placed)}
    if len(places) > 1:
        shown = ", ".join(sorted(map(str, places)))
        raise RuntimeError(f"{name}: expected all tensors on one device, found {shown}")
    return places.pop() if places else CPU


def _named(name: str, args: tuple, kwargs: dict) -> torch.device | None:
    """The device that a call names, if it does."""
    if name == "cpu":
        return CPU
    named = kwargs.get("device")
    if named is None and name == "to":
        named = next((arg for arg in args[1:] if isinstance(arg, torch.device | str)), None)
    return None if named is None else _indexed(torch.device(named))


def _indexed(device: torch.device) -> torch.device:
    return CPU if device.type == "cpu" else torch.device("cuda", device.index or 0)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _placed(leaf, device: torch.device):
    if not isinstance(leaf, Tensor) or device == CPU:
        return leaf
    leaf = leaf.as_subclass(Placed)
    leaf.place = device
    return leaf


def _bare(leaf):
    if not isinstance(leaf, Placed):
        return leaf
    with torch._C.DisableTorchFunction():
        return leaf.as_subclass(Tensor)


def _on_cpu(leaf):
    is_cuda = isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf[:4] == "cuda")
    return CPU if is_cuda else _bare(leaf)
