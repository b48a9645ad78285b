"""Patches of pixels as channels (vfengine/models/patches.py), as pixel_unshuffle has them."""

import pytest
import torch
import torch.nn.functional as F

from vfengine.models.patches import from_patches, to_patches

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 3])
def test_patches_are_those_of_pixel_unshuffle(size, dtype):
    x = torch.randn(2, 3, 4 * size, 5 * size).to(dtype)
    patches = to_patches(x, size)
    assert torch.equal(patches, F.pixel_unshuffle(x, size))
    assert patches.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(from_patches(patches, size), x)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_pictures_in_any_memory_order(size):
    x = torch.randn(2, 3, 4 * size, 4 * size)
    turned = x.transpose(2, 3)
    assert torch.equal(to_patches(turned, size), F.pixel_unshuffle(turned, size))
    patches = F.pixel_unshuffle(x, size)
    assert torch.equal(from_patches(patches, size), F.pixel_shuffle(patches, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_patches(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype).requires_grad_()
    patches = to_patches(x, 4)
    grad = torch.randn_like(patches)
    (found,) = torch.autograd.grad(patches, [x], grad)
    assert torch.equal(found, F.pixel_shuffle(grad, 4))
    patches = grad.clone().requires_grad_()
    (found,) = torch.autograd.grad(from_patches(patches, 4), [patches], x.detach())
    assert torch.equal(found, F.pixel_unshuffle(x, 4))
