"""The results that benches accept as right, before they time anything."""

import pytest
import torch
from conftest import benchmark_file


@pytest.fixture(params=["clips", "network_cases"])
def name(request):
    return request.param


@pytest.fixture
def problem(name):
    """A function of result, exact value and PyTorch's own result: what is wrong, or None."""
    module = benchmark_file(f"lib.{name}")
    if name == "network_cases":
        return module.error_of

    def check(out, exact, _):
        try:
            module.check("it", out, exact)
        except ValueError as error:
            return str(error)

    return check


def test_what_is_right_passes(problem):
    exact = torch.linspace(-2, 2, 100, dtype=torch.float64)
    eager = exact.float()
    assert problem(exact.float(), exact, eager) is None
    assert problem(exact.float() + 2e-7, exact, eager + 2e-7) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0])
def test_one_wrong_element_is_enough(problem, value):
    exact = torch.linspace(-2, 2, 100, dtype=torch.float64)
    out = exact.float()
    out[7] = value
    assert "is off by" in problem(out, exact, exact.float())


def test_nan_of_a_peer_is_wrong():
    error_of = benchmark_file("lib.network_cases").error_of
    exact = torch.ones(3, dtype=torch.float64)
    assert error_of(torch.full((3,), float("nan")), exact, None) is not None
    assert error_of(torch.full((3,), 1.001), exact, None) is None
    assert error_of(torch.full((3,), 1.5), exact, None) is not None


def test_ours_may_err_twice_as_much_as_pytorch_and_not_more():
    error_of = benchmark_file("lib.network_cases").error_of
    exact = torch.ones(3, dtype=torch.float64)
    eager = (exact + 1e-5).float()
    assert error_of((exact + 1.9e-5).float(), exact, eager) is None
    assert "eager PyTorch by 1e-05" in error_of((exact + 2.2e-5).float(), exact, eager)
