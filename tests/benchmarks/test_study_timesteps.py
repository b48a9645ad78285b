"""benchmarks/study_timesteps.py: few steps of the shipped model, at timesteps of one's choice."""

import pytest
from conftest import benchmark_file

study_timesteps = benchmark_file("study_timesteps")


def test_timesteps_are_taken_and_told_apart(monkeypatch):
    monkeypatch.setattr(study_timesteps, "MANY", 4)
    monkeypatch.setattr(study_timesteps, "OWN", (4, 1))
    rows = study_timesteps.study("unipc", [(999, 749, 499, 249), (999, 300)], 1)
    values = {(row.contender, row.metric): row.value for row in rows}
    metrics = ("from 4 steps", "waves below 8 pixels", "waves below 4 pixels")
    assert [values["999 749 499 249", metric] for metric in metrics] == pytest.approx([0, 1, 1])
    for name in ("999", "999 300"):
        assert values[name, "from 4 steps"] > 1
        assert values[name, "waves below 8 pixels"] < 1


def test_timesteps_are_read_from_the_command_line():
    assert study_timesteps.descending("999,740,480,150") == (999, 740, 480, 150)
