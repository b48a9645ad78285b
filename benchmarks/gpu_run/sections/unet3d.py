"""diffusers' UNet3D of the large size: as it comes, compiled, and its weights in our network.

A step is the network and DDIM's line for all frames, in a CUDA graph captured by hand. Compiling
the whole network at once was cut off after three minutes, so each of its blocks (3 down, the
middle, 3 up) is compiled as a whole, prepared in a process of its own.
"""

from __future__ import annotations

import tempfile

import torch
from lib.table4_models import Networks, make_noise, size
from torch import Tensor, nn

from gpu_run.sections import DEVICE, DRY, PREPARE, guarded, prepared_in_parts, verdict
from gpu_run.sections.peers import Step, captured, channels_last, eager, measure
from vfengine.models import load_unet

CASE, NAME = "large, 1 clip", "diffusers UNet3D"
BLOCKS = ("0", "1", "2", "3", "4", "5", "6")
LARGEST = 0.1  # of two networks' relative difference: both round to bf16 at every layer


class Ours(nn.Module):
    """A UNet of ours as (z, t) -> ε̂, with the context of lib.table4_models.Peer."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        context = torch.zeros(len(z), 8, 64, dtype=self.unet.dtype, device=z.device)
        return self.unet(z.to(self.unet.dtype), t, context).to(z.dtype)


@torch.no_grad()
def main() -> None:
    part = prepared_in_parts("unet3d", BLOCKS) if PREPARE else None
    if PREPARE and part is None:
        return
    with guarded(CASE, contender=NAME, dtype="bf16"):
        shape = size("tiny" if DRY else "large")
        peer = Networks(shape, DEVICE, torch.bfloat16, keep=True)("peer")
        z = make_noise(shape, DEVICE, clips=1).clip
        theirs = Step(peer).to(DEVICE).eval()
        if not PREPARE:
            compare(peer, theirs, z)
        channels_last(peer)
        compile_blocks(peer.unet, part)
        name = f"{NAME}, compiled by block, captured"
        measure(CASE, name, lambda: captured(theirs, z))


def compare(peer: nn.Module, theirs: nn.Module, z: Tensor) -> None:
    """What needs no compiler: theirs, and their weights in our network."""
    with tempfile.TemporaryDirectory() as folder:
        peer.unet.save_pretrained(folder)
        ours = Step(Ours(load_unet(folder, dtype=torch.bfloat16, device=DEVICE))).to(DEVICE).eval()
    expected = theirs(z)
    error = float((ours(z) - expected).norm() / expected.norm())
    verdict(CASE, error <= LARGEST, f"relative difference {error:.3g}", contender=f"{NAME}, ours")
    measure(CASE, f"{NAME}, ours, captured", lambda: captured(ours, z))
    measure(CASE, f"{NAME}, eager", lambda: eager(theirs, z), graph=False)
    measure(CASE, f"{NAME}, captured", lambda: captured(theirs, z))


def compile_blocks(unet: nn.Module, part: str | None) -> None:
    """All of the network's blocks, or the one of this number; no dry run is for compilers."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    for number, block in zip(BLOCKS, blocks, strict=True):
        if part in (None, number) and not DRY:
            block.compile(dynamic=False)


if __name__ == "__main__":
    main()
