"""The networks that bench_unet.py times, and everybody who runs them.

Networks   diffusers' classes with random weights, drawn once and saved with save_pretrained; who
           runs them reads that folder. Layers that start from zeros (proj_out, the last convolution
           of a temporal one, biases) get small normal values, so that nothing multiplies by zero
Contenders a function of no arguments that makes one forward pass and returns its output in fp32 or
           bf16: vfengine.models.load_unet, or load_autoencoder; diffusers as it comes, eager; the
           same compiled by inductor with frozen weights; OpenVINO, from an IR that a process of its
           own converts
FLOPs      counted by costs.trace from fake tensors, attention included: torch's FlopCounterMode
           counts nothing for attention on a CPU
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lib import child_environment
from lib.costs import to_fake, trace
from lib.peak_memory import MIB
from vfengine.native import vfengine_native

REFERENCE = "diffusers fp32"
OURS, EAGER = "vfengine", "diffusers eager"
COMPILED, OPENVINO = "torch.compile, freezing", "OpenVINO"
NO_OPENVINO = (
    "OpenVINO is not installed, so none of its rows are here; "
    "pip install -c constraints.txt '.[bench]', or pip install openvino"
)


# -- networks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A class of diffusers and its configuration.

    stored: dtype of the weights in the folder
    method: what is timed
    """

    kind: str
    config: Mapping[str, object]
    stored: torch.dtype = torch.float32
    method: str = "forward"


NETWORKS = {
    "unet3d": Network(
        "UNet3DConditionModel",
        {
            "sample_size": 32,
            "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
            "block_out_channels": (64, 128, 256),
            "layers_per_block": 2,
            "cross_attention_dim": 64,
            "attention_head_dim": 32,
        },
    ),
    # Written out, though these are the defaults of the class: they are ModelScope's.
    "modelscope": Network(
        "UNet3DConditionModel",
        {
            "sample_size": 32,
            "down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
            "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 1024,
            "attention_head_dim": 64,
        },
        stored=torch.bfloat16,  # 1.4 billion weights: 2.8 GB instead of 5.6
    ),
    # As Stable Diffusion's, turned round: attention at the two coarser levels and in the middle.
    "unet2d": Network(
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (128, 256, 512),
            "layers_per_block": 2,
            "cross_attention_dim": 64,
            "attention_head_dim": (4, 8, 16),  # in this class the number of heads: of 32 each
        },
    ),
    # Stable Diffusion's and ModelScope's.
    "vae": Network(
        "AutoencoderKL",
        {
            "sample_size": 256,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
        },
        method="decode",
    ),
}


@dataclass(frozen=True)
class Case:
    """One network on one input.

    shape    of the sample: [1, C, N, H, W], or [1, C, H, W]
    tokens   of the context, [1, tokens, cross_attention_dim]; an autoencoder has none
    targets  how many times vfengine's time each contender's should be, at least
    also     contenders that are timed without a target
    rounds   turns that each contender takes, unless told otherwise
    memory   whether the peak of loading and one forward pass is read, each in its own process
    """

    name: str
    network: str
    shape: tuple[int, ...]
    targets: Mapping[str, float]
    tokens: int = 8
    also: tuple[str, ...] = ()
    rounds: int = 10
    memory: bool = False
    of_ceiling: float | None = field(default=None)  # % of the convolutions' GFLOP/s

    @property
    def contenders(self) -> tuple[str, ...]:
        return (OURS, *self.also, *self.targets)

    @property
    def description(self) -> str:
        widths = ", ".join(map(str, NETWORKS[self.network].config["block_out_channels"]))
        shape = "x".join(map(str, self.shape))
        kind = NETWORKS[self.network].kind
        context = f", {self.tokens} context tokens" if len(self.inputs()) > 1 else ""
        return f"{kind} ({widths}), {shape}{context}, bf16"

    def inputs(self) -> tuple[Tensor, ...]:
        """The same at every call: sample, timestep [1] and context; an autoencoder's latents."""
        random = torch.Generator().manual_seed(5)
        width = NETWORKS[self.network].config.get("cross_attention_dim")
        sample = torch.randn(self.shape, generator=random)
        if width is None:
            return (sample,)
        context = torch.randn(1, self.tokens, width, generator=random)
        return sample, torch.tensor([500]), context


def by_unit(tiles: float | None, vectors: float) -> float | None:
    """A target, on CPUs with a matrix unit or on others."""
    return tiles if vfengine_native.cpu_has_tiles() else vectors


def _frames(count: int, tokens: int = 8, rounds: int = 10) -> Case:
    name = f"unet3d-{count}" if tokens == 8 else f"unet3d-{tokens}tokens"
    shape = (1, 4, count, 32, 32)
    return Case(name, "unet3d", shape, {OPENVINO: by_unit(1.8, 1.6)}, tokens, (EAGER,), rounds)


CASES = {
    case.name: case
    for case in (
        Case(
            "unet3d",
            "unet3d",
            (1, 4, 16, 32, 32),
            {EAGER: 2.5, COMPILED: by_unit(2.0, 2.2), OPENVINO: by_unit(1.8, 1.6)},
            of_ceiling=by_unit(None, 78),
        ),
        _frames(8),
        _frames(24),
        _frames(64, rounds=5),
        _frames(16, tokens=77),
        Case(
            "modelscope",
            "modelscope",
            (1, 4, 16, 32, 32),
            {EAGER: by_unit(2.0, 1.6), OPENVINO: by_unit(1.5, 1.3)},
            tokens=77,
            rounds=3,
            memory=True,
        ),
        Case(
            "unet2d",
            "unet2d",
            (1, 3, 64, 64),
            {EAGER: by_unit(2.0, 1.8), OPENVINO: 1.3},
            rounds=20,
        ),
        Case(
            "vae-decoder",
            "vae",
            (1, 4, 32, 32),
            {EAGER: by_unit(2.0, 1.8), OPENVINO: 1.3},
            memory=True,
        ),
    )
}


def diffusers_class(network: str) -> type:
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of casts that do not concern these networks
    return getattr(diffusers, NETWORKS[network].kind)


def save_network(network: str, folder: Path) -> int:
    """Draws the weights and saves them; the number of parameters."""
    spec, before = NETWORKS[network], torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(spec.stored)
    try:
        model = diffusers_class(network)(**spec.config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.02)
    model.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


@functools.cache
def flops(case_name: str) -> int:
    """FLOPs of one forward pass: convolutions, matrix products, attention; two per multiply-add."""
    case = CASES[case_name]
    with torch.device("meta"):
        model = diffusers_class(case.network)(**NETWORKS[case.network].config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model, inputs = to_fake(model), case.inputs()
        return trace(lambda: _timed(case.network, model)(*inputs)).flops


def _timed(network: str, model: nn.Module) -> Callable:
    """The method of a network of diffusers that is timed; its forward goes by the object itself."""
    method = NETWORKS[network].method
    return model if method == "forward" else getattr(model, method)


# -- contenders ------------------------------------------------------------------------------------


def load(contender: str, case: Case, root: Path) -> Callable[[], Tensor]:
    """Reads the network in root / case.network, or OpenVINO's file of the case in root.

    What it returns makes a forward pass, and gives the output in the layout of case.shape.
    """
    if contender == OPENVINO:
        return _load_openvino(case, root)
    dtype = torch.float32 if contender == REFERENCE else torch.bfloat16
    network = _load_torch(contender, case, root, dtype)
    sample, *more = (x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    frames_second = contender == OURS and sample.dim() == 5  # vfengine's clips: [B, N, C, H, W]
    if frames_second:
        sample = sample.transpose(1, 2).contiguous()

    def call() -> Tensor:
        with torch.no_grad():
            out = as_tensor(network(sample, *more))
        return out.transpose(1, 2) if frames_second else out

    if contender == COMPILED:
        with torch._inductor.config.patch(freezing=True):
            call()
    return call


def _load_torch(contender: str, case: Case, root: Path, dtype: torch.dtype) -> Callable:
    folder = root / case.network
    if contender == OURS:
        from vfengine import models

        if NETWORKS[case.network].method == "decode":
            return models.load_autoencoder(folder, dtype=dtype).decode
        return models.load_unet(folder, dtype=dtype)
    network = diffusers_class(case.network).from_pretrained(folder, torch_dtype=dtype).eval()
    return torch.compile(network) if contender == COMPILED else _timed(case.network, network)


def as_tensor(output: object) -> Tensor:
    """The sample of a network that answers with a tensor, a tuple or an object of diffusers."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def relative_error(out: Tensor, exact: Tensor) -> float:
    """|out - exact| / |exact|, Euclidean norms over all elements."""
    exact = exact.float()
    return float((out.float() - exact).norm() / exact.norm())


def require_accuracy(where: str, errors: Mapping[str, float], peer: str, factor: float) -> None:
    """ValueError where vfengine's error is not at most factor times the peer's (or is NaN)."""
    if not errors[OURS] <= factor * errors[peer]:
        raise ValueError(
            f"{where}: the relative error of {OURS} is {errors[OURS]:.3g}, "
            f"expected at most {factor} times that of {peer}, {errors[peer]:.3g}"
        )


# -- OpenVINO --------------------------------------------------------------------------------------


class OutOfMemoryError(Exception):
    """OpenVINO could not convert a network on this machine."""


def has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def ir_file(case: Case, root: Path) -> Path:
    return root / f"{case.name}.xml"


def convert(case: Case, root: Path) -> None:
    """Writes ir_file, in a process of its own, which gives back what tracing took.

    Raises OutOfMemoryError if that process ran out of memory, RuntimeError if it failed otherwise.
    """
    command = [sys.executable, __file__, case.name, str(root)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    if done.returncode == 0:
        return
    out_of_memory = ("MemoryError", "bad_alloc", "can't allocate memory", "not enough memory")
    if done.returncode == -9 or any(words in done.stderr for words in out_of_memory):
        raise OutOfMemoryError(
            f"{case.name}: OpenVINO could not convert the network in the memory of this machine"
        )
    raise RuntimeError(f"{case.name}: OpenVINO's conversion failed:\n{done.stderr}")


class _Outputs(nn.Module):
    """A network of diffusers that returns a tensor, as tracing wants it."""

    def __init__(self, network: nn.Module, call: Callable) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs, return_dict=False)[0]


def _convert_here(case: Case, root: Path) -> None:
    """Traced in fp32, shapes fixed, saved as save_model does by default: weights in fp16."""
    import openvino

    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")  # where memory ends, this process ends and no other
    kind = diffusers_class(case.network)
    network = kind.from_pretrained(root / case.network, torch_dtype=torch.float32)
    inputs = case.inputs()
    with torch.no_grad():
        model = openvino.convert_model(
            _Outputs(network, _timed(case.network, network)).eval(),
            example_input=inputs,
            input=[openvino.PartialShape(list(tensor.shape)) for tensor in inputs],
        )
    openvino.save_model(model, ir_file(case, root))


def _load_openvino(case: Case, root: Path) -> Callable[[], Tensor]:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(ir_file(case, root), "CPU", settings)
    request = compiled.create_infer_request()
    inputs = [tensor.numpy() for tensor in case.inputs()]

    def call() -> Tensor:
        return torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])

    return call


# -- memory ----------------------------------------------------------------------------------------


def probe(contender: str, case_name: str, root: str) -> Callable[[], object]:
    """For peak_memory.measure: what loads the network and makes one forward pass."""
    case = CASES[case_name]
    if contender == OPENVINO:
        import openvino

        openvino.Core().available_devices  # noqa: B018  its plugins are loaded by that
    elif contender == OURS:
        from vfengine import models  # noqa: F401
    else:
        diffusers_class(case.network)
    return lambda: load(contender, case, Path(root))()


def weights_mib(network: str, root: Path) -> float:
    """The size of the weights on disk, to compare a peak with."""
    return sum(file.stat().st_size for file in (root / network).glob("*.safetensors")) / MIB


if __name__ == "__main__":
    _convert_here(CASES[sys.argv[1]], Path(sys.argv[2]))
    print(json.dumps({"written": str(ir_file(CASES[sys.argv[1]], Path(sys.argv[2])))}))
