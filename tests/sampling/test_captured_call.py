"""CapturedCall: one graph a shape, replayed; a stub of torch.cuda runs it on the CPU."""

import pytest
import torch
from seeded import normal
from stub_cuda import StubCuda
from torch import nn

from vfengine.sampling.captured_call import CapturedCall


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
