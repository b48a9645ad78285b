"""CapturedCall: one graph a shape, replayed; a stub of torch.cuda runs it on the CPU."""

import pytest
import torch
from seeded import filled, normal
from stub_cuda import StubCuda
from torch import nn

from vfengine.models import Autoencoder, AutoencoderConfig, Decoder, Encoder
from vfengine.sampling.captured_call import CapturedCall

VAE = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_groups=4)


class Doubling(nn.Module):
    """Twice the width, and a record of the calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0), requires_grad=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.cat([x, x * self.weight], dim=-1)


@pytest.fixture
def stub(monkeypatch):
    return StubCuda(monkeypatch)


def captures(stub) -> int:
    return stub.calls.count("captured")


def test_one_graph_serves_all_inputs_of_a_shape(stub):
    network = Doubling()
    call = CapturedCall(network)
    for seed in range(3):
        x = normal(2, 3, seed=seed)
        assert torch.equal(call(x), Doubling()(x))
    assert captures(stub) == 1 and stub.calls.count("replay") == 3
    assert not stub.problems


def test_results_are_the_callers(stub):
    call = CapturedCall(Doubling())
    first = call(normal(2, 3))
    kept = first.clone()
    call(normal(2, 3, seed=2))
    assert torch.equal(first, kept)


def test_another_shape_dtype_or_weight_is_captured_anew(stub):
    network = Doubling()
    call = CapturedCall(network)
    for number, x in enumerate((normal(2, 3), normal(4, 3), normal(4, 3).bfloat16()), 1):
        assert torch.equal(call(x), Doubling()(x))
        assert captures(stub) == number
    network.weight.fill_(5.0)
    assert torch.equal(call(x)[:, 3:], x * 5)
    assert captures(stub) == 4


def test_what_cannot_be_captured_raises(monkeypatch):
    StubCuda(monkeypatch, capture_fails=True)
    call = CapturedCall(Doubling())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be captured"):
            call(normal(2, 3))


def test_calls_in_and_out_of_inference_mode_share_a_graph(stub):
    call, x = CapturedCall(Doubling()), normal(2, 3)
    with torch.inference_mode():
        inside = call(x)
    outside = call(x.requires_grad_())
    assert torch.equal(inside, outside) and captures(stub) == 1
    assert not outside.is_inference() and not outside.requires_grad


def test_a_call_waits_for_the_one_before_on_whatever_stream(stub):
    call, x = CapturedCall(Doubling()), normal(2, 3)
    call(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        here = stub.here()
        call(x)
    assert stub.calls[-2:] == [f"{here} waits for an event of main", "replay"]


def test_clips_are_decoded_and_encoded_frame_by_frame(stub):
    parts = [filled(part(VAE)).requires_grad_(False) for part in (Decoder, Encoder)]
    plain, ours = Autoencoder(VAE, *parts), Autoencoder(VAE, *map(CapturedCall, parts))
    z, seen = normal(2, 3, 4, 4, 6), []
    x = ours.decode(z, callback=lambda *counts: seen.append(counts))
    assert (captures(stub), stub.calls.count("replay")) == (1, 6)
    assert seen == [(done, 6) for done in range(1, 7)]
    assert torch.equal(x, plain.decode(z))
    assert torch.equal(ours.encode(x), plain.encode(x))
    assert (captures(stub), stub.calls.count("replay")) == (2, 12)
    assert not stub.problems
