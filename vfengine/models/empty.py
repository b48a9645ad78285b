"""How networks are made: without weights, which they are about to be given, or with new ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def without_weights() -> Iterator[None]:
    """Layers made inside are on the meta device."""
    with torch.device("meta"), _WithoutInitialisation():
        yield


@contextmanager
def new_weights() -> Iterator[None]:
    """Layers made inside are fp32 on the CPU, whatever torch's defaults are."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(former)


class _WithoutInitialisation(TorchFunctionMode):
    """Leaves new weights uninitialised: they are about to be replaced.

    Initialising on the meta device would also import torch._dynamo, a second of a cold start.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))
