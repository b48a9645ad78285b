"""What networks take as timesteps and labels, plain and planned, and what they refuse by name."""

import numpy as np
import pytest
import torch

import vfengine
from vfengine.formats.checkpoint import load_network

T, LABELS = torch.tensor([7, 7]), torch.tensor([0, 1])
CLIPS = {
    "z": torch.linspace(-1, 1, 2 * 4 * 3 * 256).view(2, 4, 3, 16, 16),
    "x": torch.linspace(-1, 1, 2 * 4 * 6 * 256).view(2, 4, 6, 16, 16),
}


@pytest.fixture(scope="module", params=["generator", "unet", "planned generator", "planned unet"])
def network(request, tiny_checkpoint):
    """(network, its input's name in CLIPS)."""
    pipe = vfengine.load_pipeline(tiny_checkpoint, device="cpu", dtype=torch.float32)
    if "planned" in request.param:
        made = pipe._session.load("residual")
    else:
        made = load_network(pipe.folder, pipe.config, "residual", pipe.device, pipe.dtype)
    return (made.unet, "x") if "unet" in request.param else (made, "z")


def call(network, x=None, t=T, class_labels=LABELS, **more):
    module, name = network
    with torch.no_grad():
        return module(CLIPS[name] if x is None else x, t, class_labels=class_labels, **more)


def test_one_timestep_for_all(network):
    expected = call(network)
    for t in (7, np.int64(7), torch.tensor(7), T.int()):
        assert torch.equal(call(network, t=t), expected)


@pytest.mark.parametrize("t", ["7", None, True, 7.5, [7, 7], torch.tensor([True, True]), T * 1j])
def test_timesteps_of_another_type(network, t):
    with pytest.raises(TypeError, match="t must be an int or a tensor of timesteps, got"):
        call(network, t=t)


def test_timesteps_that_do_not_fit(network):
    for t in (torch.tensor([7]), torch.tensor([7, 7, 7]), T[None]):
        with pytest.raises(ValueError, match=r"t must have shape \[2\], got"):
            call(network, t=t)
    with pytest.raises(ValueError, match="t must be on cpu as its input, got meta"):
        call(network, t=T.to("meta"))
    if network[1] == "z":  # a UNet has no schedule
        for t in (1000, -1, torch.tensor([0, -1])):
            with pytest.raises(ValueError, match="t must lie in 0 … 999, got"):
                call(network, t=t)
        with pytest.raises(TypeError, match=r"t must be int64, got torch.float32"):
            call(network, t=T.float())


def test_labels(network):
    for labels in (torch.tensor([0, 4]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match=r"class_labels must lie in 0 … 3, got \["):
            call(network, class_labels=labels)
    for labels in (0, [0, 1]):
        with pytest.raises(TypeError, match="class_labels must be a tensor, got"):
            call(network, class_labels=labels)
    with pytest.raises(TypeError, match=r"class_labels must be int64, got torch.float32"):
        call(network, class_labels=LABELS.float())
    assert call(network, class_labels=torch.tensor([0, 3])).isfinite().all()  # no class


def test_inputs_that_are_no_float_tensors(network):
    x = CLIPS[network[1]]
    for wrong in (3, x.numpy(), x.long(), x > 0):
        with pytest.raises(TypeError, match="the input must be a tensor of a float dtype, got"):
            call(network, x=wrong)
    with pytest.raises(TypeError, match="context must be a tensor, got list"):
        call(network, context=[1.0])
