"""The processes of torchrun that train one model together, over torch.distributed.

Tensors on a CPU go through gloo, those on CUDA through NCCL. Gradients are reduced by
DistributedDataParallel, those of all networks together while the backward pass goes on, or by FSDP2
(`fully_shard`), where each process keeps a share of every weight.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..models.unet import Stage
from .team import FailedElsewhere, Lost, Team

T = TypeVar("T")

ANSWER = timedelta(minutes=10)  # of a step: who is silent for longer is lost
_PATIENCE = timedelta(days=30)  # while the first process renders clips or writes files


class Processes(Team):
    """The processes that torchrun started, told apart by its environment variables.

    status_of: the exit status that an error comes to
    """

    def __init__(
        self, run: str | None, restarted: bool, status_of: Callable[[Exception], int]
    ) -> None:
        super().__init__(run, restarted)
        self.rank, self.size, self._local_rank = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        self._status_of = status_of
        self.failed = False

    def open(self) -> None:
        with self.noticing():
            store, _, _ = next(rendezvous("env://", timeout=ANSWER))
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an earlier one left words
            self._store = dist.PrefixStore(f"start-{start}", store)
            both = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if both else "gloo",
                store=dist.PrefixStore("training", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=ANSWER,
            )
            self._words = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def close(self) -> None:
        dist.destroy_process_group()

    def speaks(self) -> bool:
        try:
            return self._store.add("told", 1) == 1
        except (AttributeError, RuntimeError):  # there is nobody to ask
            return True

    def device(self, name: str) -> str:
        if name.startswith("cuda:"):
            raise ValueError(
                f"device {name!r} under torchrun: with cuda, each process takes the GPU of its own "
                "number"
            )
        if name != "cuda":
            return name
        own = f"cuda:{self._local_rank}"
        if self._local_rank < torch.cuda.device_count():  # else the caller finds out
            torch.cuda.set_device(self._local_rank)
        return own

    # -- words ---------------------------------------------------------------------------------

    def agreed(self, work: Callable[[], T]) -> T:
        return self._together(work)[0]

    def of_first(self, work: Callable[[], T]) -> T:
        _, told = self._together(lambda: work() if self.is_first else None, tells=True)
        return told

    def in_turn(self, work: Callable[[], T]) -> T:
        first = self.agreed(lambda: work() if self.is_first else None)
        rest = self.agreed(lambda: None if self.is_first else work())
        return first if self.is_first else rest

    def _together(self, work: Callable[[], Any], tells: bool = False) -> tuple[Any, Any]:
        """What `work` returns here, and, if the first process tells, what it returned there.

        An error is told to the others once: where they are by then, it ends what they wait for.
        """
        value = error = None
        try:
            value = work()
        except Exception as caught:
            if self.failed:
                raise
            error = caught
        word = (self._status_of(error) if error else 0, value if tells and self.is_first else None)
        words: list[Any] = [None] * self.size
        with self.noticing():
            dist.all_gather_object(words, word, group=self._words)
        if status := max(status for status, _ in words):
            self.failed = True
            raise FailedElsewhere(status) if error is None else error
        return value, words[0][1]

    def largest(self, value: int) -> int:
        found = torch.tensor(value, dtype=torch.int64, device="cpu")
        with self.noticing():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    # -- tensors -------------------------------------------------------------------------------

    def sum_(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    @contextmanager
    def noticing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _is_of_others(error):
                raise
            self.failed = True
            raise Lost(_reason(error)) from error

    def reducing(self, losses: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name is not in older torches
            return DistributedDataParallel(
                losses, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def postponed(self, losses: nn.Module) -> AbstractContextManager[Any]:
        is_reduced = isinstance(losses, DistributedDataParallel)
        return losses.no_sync() if is_reduced else super().postponed(losses)

    def shard(self, network: nn.Module, device: torch.device) -> None:
        mesh = init_device_mesh(device.type, (self.size,))
        network.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other
        for module in list(network.modules()):
            if isinstance(module, Stage):
                fully_shard(module, mesh=mesh)
        fully_shard(network, mesh=mesh)

    def whole(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        whole = tensor.detach().full_tensor()
        return whole.cpu() if self.is_first else whole[:0]

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        if not isinstance(tensor, DTensor):
            tensor.copy_(value)
            return
        shares = value.chunk(self.size)  # as fully_shard cuts them: fewer, if rows are few
        tensor.to_local().copy_(shares[self.rank] if self.rank < len(shares) else value[:0])

    def own(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        return [each.to_local() if isinstance(each, DTensor) else each for each in tensors]


def _is_of_others(error: RuntimeError) -> bool:
    """Whether an error is one of the connection to other processes."""
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)


def _reason(error: RuntimeError) -> str:
    """An error of gloo or NCCL in a few words."""
    line = str(error).strip().splitlines()[0]
    said = line.rpartition(".cc:")[2].partition("] ")[2] or line
    return said.partition(". ")[0].rstrip(".")
