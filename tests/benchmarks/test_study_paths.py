"""benchmarks/study_paths.py: how far few steps of the shipped model end from many."""

import pytest
import torch
from conftest import benchmark_file

study_paths = benchmark_file("study_paths")


@pytest.fixture(scope="module")
def paths():
    return study_paths.Paths(1)


@pytest.mark.parametrize("name", study_paths.NETWORKS)
def test_more_steps_end_nearer_and_guidance_counts(name, paths):
    many = [999, 937, 874, 812, 749]
    ideal = paths.end(name, many)

    def error(times, **how):
        return paths.error(name, [999, 749], paths.end(name, times, **how), ideal)

    assert error(many) == 0
    assert 0 < error([999, 874, 749]) < error([999, 749]) < error([999, 749], guided=False)


def test_an_error_is_one_of_clean_latents(paths):
    """Of two ends, c2 times as far apart as their estimates of noise, and those σ/α as latents."""
    ends = paths.end("base", [999, 749])
    t, p = torch.tensor([999]), torch.tensor([749])
    nothing = torch.zeros_like(ends)
    shift = paths.jumps.step(nothing, nothing + 0.01, t, p)
    alpha = paths.schedule.alphas_cumprod[999].item()
    expected = 1e3 * 0.01**2 * (1 - alpha) / alpha
    assert paths.error("base", [999, 749], ends + shift, ends) == pytest.approx(expected, rel=1e-2)


def test_each_step_of_each_network_is_a_row(monkeypatch):
    for setting, value in {"STEPS": (2,), "MANY": 3, "FEWER": (2,)}.items():
        monkeypatch.setattr(study_paths, setting, value)
    rows = study_paths.study(1)
    assert len(rows) == 2 * 2 * 3
    assert {row.contender for row in rows} == {"from t = 999", "from t = 499"}
    assert {row.metric for row in rows} == {"1 step", "2 steps", "unguided"}
    assert all(row.value > 0 for row in rows)
