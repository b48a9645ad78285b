"""How well does the default model's autoencoder draw? PSNR, and flicker from frame to frame.

    python benchmarks/judge_autoencoder.py [--model FOLDER] [--sheet FILE] [--json FILE]

Clips are rendered from a seed that no training uses, in pairs of colours that no training sees.

- PSNR of frames, in dB: the mean over all, the worst clip's, and that of pixels near the figure.
- Flicker: where a pixel of the real clip stays the same, how far the decoded one strays from its
  own mean over time, in levels of 255. Real clips have 0.
"""

import argparse
import sys
from pathlib import Path

import torch
from lib.harness import Row, write_json
from torch import Tensor
from tqdm import tqdm

from vfengine.formats.checkpoint import DEFAULT, read_config
from vfengine.formats.parts import load_checkpoint_autoencoder, read_autoencoder
from vfengine.media.pictures import network_to_pixels, pixels_to_network, sheet
from vfengine.media.video import write_video
from vfengine.models.autoencoder import Autoencoder, Decoder, Encoder
from vfengine.training.autoencoder import psnr
from vfengine.training.mocap import Renderer, draw_scene

HELD_OUT_SEED = 1_000_003
NEAR = 9  # pixels, along each side: the neighbourhood of what moves


def load(folder: Path) -> Autoencoder:
    """In float32, from a model's checkpoint or from that of `--objective autoencoder`."""
    if (folder / "base.safetensors").is_file():
        return load_checkpoint_autoencoder(folder, read_config(folder))
    config, state, _, _ = read_autoencoder(folder)
    autoencoder = Autoencoder(config, Decoder(config), Encoder(config))
    autoencoder.load_state_dict({name: value.float() for name, value in state.items()})
    return autoencoder


def near_figure(clips: Tensor) -> Tensor:
    """bool [M, N, H, W]: pixels near one that moves in uint8 clips [M, N, H, W, 3]."""
    moves = (clips.float() - clips[:, :1].float()).abs().amax((1, 4)) > 8  # [M, H, W]
    wide = torch.nn.functional.max_pool2d(moves.float(), NEAR, 1, NEAR // 2) > 0
    return wide[:, None].expand(clips.shape[:-1])


def flicker(real: Tensor, decoded: Tensor) -> float:
    """Standard deviation over time, in levels, of decoded pixels whose real ones stay the same."""
    still = ((real - real[:, :1].int()).abs().amax((1, 4)) == 0)[:, None, :, :, None]
    strayed = decoded.float().var(1, correction=0, keepdim=True) * still
    return float((strayed.sum() / (still.sum() * 3)).sqrt())


@torch.inference_mode()
def measure(autoencoder: Autoencoder, clips: Tensor) -> tuple[dict[str, float], Tensor]:
    """The figures of uint8 clips [M, N, H, W, 3], and the decoded clips."""
    decoded = torch.stack(
        [
            network_to_pixels(autoencoder.decode(autoencoder.encode(pixels_to_network(clip))))
            for clip in tqdm(clips, desc="clips", disable=None)
        ]
    )
    per_frame = psnr(clips.flatten(0, 1), decoded.flatten(0, 1)).view(clips.shape[:2])
    near = near_figure(clips)
    error = (clips.float() - decoded.float()).square().mean(-1)
    figures = {
        "PSNR, frames": float(per_frame.mean()),
        "PSNR, worst clip": float(per_frame.mean(1).min()),
        "PSNR, near the figure": float(10 * (255**2 / error[near].mean()).log10()),
        "flicker": flicker(clips, decoded),
    }
    return figures, decoded


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=DEFAULT, help="checkpoint folder")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--sheet", type=Path, help="real frames and, below, decoded ones")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    scenes = [draw_scene(HELD_OUT_SEED, i, held_out=True) for i in range(options.clips)]
    clips = Renderer().clips(scenes)
    figures, decoded = measure(load(options.model), clips)
    rows = []
    for name, value in figures.items():
        unit = "levels" if name == "flicker" else "dB"
        print(f"{name:24} {value:6.2f} {unit}")
        rows.append(Row("autoencoder", options.model.name, name, value, unit))
    if options.sheet:
        pairs = torch.stack([clips[:8, 8], decoded[:8, 8]]).flatten(0, 1)
        write_video(options.sheet, sheet(pairs.numpy(), columns=8)[None])
    if options.json:
        write_json(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
