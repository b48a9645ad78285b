"""What the workers of a model need, by its files; and what a GPU of the cluster has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..names import AUTO
from .sizes import Needs

if TYPE_CHECKING:
    from ..pipelines.pipeline import Pipeline

_PROCESS = 700 * 2**20  # bytes of Python, torch and the kernels


def needs_of(pipe: Pipeline, batch_size: int = 1) -> Needs:
    """The memory of workers that make the model's own clips, and how the phases share the work.

    By the headers of the weights' files, as `--dry-run` says it; for longer clips than the model's
    own it is more.
    """
    from ..pipelines.forecast import forecast
    from ..pipelines.request import SamplingRequest, TextRequest

    text = issubclass(pipe.request_type, TextRequest)
    shown = {"prompt": "a clip"} if text else {"label": next(iter(pipe.labels), None)}
    found = forecast(pipe, pipe.request_type(num_videos=batch_size, **shown), batch_size, True)
    memory = found.memory
    # a checkpoint's weights lie in memory twice while a CPU's kernels get them in their order
    sizes = {name: 2 * size + memory.activations[name] for name, size in memory.weights.items()}
    base = sizes.pop("base", 0)
    rest = sum(sizes.values()) + memory.clips + _PROCESS
    if not issubclass(pipe.request_type, SamplingRequest):
        return Needs(0, rest, 0.0)
    frames = found.request.window or found.request.num_frames
    works = {
        name: found.calls[name] * memory.weights[name] * (1 if name == "base" else frames)
        for name in ("base", "residual")
    }
    share = works["base"] / max(1, sum(works.values()))
    return Needs(base + sizes.get("text", 0) + _PROCESS, rest, share)


def probed(
    machines: Sequence[Mapping[str, float]], device: str, dtype: str, here: bool = True
) -> tuple[str, str, int | None]:
    """Device and dtype of all workers by their names, and a GPU's bytes of memory; None on CPUs.

    What "auto" stands for is decided once, for all: the device by whether the cluster has a GPU,
    the dtype by one of its GPUs, or by a CPU: this machine's, or, where no torch is to be imported
    here, any one's. Raises ValueError for cuda without GPUs.
    """
    import ray

    gpus = any(machine.get("GPU", 0) >= 1 for machine in machines)
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: Ray knows of no GPU in the cluster")
    if device != "cpu" and gpus:
        memory, auto = ray.get(ray.remote(num_gpus=1, num_cpus=0)(_of_gpu).remote())
        return "cuda", auto if dtype == AUTO else dtype, memory
    if dtype == AUTO:
        dtype = _of_cpu() if here else ray.get(ray.remote(num_cpus=0)(_of_cpu).remote())
    return "cpu", dtype, None


def _of_gpu() -> tuple[int, str]:
    """A GPU's bytes of memory, and the dtype that "auto" is on it."""
    import torch

    from ..devices import chosen_dtype

    device = torch.device("cuda")
    dtype = str(chosen_dtype(AUTO, device)).removeprefix("torch.")
    return torch.cuda.get_device_properties(device).total_memory, dtype


def _of_cpu() -> str:
    """The dtype that "auto" is on a CPU."""
    import torch

    from ..devices import chosen_dtype

    return str(chosen_dtype(AUTO, torch.device("cpu"))).removeprefix("torch.")
