"""A base phase on one device and a residual phase on another, whose memories are apart."""

import pytest
import torch
from toy_models import WALK, base_model, noise_of, residual_model
from two_memories import PlacedNetwork, memories

from vfengine.sampling.api import sample

__all__ = ["memories"]
PAIRS = [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")]
SHAPE, STEPS = (2, 3, 3, 4, 5), WALK["num_inference_steps"]


def clip(base: str, residual: str, **settings) -> torch.Tensor:
    """A toy clip with its phases on these devices, on the CPU."""
    models = (
        PlacedNetwork(model, torch.device(place))
        for model, place in ((base_model, base), (residual_model, residual))
    )
    noise = noise_of(SHAPE, torch.float32)
    noises = noise.base.to(base), noise.residual.to(residual)
    video = sample(*models, *noises, **{**WALK, **settings})
    assert video.device == torch.device(residual)
    return video.cpu()


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("solver", ["ddim", "unipc"])
@pytest.mark.parametrize("how", [{}, {"overlap_phases": True}, {"base_path": "clean"}])
def test_phases_on_two_devices_give_the_bits_of_one(pair, capture, solver, how, memories):
    expected = sample(
        base_model,
        residual_model,
        *noise_of(SHAPE, torch.float32),
        **WALK | {"solver": solver},
        **how,
    )
    assert torch.equal(clip(*pair, capture=capture, solver=solver, **how), expected)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_base_path_crosses_once(pair, memories):
    """In one copy, or where the phases overlap in a copy a row."""
    row = (SHAPE[0], *SHAPE[2:])

    def handed_over() -> list[tuple[int, ...]]:
        shapes = [c.shape for c in memories.crossed if c[:2] == pair and c.shape[-4:] == row]
        memories.crossed.clear()
        return shapes

    clip(*pair)
    assert handed_over() == [(STEPS + 1, *row)]
    clip(*pair, overlap_phases=True)
    assert handed_over() == [row] * (STEPS + 1)


def test_both_devices_wait_for_each_row_of_the_path(memories):
    """The first looks at it, the second copies it; the stream that makes rows runs ahead."""
    clip("cuda:0", "cuda:1", overlap_phases=True)
    calls = memories.cuda.calls
    for stream in ("main", "main of cuda:1"):
        assert calls.count(f"{stream} waits for an event of side") == STEPS
    memories.cuda.calls.clear()
    clip("cuda:0", "cpu", overlap_phases=True)
    assert not any("waits for an event" in call for call in calls)  # the CPU itself waits


def test_tensors_of_two_memories_do_not_mix(memories):
    """What the other tests rest on."""
    here, there = torch.ones(2, device="cuda:0"), torch.ones(2, device="cuda:1")
    for mixed in (
        lambda: here + there,
        lambda: here + torch.ones(2),
        lambda: torch.stack([here, there]),
    ):
        with pytest.raises(RuntimeError, match="expected all tensors on one device, found"):
            mixed()
    moved = here.to("cuda:1")
    moved += there
    assert torch.equal(moved.cpu(), torch.full((2,), 2.0))
    assert torch.equal(here.cpu(), torch.ones(2))
    network = PlacedNetwork(torch.nn.Identity(), torch.device("cuda:1"))
    assert network(moved).device == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="a network on cuda:1 was given tensors on"):
        network(here)
