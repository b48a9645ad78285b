"""media/pictures.py: bytes and the networks' range."""

import torch

from vfengine.media.pictures import network_to_pixels, pixels_to_network


def test_every_byte_comes_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(2, 16, 8, 1).expand(2, 16, 8, 3)
    x = pixels_to_network(pixels)
    assert (x.shape, x.dtype) == ((2, 3, 16, 8), torch.float32)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(network_to_pixels(x), pixels)


def test_values_beyond_the_range_are_clipped():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 5)
    assert network_to_pixels(x).flatten().tolist() == [0, 0, 128, 255, 255]
