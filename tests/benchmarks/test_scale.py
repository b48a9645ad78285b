"""benchmarks/bench_scale.py: the simulation against closed forms, the formula against it."""

import json
import math
import statistics

import pytest
from conftest import benchmark_file

queueing = benchmark_file("lib.queueing")
scale = benchmark_file("bench_scale")
Stage, simulate = queueing.Stage, queueing.simulate


def erlang_c(workers: int, load: float) -> float:
    """Probability that a clip of M/M/c waits; load: arrivals times seconds, below workers."""
    last = load**workers / math.factorial(workers) * workers / (workers - load)
    return last / (sum(load**k / math.factorial(k) for k in range(workers)) + last)


# -- the simulation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "load"), [(1, 0.5), (3, 0.7), (8, 0.8)])
def test_mean_wait_is_that_of_a_queue_of_many_workers(workers, load):
    """M/M/c: the mean wait is C(c, a) / (c μ - λ)."""
    seconds = 2.0
    rate = load * workers / seconds
    expected = erlang_c(workers, load * workers) / (workers / seconds - rate)
    how = {"rate": rate, "exponential": True}
    outs = [
        simulate({"workers": workers}, [Stage("workers", seconds)], 20_000, seed=seed, **how)
        for seed in range(10)
    ]
    for found, wanted in (
        ([out.wait for out in outs], expected),
        ([out.latency for out in outs], expected + seconds),
        ([out.rate for out in outs], rate),
        ([out.busy["workers"] for out in outs], load),
    ):
        error = statistics.stdev(found) / math.sqrt(len(found))
        assert error < 0.05 * wanted
        assert abs(statistics.fmean(found) - wanted) < 4 * error


def test_mean_wait_of_fixed_work_is_half_of_that_of_random_work():
    """M/D/1, by Pollaczek and Khinchine: λ s² / (2 (1 - ρ))."""
    rate, seconds = 0.6, 1.0
    outs = [
        simulate({"one": 1}, [Stage("one", seconds)], 10_000, rate=rate, seed=k) for k in range(10)
    ]
    waits = [out.wait for out in outs]
    error = statistics.stdev(waits) / math.sqrt(len(waits))
    expected = rate * seconds**2 / (2 * (1 - rate * seconds))
    assert error < 0.05 * expected and abs(statistics.fmean(waits) - expected) < 4 * error


@pytest.mark.parametrize(("base", "residual"), [(1, 1), (1, 3), (2, 1)])
def test_two_kinds_of_workers_are_as_fast_as_the_slower_kind(base, residual):
    stages = [Stage("base", 1.0), Stage("residual", 2.5)]
    pools = {"base": base, "residual": residual}
    out = simulate(pools, stages, 2000, in_flight=3 * (base + residual))
    slower = min(base / 1.0, residual / 2.5)
    assert out.rate == pytest.approx(slower, rel=1e-3)
    assert max(out.busy.values()) == pytest.approx(1.0, abs=0.01)


def test_workers_of_both_kinds_are_never_idle():
    stages = [Stage("cores", 1.0), Stage("cores", 2.5)]
    out = simulate({"cores": 4}, stages, 4000, in_flight=12)
    assert out.rate == pytest.approx(4 / 3.5, rel=0.01)
    assert out.busy["cores"] == pytest.approx(1.0, abs=0.01)


def test_lost_workers_cost_their_work_and_their_restart():
    """Work is lost with probability 1 - e^(-s/T), after a part of it, and begins anew."""
    seconds, restart, hours = 10.0, 30.0, 100.0 / 3600
    out = simulate(
        {"one": 1},
        [Stage("one", seconds)],
        20_000,
        in_flight=2,
        hours_to_loss=hours,
        restart=restart,
    )
    # a clip takes (e^(s/T) - 1) (T + restart) seconds
    expected = (math.exp(0.1) - 1) * (100.0 + restart)
    assert 1 / out.rate == pytest.approx(expected, rel=0.02)
    assert out.lost == pytest.approx(20_000 * (math.exp(0.1) - 1), rel=0.05)
    assert simulate({"one": 1}, [Stage("one", 1.0)], 100, in_flight=1).lost == 0


def test_a_simulation_is_the_same_for_the_same_seed():
    how = {"rate": 0.5, "exponential": True, "hours_to_loss": 0.01, "restart": 1.0}
    first, again, other = (
        simulate({"a": 1}, [Stage("a", 1.0)], 500, seed=seed, **how) for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize("arrivals", [{}, {"rate": 1.0, "in_flight": 1}])
def test_a_simulation_refuses_arrivals(arrivals):
    with pytest.raises(ValueError, match="expected either rate or in_flight"):
        simulate({"a": 1}, [Stage("a", 1.0)], 1, **arrivals)


# -- the formula -----------------------------------------------------------------------------------

MEASURED = scale.Measured(
    base=0.4, residual=0.8, driver=0.005, path_bytes=75_000, clip_bytes=40_000, order_bytes=3_000
)


def test_the_best_split_is_the_best_of_all():
    for workers in (2, 3, 7, 16, 100):
        rates = {b: min(b / 0.4, (workers - b) / 0.8) for b in range(1, workers)}
        assert scale.best_split(MEASURED, workers) == max(rates, key=rates.get)


@pytest.mark.parametrize("workers", [2, 4, 16, 64])
@pytest.mark.parametrize("shared", [False, True])
def test_the_formula_is_the_simulation_at_saturation(workers, shared):
    found = scale.predict(MEASURED, workers, scale.Place())
    out = scale.simulated(MEASURED, workers, scale.Place(), shared=shared, clips=40 * workers)
    assert out.rate == pytest.approx(found.shared if shared else found.split, rel=0.03)


def test_limits_are_named():
    place = scale.Place()
    assert scale.predict(MEASURED, 4, place).limit == "workers"
    many = scale.predict(MEASURED, 1000, place)
    assert (many.shared, many.limit) == (pytest.approx(1 / 0.005), "driver")
    slow = scale.Place(driver_gbit=0.001)
    found = scale.predict(MEASURED, 1000, slow)
    assert found.limit == "driver's link"
    assert found.shared == pytest.approx(0.001e9 / 8 / 43_000)
    own = scale.Place(worker_gbit=1e-5)
    assert scale.predict(MEASURED, 4, own).limit == "workers' links"


def test_a_price_is_by_the_hour_of_a_worker():
    found = scale.predict(MEASURED, 2, scale.Place(price=0.30))
    clips_an_hour = 3600 * found.shared
    assert found.cost == pytest.approx(2 * 0.30 / clips_an_hour)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected an object of"),
        ('{"base": 1}', "expected an object of"),
        (
            '{"base": -1, "residual": 1, "driver": 1, "path_bytes": 1, "clip_bytes": 1,'
            ' "order_bytes": 1}',
            "base must be a number above 0, got -1",
        ),
        ("{", "cannot be read"),
    ],
)
def test_measured_figures_are_checked(tmp_path, text, words):
    file = tmp_path / "measured.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        scale.read_measured(file)


def test_measured_figures_come_from_a_file(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(vars(MEASURED)))
    assert scale.read_measured(file) == MEASURED
    file.write_text(json.dumps({"measured": vars(MEASURED), "rows": []}))  # as --json writes them
    assert scale.read_measured(file) == MEASURED
