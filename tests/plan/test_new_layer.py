"""A new layer can be planned: it is one class, with its forward and its plan."""

import copy

import pytest
import torch
import torch.nn.functional as F
from seeded import filled, normal
from test_planned import IMAGE, distance
from torch import Tensor, nn

from vfengine.models import PlannedUNet, UNet
from vfengine.models.layers import FeedForward, GroupNorm, images, rows


class Mixer(nn.Module):
    """x + ff(norm(SiLU(norm(conv(x))))), which no layer of vfengine computes."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm, self.layer_norm = GroupNorm(4, channels), nn.LayerNorm(channels)
        self.ff = FeedForward(channels, 3)

    def forward(self, x: Tensor, num_frames: int, context: Tensor | None) -> Tensor:
        h = self.norm(self.conv(x), silu=True)
        h = self.ff(self.layer_norm(rows(h)))
        return x + images(h, *x.shape[-2:])

    def plan(self, build, x, context):
        h = build.group_norm(build.conv(x, self.conv), self.norm, silu=True)
        return self.ff.plan(build, build.layer_norm(h, self.layer_norm), residual=x)


class Pool(nn.Module):
    """Of what there is no kernel."""

    def forward(self, x: Tensor, num_frames: int, context: Tensor | None) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1)


def with_layers(layer: type[nn.Module], *arguments: int) -> UNet:
    """A UNet that has the layer on its way down, where it leaves a skip, and in the middle."""
    unet = UNet(IMAGE)
    unet.down[0][0].spatial = layer(*(arguments and (16,)))
    unet.mid[0].spatial = layer(*(arguments and (24,)))
    return filled(unet)


def test_a_layer_is_planned_by_its_own_plan():
    unet = with_layers(Mixer, 1)
    x, t = normal(2, 3, 8, 12), torch.tensor([7, 801])
    with torch.no_grad():
        expected = unet(x, t)
        plain = copy.deepcopy(unet)
        plain.mid[0].spatial = None
        assert distance(plain(x, t), expected.double()) > 0.01, "it makes a difference"
    mixer = unet.mid[0].spatial
    planned = PlannedUNet(unet, torch.float32)
    assert distance(planned(x, t), expected.double()) < 1e-5
    for batch in (1, 2):
        assert torch.equal(planned(x[:batch], t[:batch]), planned(x, t)[:batch])
    packed = (mixer.conv, mixer.ff.proj, mixer.ff.out)
    assert not any(p.numel() for layer in packed for p in layer.parameters()), "held once"
    addresses = {buffer.data_ptr() for buffer in planned.buffers()}
    for layer in packed:
        assert planned._packed.forms[layer].weights[0].packed.data_ptr() in addresses


def test_a_layer_without_a_plan_is_named():
    with pytest.raises(AttributeError, match="'Pool' object has no attribute 'plan'"):
        PlannedUNet(with_layers(Pool), torch.float32)


@pytest.mark.parametrize("change", [{"dilation": 2}, {"groups": 2}, {"padding": 0}, {"stride": 3}])
def test_a_convolution_without_a_kernel_is_refused(change):
    unet = with_layers(Mixer, 1)
    unet.mid[0].spatial.conv = nn.Conv2d(24, 24, 3, **{"padding": 1, **change})
    with pytest.raises(ValueError, match=r"plans have convolutions of 3x3 or 3 frames.*got Conv2d"):
        PlannedUNet(unet, torch.float32)
