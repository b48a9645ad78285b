"""benchmarks/judge_autoencoder.py: what it calls flicker, and what it calls near the figure."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from judge_autoencoder import flicker, load, measure, near_figure

from vfengine.formats.parts import save_autoencoder
from vfengine.models.autoencoder import Autoencoder, AutoencoderConfig, Decoder, Encoder

SMALL = AutoencoderConfig(
    latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_groups=4, patch_size=2
)


@pytest.fixture
def clips():
    """A bright square of 6 x 6 that goes right before a grey wall, uint8 [1, 4, 32, 32, 3]."""
    clips = torch.full((1, 4, 32, 32, 3), 90, dtype=torch.uint8)
    for i in range(4):
        clips[0, i, 10:16, 4 * i : 4 * i + 6] = 250
    return clips


def test_flicker_is_what_still_pixels_stray(clips):
    assert flicker(clips, clips) == 0
    brighter = clips + 3  # wrong, but steady
    assert flicker(clips, brighter) == 0
    waves = torch.tensor([2, -2, 2, -2]).view(1, 4, 1, 1, 1)
    assert flicker(clips, (clips.int() + waves).byte()) == pytest.approx(2, abs=1e-3)
    moving = clips.clone()
    moving[0, :, 10:16, :18] = torch.randint(0, 255, (4, 6, 18, 3), dtype=torch.uint8)
    assert flicker(clips, moving) == 0  # where the real clip changes, nothing is asked


def test_near_is_where_something_moves_and_four_pixels_on(clips):
    near = near_figure(clips)
    assert near.shape == (1, 4, 32, 32)
    rows, columns = near[0, 0].nonzero().unbind(1)
    assert (rows.min(), rows.max()) == (6, 19)
    assert (columns.min(), columns.max()) == (0, 21)


def test_figures_of_a_folder(clips, tmp_path):
    torch.manual_seed(0)
    network = Autoencoder(SMALL, Decoder(SMALL), Encoder(SMALL))
    save_autoencoder(tmp_path / "ae", SMALL, network.state_dict(), (0.0,) * 4, (1.0,) * 4)
    figures, decoded = measure(load(tmp_path / "ae"), clips)
    assert decoded.shape == clips.shape
    assert figures["PSNR, worst clip"] == pytest.approx(figures["PSNR, frames"])
    assert 0 < figures["PSNR, near the figure"] < 60
