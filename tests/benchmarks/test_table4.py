"""benchmarks/bench_table4.py at a tiny size: what its contenders compute, and how it measures."""

import pytest
import torch
from conftest import benchmark_file

from vfengine.models import PlannedUNet, UNet

models, ways = map(benchmark_file, ("lib.table4_models", "lib.table4_ways"))
bench, peak_memory = map(benchmark_file, ("bench_table4", "lib.peak_memory"))
STEPS = 4


@pytest.fixture(scope="module")
def networks():
    return models.Networks(models.size("tiny"), "cpu", torch.float32, keep=True)


@pytest.fixture(scope="module")
def noise():
    return models.make_noise(models.size("tiny"), "cpu")


@pytest.fixture(scope="module")
def clips(networks, noise):
    """Every contender's clip from the same noise."""
    contenders = ways.CONTENDERS.items()
    return {name: contender(networks, noise, STEPS) for name, contender in contenders}


def test_contenders_make_clips(clips, noise):
    for name, clip in clips.items():
        expected = noise.clips if name == ways.SHARED else noise.clip
        assert clip.shape == expected.shape and clip.dtype == expected.dtype
        assert bool(clip.isfinite().all()), name


def test_plain_vdm_is_sample_video_to_rounding(clips):
    torch.testing.assert_close(clips[ways.PLAIN], clips[ways.VDM], rtol=1e-3, atol=1e-3)


def test_two_phases_are_the_interleaved_form_to_rounding(clips):
    two, one = clips[ways.TWO_PHASE], clips[ways.INTERLEAVED]
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [ways.OVERLAPPED, ways.BASE_KEPT])
def test_ways_to_run_two_phases_are_equal_bit_for_bit(clips, name):
    assert torch.equal(clips[ways.TWO_PHASE], clips[name])


def test_first_of_the_clips_on_one_base_is_the_single_clip(clips):
    shared = clips[ways.SHARED]
    assert torch.equal(clips[ways.TWO_PHASE], shared[:1])
    m = shared.shape[1] // 2
    assert torch.equal(shared[:, m], shared[:1, m].expand_as(shared[:, m]))
    assert not torch.equal(shared[:1], shared[1:2])


@pytest.mark.parametrize(
    "name", [ways.VDM, ways.INTERLEAVED, ways.BASE_KEPT, ways.OVERLAPPED, ways.SHARED]
)
def test_kept_loops_make_the_same_clips_again_and_again(networks, noise, clips, name):
    start = noise if name == ways.SHARED else models.Noise(noise.base, noise.clip)
    run = ways.kept(name, networks, start, STEPS, capture=True)
    for _ in range(2):
        assert torch.equal(run(), clips[name])


def test_kept_loops_are_of_known_contenders(networks, noise):
    with pytest.raises(ValueError, match="keeps no loops"):
        ways.kept(ways.PEER, networks, noise, STEPS, capture=False)


def test_networks_run_as_the_pipelines_do(networks):
    for name in ("base", "residual", "video"):
        assert isinstance(networks(name).unet, PlannedUNet)
    assert isinstance(networks("plain").unet, UNet)


def test_no_weight_is_left_at_zero():
    networks = models.Networks(models.size("tiny"), "cpu", torch.float32, keep=True, trained=True)
    for name in ("base", "residual", "video", "peer"):
        assert all(bool((p != 0).any()) for p in networks(name).parameters()), name
    assert networks("base").unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_two_phases_drop_the_base_network_unless_told_to_keep_it(noise):
    networks = models.Networks(models.size("tiny"), "cpu", torch.float32, keep=False)
    ways.CONTENDERS[ways.TWO_PHASE](networks, noise, 1)
    assert list(networks._built) == ["residual"]


def test_large_is_a_base_of_twice_the_width():
    large = models.size("large")
    wide, narrow = large.base.block_out_channels, large.residual.block_out_channels
    assert wide == tuple(2 * width for width in narrow) == large.peer[0]
    assert large.residual.temporal_attention == large.base.spatial_attention


@pytest.mark.parametrize("decomposed", [True, False])
def test_training_step_moves_every_weight(noise, decomposed):
    tiny = models.size("tiny")
    networks = models.Networks(tiny, "cpu", torch.float32, keep=True, trained=True)
    step = ways.training_step(networks, noise, decomposed)
    parameters = [p for network in networks._built.values() for p in network.parameters()]
    before = [p.detach().clone() for p in parameters]
    step()
    moved = [bool((p != old).any()) for p, old in zip(parameters, before, strict=True)]
    assert sum(moved) / len(moved) > 0.95  # attention's last bias may cancel
    assert sorted(networks._built) == (["base", "residual"] if decomposed else ["video"])


# -- how it measures -------------------------------------------------------------------------------


def test_probe_sees_a_known_allocation():
    peak = peak_memory.measure("lib.peak_memory:touch", {"mebibytes": 64})
    assert abs(peak.main - 64) < 4
    assert peak.allocated is None and peak.idle > 4


def test_probe_says_what_went_wrong():
    with pytest.raises(RuntimeError, match=r"peak_memory:touch .*failed(.|\n)*TypeError"):
        peak_memory.measure("lib.peak_memory:touch", {"mebibytes": "many"})


def test_probe_fits_the_contenders():
    run = ways.sampling_probe(ways.TWO_PHASE, "tiny", "bfloat16", "cpu", 2, frames=5)
    assert run().shape == (1, 5, 3, 16, 16)


def test_turns_end_with_the_time_they_have():
    calls = {"a": lambda: None, "b": lambda: None}
    assert [len(times) for times in bench.take_turns(calls, 3).values()] == [3, 3]
    assert [len(times) for times in bench.take_turns(calls, 3, seconds=-1).values()] == [1, 1]


def test_a_missing_peer_costs_its_own_rows(monkeypatch, capsys):
    large = bench.REDUCED[1]
    assert bench._able(large) == large
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    able = bench._able(large)
    assert set(large.contenders) - set(able.contenders) == {ways.PEER}
    assert able.memory == large.memory and "LEFT OUT" in capsys.readouterr().err


def test_exponent_of_exact_powers():
    frames = (8, 16, 32)
    assert bench.exponent(frames, [3 * n**1.5 for n in frames]) == pytest.approx(1.5)
    assert bench.exponent(frames, [7.0] * 3) == pytest.approx(0)


def rows():
    """The tables of a plan, from made-up figures."""
    plan = bench.Plan("tiny", STEPS, 1)
    times = {name: [9.0, 1.0 / (k + 1), 0.0001] for k, name in enumerate(bench.OURS)}
    peaks = {name: 100.0 - k for k, name in enumerate(bench.OURS)}
    return [*bench.comparison(plan, times, peaks), *bench.ablation(plan, times, peaks)]


def test_tables_give_ratios_to_vdm_and_to_the_line_before():
    figures = {(row.case, row.contender, row.metric): row.value for row in rows()}
    case = bench.Plan("tiny", STEPS, 1).case
    assert figures[case, ways.VDM, bench.LATENCY] == 1
    assert figures[case, ways.TWO_PHASE, bench.LATENCY] == pytest.approx(2 / 5)
    assert figures[case, ways.TWO_PHASE, bench.MEMORY] == pytest.approx(96 / 99)
    parts = f"{case}: what each part adds"
    released, kept = ways.TWO_PHASE, ways.BASE_KEPT
    labels = {name: label for label, name in bench.ABLATION.items()}
    assert figures[parts, labels[released], "memory / line before"] == pytest.approx(96 / 97)
    assert figures[parts, labels[kept], "time / line before"] == pytest.approx(3 / 4)
    interleaved = figures[case, ways.INTERLEAVED, bench.ARITHMETIC]
    assert 0 < figures[case, ways.SHARED, bench.ARITHMETIC] < interleaved < 1


def test_report_draws_both_pictures(tmp_path):
    report, row = benchmark_file("report"), benchmark_file("lib.harness").Row
    growth = [
        row(f"tiny, growth: {what}", name, metric, value, unit)
        for what, unit in (("per step", "ms"), ("peak memory", "MiB"))
        for name in (ways.VDM, ways.TWO_PHASE)
        for metric, value in (("N = 8", 1.0), ("N = 16", 2.0), ("exponent", 1.0))
    ]
    file = tmp_path / "table4.json"
    benchmark_file("lib.harness").write_json(file, [*rows(), *growth])
    pictures = report.draw(file, tmp_path)
    assert [picture.name for picture in pictures] == ["table4.png", "growth.png"]
    for picture in pictures:
        data = picture.read_bytes()
        assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") == 1000
