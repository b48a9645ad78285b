"""What int8 would do to a decomposed model: its error beside bf16's, emulated in PyTorch.

    python benchmarks/study_int8.py [--label NAME ...] [--unet3d] [--work FOLDER] [--json FILE]

W8A8  weights in int8 with a scale per output channel, activations with one per row, both
      symmetric: a pixel's channels, or a token's. 3x3 convolutions, those over frames, shortcuts
      and linear layers take them. The first and the last layer, embeddings, norms and attention
      do not, and stay in fp32 here: int8 in a plan would err by bf16's error on top.
1. Clips are sampled in fp32. On what the networks saw at some of the steps, every form's output is
   compared with fp32's: relative L2 error.
2. The same clips are sampled in bf16 and in int8: difference of pixels from fp32's, of 255. A sheet
   of each goes into --work.
With --unet3d the first is read on the UNet3D of bench_unet.py as well, whose weights are random.

docs/networks.md says what came of it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lib.harness import Row, machine, say, table, write_json
from lib.unet_contenders import CASES, relative_error, save_network
from PIL import Image
from torch import Tensor, nn

from vfengine import VideoFusionPipeline
from vfengine.formats.checkpoint import DecomposedConfig, load_network, read_config
from vfengine.formats.load import read_unet
from vfengine.media.pictures import sheet, to_uint8
from vfengine.models import UNet, for_inference

MOST = 127  # of int8, symmetric
KEPT = (  # layers that stay as they are
    *("conv_in", "conv_out", "time_embedding", "class_embedding", "frame_embedding"),
    *("embedding_mixer", "time_emb_proj"),
)
CONVOLUTIONS, LINEARS = "convolutions", "linear layers"
BF16 = "bf16"

Inputs = list[tuple[Tensor, Tensor, dict[str, Tensor]]]  # of a UNet: x, t, conditions


# -- the quantiser ---------------------------------------------------------------------------------


def quantised(x: Tensor, largest: Tensor) -> Tensor:
    """x rounded to the 255 multiples of largest / 127 from -largest to largest, as fp32.

    largest: what the scale is made of, broadcast with x; 0 where x is 0 throughout
    """
    step = torch.where(largest > 0, largest / MOST, 1.0)
    return (x / step).round().clamp(-MOST, MOST) * step


@dataclass(frozen=True)
class Form:
    """A way to quantise a network.

    layers       which kinds
    weights      in int8, with a scale per output channel
    activations  in int8: "row", a scale per row; "tensor", one per layer, of the largest number
                 that the first clip shows it; None: not
    """

    layers: tuple[str, ...] = (CONVOLUTIONS, LINEARS)
    weights: bool = True
    activations: str | None = "row"


FORMS = {
    "W8A8": Form(),
    "its convolutions alone": Form(layers=(CONVOLUTIONS,)),
    "its linear layers alone": Form(layers=(LINEARS,)),
    "its weights alone": Form(activations=None),
    "its activations alone": Form(weights=False),
    "one static scale a layer": Form(activations="tensor"),
}


def layers(unet: UNet, kinds: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of all layers of these kinds that int8 would take."""
    types = {CONVOLUTIONS: nn.Conv2d, LINEARS: nn.Linear}
    for name, layer in unet.named_modules():
        kept = any(part in KEPT for part in name.split("."))
        if not kept and isinstance(layer, tuple(types[kind] for kind in kinds)):
            yield name, layer


def quantised_unet(unet: UNet, form: Form, largest: Mapping[str, float] | None = None) -> UNet:
    """A copy whose layers round as int8 would.

    largest: activation of each layer, by name; for scales that are static
    """
    unet = copy.deepcopy(unet)
    for name, layer in layers(unet, form.layers):
        if form.weights:
            weight = layer.weight.detach().flatten(1)
            rounded = quantised(weight, weight.abs().amax(1, keepdim=True))
            layer.weight = nn.Parameter(rounded.view_as(layer.weight), requires_grad=False)
        if form.activations == "row":
            channels = 1 if isinstance(layer, nn.Conv2d) else -1
            layer.register_forward_pre_hook(partial(_round_rows, channels))
        elif form.activations == "tensor":
            layer.register_forward_pre_hook(partial(_round_all, torch.tensor(largest[name])))
    return unet


def _round_rows(channels: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = inputs
    return quantised(x, x.abs().amax(channels, keepdim=True)), *rest


def _round_all(largest: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *rest = inputs
    return quantised(x, largest), *rest


def largest_activations(unet: UNet, inputs: Inputs) -> dict[str, float]:
    """The largest absolute number in each layer's input, over the network's first samples."""
    found: dict[str, float] = {}

    def see(name: str, _: nn.Module, layer_inputs: tuple[Tensor, ...]) -> None:
        found[name] = max(found.get(name, 0.0), float(layer_inputs[0].abs().max()))

    hooks = [
        layer.register_forward_pre_hook(partial(see, name))
        for name, layer in layers(unet, (CONVOLUTIONS, LINEARS))
    ]
    for x, t, conditions in inputs:
        unet(x[:1], t[:1], **{name: value[:1] for name, value in conditions.items()})
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def error_rows(name: str, unet: UNet, inputs: Inputs) -> list[Row]:
    """Every form's relative L2 error against fp32: mean and largest over the inputs."""
    exact = [unet(x, t, **conditions) for x, t, conditions in inputs]
    largest, rows = largest_activations(unet, inputs), []
    for contender in (BF16, *FORMS):
        if contender == BF16:
            network = for_inference(copy.deepcopy(unet), torch.bfloat16, "cpu")
        else:
            network = quantised_unet(unet, FORMS[contender], largest)
        errors = [
            relative_error(network(x, t, **conditions), out)
            for (x, t, conditions), out in zip(inputs, exact, strict=True)
        ]
        mean = sum(errors) / len(errors)
        rows.append(Row(name, contender, "error", 100 * mean, "%"))
        rows.append(Row(name, contender, "largest", 100 * max(errors), "%"))
        say(f"{name}, {contender}: {100 * mean:.2f} %")
    return rows


# -- the shipped model -----------------------------------------------------------------------------

Make = Callable[[str, UNet], nn.Module]  # from a network's name and UNet: what runs in its place


class Seen(nn.Module):
    """A UNet in fp32 that keeps what every `every`-th call of it was given."""

    def __init__(self, unet: UNet, every: int) -> None:
        super().__init__()
        self.unet, self.every, self.calls = unet, every, 0
        self.inputs: Inputs = []

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        if self.calls % self.every == 0:
            kept = {name: value.clone() for name, value in conditions.items()}
            self.inputs.append((x.clone(), t.clone(), kept))
        self.calls += 1
        return self.unet(x, t, **conditions)


def generate(config: DecomposedConfig, options: argparse.Namespace, make: Make) -> np.ndarray:
    """uint8 clips [B, N, H, W, 3], one a label, of the same noise whatever `make` does."""
    place = {"device": "cpu", "dtype": torch.float32}
    pipeline = VideoFusionPipeline.from_pretrained(options.model, **place)
    for name in config.networks:
        network = load_network(options.model, config, name)
        network.unet = make(name, network.unet)
        pipeline._session.networks[name] = network  # in place of the one that it would read
    steps = {"solver": "ddim", "num_inference_steps": options.num_inference_steps}
    steps["offload_base"] = False
    return to_uint8(pipeline(options.label, **steps).frames)


def pixel_rows(case: str, form: str, clips: np.ndarray, exact: np.ndarray) -> list[Row]:
    """How far clips are from those in fp32: RMS and largest difference, of 255."""
    difference = np.abs(clips.astype(np.float64) - exact)
    rms = float(np.sqrt((difference**2).mean()))
    return [
        Row(case, form, "RMS difference", rms, "of 255"),
        Row(case, form, "largest", float(difference.max()), "of 255"),
    ]


def measure(options: argparse.Namespace) -> list[Row]:
    """Rows of errors per network, then of pixels."""
    config = read_config(options.model)
    if not isinstance(config, DecomposedConfig):
        raise ValueError(f"study_int8: expected a decomposed model, got {config.objective}")
    unknown = set(options.label) - set(config.labels)
    if unknown:
        raise ValueError(f"study_int8: expected labels of {config.labels}, got {sorted(unknown)}")
    seen: dict[str, Seen] = {}
    rows: list[Row] = []

    def keep(name: str, unet: UNet) -> nn.Module:
        seen[name] = Seen(unet, options.every)
        return seen[name]

    clips = {"fp32": generate(config, options, keep)}
    for name, network in seen.items():
        rows += error_rows(f"{name} network", network.unet, network.inputs)
    if options.unet3d:
        rows += random_rows()
    clips[BF16] = generate(
        config, options, lambda _, unet: for_inference(unet, torch.bfloat16, "cpu")
    )
    clips["W8A8"] = generate(config, options, lambda _, unet: quantised_unet(unet, Form()))
    case = f"{len(options.label)} clips of {options.num_inference_steps} steps"
    for form in (BF16, "W8A8"):
        rows += pixel_rows(case, form, clips[form], clips["fp32"])
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        for form, made in clips.items():
            picture = sheet(made, columns=config.num_frames)
            Image.fromarray(picture).save(options.work / f"{form}.png")
    return rows


def random_rows() -> list[Row]:
    """The errors on bench_unet.py's UNet3D, which diffusers draws."""
    case = CASES["unet3d"]
    x, t, context = case.inputs()
    with tempfile.TemporaryDirectory() as folder:
        save_network(case.network, Path(folder))
        unet = read_unet(folder, torch.float32)
    inputs = [(x.transpose(1, 2).contiguous(), t, {"context": context})]
    return error_rows("UNet3D, random weights", unet, inputs)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the one shipped")
    parser.add_argument("--label", nargs="+", default=["cartwheel", "kick", "walk", "dance_b"])
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--every", type=int, default=7, help="which steps errors are read at")
    parser.add_argument("--unet3d", action="store_true", help="errors of a UNet3D, too (diffusers)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="write sheets of clips there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    options = parser.parse_args(argv)
    rows = measure(options)
    print(machine())
    print(table(rows))
    if options.json:
        write_json(options.json, rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
