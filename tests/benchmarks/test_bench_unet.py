"""benchmarks/bench_unet.py: what it counts, how it judges, what it says when it cannot measure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import BENCHMARKS, benchmark_file

from vfengine.native import vfengine_native

contenders, unet_ops = map(benchmark_file, ("lib.unet_contenders", "lib.unet_ops"))
clip_turns, harness = map(benchmark_file, ("lib.clip_turns", "lib.harness"))
bench = benchmark_file("bench_unet")
by_unit = contenders.by_unit
OURS, EAGER, OPENVINO = contenders.OURS, contenders.EAGER, contenders.OPENVINO
ERRORS = {OURS: 0.016, EAGER: 0.019, OPENVINO: 0.03}


def case(name: str = "unet3d"):
    return contenders.CASES[name]


# -- counting --------------------------------------------------------------------------------------


def test_flops_of_the_small_unet3d():
    assert contenders.flops("unet3d") / 1e9 == pytest.approx(224.6, abs=0.05)


def test_flops_of_half_the_frames_are_less_than_half():
    assert contenders.flops("unet3d-8") < contenders.flops("unet3d") / 2  # attention: with N²


def test_flops_of_the_decoder_are_those_of_decode_alone():
    assert contenders.flops("vae-decoder") / 1e9 == pytest.approx(622.2, abs=0.05)


@pytest.mark.parametrize("name", contenders.CASES)
def test_inputs_fit_the_network(name):
    sample, *more = case(name).inputs()
    assert sample.shape == case(name).shape
    assert torch.equal(sample, case(name).inputs()[0])
    if name == "vae-decoder":
        assert not more and "tokens" not in case(name).description
        return
    timestep, context = more
    width = contenders.NETWORKS[case(name).network].config["cross_attention_dim"]
    assert timestep.shape == (1,) and context.shape == (1, case(name).tokens, width)


def test_no_saved_weight_is_zero(tmp_path, monkeypatch):
    config = {
        **contenders.NETWORKS["unet2d"].config,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32),
        "attention_head_dim": (1, 1),
        "layers_per_block": 1,
    }
    tiny = contenders.Network("UNet2DConditionModel", config, stored=torch.bfloat16)
    monkeypatch.setitem(contenders.NETWORKS, "unet2d", tiny)
    small = contenders.Case("tiny", "unet2d", (1, 3, 8, 8), {})
    (tmp_path / "unet2d").mkdir()
    contenders.save_network("unet2d", tmp_path / "unet2d")
    network = contenders.diffusers_class("unet2d").from_pretrained(tmp_path / "unet2d")
    assert all(weight.any() for weight in network.parameters())
    exact = contenders.load(contenders.REFERENCE, small, tmp_path)()
    rounded = contenders.load(EAGER, small, tmp_path)()
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert 0 < contenders.relative_error(rounded, exact) < 0.1


def test_our_networks_take_frames_second(monkeypatch):
    seen = []

    def network(x, t, context):
        seen.append(x)
        return 2 * x

    monkeypatch.setattr(contenders, "_load_torch", lambda *_: network)
    expected = 2 * case().inputs()[0].bfloat16()
    for contender in (OURS, EAGER):
        assert torch.equal(contenders.load(contender, case(), Path())(), expected)
    assert [x.shape for x in seen] == [(1, 16, 4, 32, 32), (1, 4, 16, 32, 32)]
    assert seen[0].is_contiguous()


def test_autoencoders_are_decoded(tmp_path, monkeypatch):
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 8,
    }
    tiny = contenders.Network("AutoencoderKL", config, method="decode")
    monkeypatch.setitem(contenders.NETWORKS, "vae", tiny)
    small = contenders.Case("tiny", "vae", (1, 4, 6, 4), {})
    (tmp_path / "vae").mkdir()
    contenders.save_network("vae", tmp_path / "vae")
    exact = contenders.load(contenders.REFERENCE, small, tmp_path)()
    assert exact.shape == (1, 3, 12, 8)
    for contender in (OURS, EAGER):
        out = contenders.load(contender, small, tmp_path)()
        assert out.dtype is torch.bfloat16 and contenders.relative_error(out, exact) < 0.1


def test_convolution_of_the_ceiling_is_a_convolution():
    call, count = unet_ops.convolutions(calls=1)["conv 3x3, 64"]
    assert count == 2 * 16 * 32 * 32 * 64 * 64 * 9
    call()


# -- checking --------------------------------------------------------------------------------------


def test_accuracy_is_measured_against_the_peer():
    contenders.require_accuracy("unet3d", ERRORS, EAGER, 1.5)
    for error in (0.03, float("nan")):
        with pytest.raises(ValueError, match=r"unet3d: .*vfengine is .*at most 1.5 .*eager, 0.019"):
            contenders.require_accuracy("unet3d", {**ERRORS, OURS: error}, EAGER, 1.5)


def test_relative_error_is_taken_in_fp32():
    exact = torch.tensor([3.0, 4.0])
    assert contenders.relative_error((exact + 0.5).bfloat16(), exact) == pytest.approx(0.5**0.5 / 5)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: SimpleNamespace(sample=x)])
def test_answers_of_any_kind(wrap):
    x = torch.ones(2)
    assert contenders.as_tensor(wrap(x)) is x


def test_attention_of_the_peers_is_attention():
    qkv = torch.randn(2, 5, 3, 3 * 2 * 4)
    out = unet_ops.sdpa_temporal(qkv, 2)
    q, k, v = qkv[1, :, 2].view(5, 3, 2, 4).permute(1, 2, 0, 3)  # of one pixel, [H, N, D]
    expected = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(5, 8)
    torch.testing.assert_close(out[1, :, 2], expected)
    q, k = torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    head = F.scaled_dot_product_attention(q[..., 4:], k[..., 4:], k[..., 4:])
    torch.testing.assert_close(unet_ops.sdpa_spatial(q, k, k, 2)[..., 4:], head)


def test_op_that_is_wrong_is_not_timed(monkeypatch):
    def wrong(qkv, num_heads):
        return 1.1 * unet_ops.sdpa_temporal(qkv, num_heads)

    monkeypatch.setattr(unet_ops.ops, "temporal_attention", wrong, raising=False)
    with pytest.raises(ValueError, match="temporal_attention: the relative error"):
        unet_ops.op_rows("temporal_attention", seconds=0)


# -- rows and targets ------------------------------------------------------------------------------


def rows():
    """The small UNet3D's table from made-up seconds: eager takes 2 times ours, OpenVINO 1.6."""
    times = {OURS: [0.25, 0.25, 9.0], EAGER: [0.5, 0.4, 0.6], OPENVINO: [0.4]}
    return bench.network_rows(case(), ERRORS, (times, 1e12))


def test_rows_give_medians_ratios_and_share_of_the_ceiling():
    figures = {(row.contender, row.metric): row.value for row in rows()}
    assert figures[OURS, "time"] == 250 and figures[EAGER, bench.FASTER] == 2
    assert figures[OURS, "arithmetic"] == pytest.approx(4 * 224.6, rel=1e-3)
    assert figures[OURS, bench.OF_CEILING] == pytest.approx(89.83, abs=0.01)
    assert figures[OURS, "error"] == 16 and figures[OURS, "slowest / fastest"] == 36
    assert figures[bench.CEILING, "arithmetic"] == 1000


def test_targets_are_met_missed_or_not_measured():
    verdicts = {(v.contender, v.metric): v for v in bench.judge(rows())}
    met = [False, None, not vfengine_native.cpu_has_tiles(), True]
    assert [v.met for v in verdicts.values()] == met[: len(verdicts)]
    assert str(verdicts[EAGER, bench.FASTER]).endswith("2.00 x (target: at least 2.5): MISSED")
    assert f"1.60 x (target: at least {by_unit(1.8, 1.6)}): " in str(
        verdicts[OPENVINO, bench.FASTER]
    )
    assert "not measured" in str(verdicts[contenders.COMPILED, bench.FASTER])


def test_targets_are_these():
    targets = {(t.case, t.contender, t.metric): t.value for t in bench.TARGETS}
    assert not any(target.at_most for target in bench.TARGETS)
    assert targets.pop(("unet3d", OURS, bench.OF_CEILING), None) == by_unit(None, 78)
    assert targets["modelscope", OPENVINO, bench.MEMORY] == 1
    assert targets["temporal_attention", OURS, "speedup_over_SDPA"] == by_unit(6, 5)
    assert targets["unet3d-64", OPENVINO, bench.FASTER] == by_unit(1.8, 1.6)
    assert targets["vae-decoder", OPENVINO, bench.FASTER] == 1.3
    assert targets["vae-decoder", EAGER, bench.FASTER] == by_unit(2.0, 1.8)
    assert len(targets) == 3 + 3 + 4 + 2 + 2 + 2 + 2 + 2


def test_baselines_are_contenders(monkeypatch):
    for name, make in unet_ops.OPS.items():
        op = make()
        assert op.baseline == unet_ops.BASELINES[name] and {OURS, op.baseline} <= set(op.calls)
        error = contenders.relative_error(op.calls[op.baseline](), op.exact)
        assert 0 < error < 0.01, name


def test_json_holds_rows_targets_and_what_was_left_out(tmp_path):
    report = bench.Report(rows(), ["a contender"])
    harness.write_json(tmp_path / "unet.json", report.rows, {"cores": 2}, bench.extra(report))
    read = json.loads((tmp_path / "unet.json").read_text())
    assert read["machine"] == {"cores": 2} and read["left_out"] == ["a contender"]
    assert [harness.Row(**row) for row in read["rows"]] == report.rows
    assert [target["met"] for target in read["targets"]] == [v.met for v in bench.judge(rows())]


# -- what it says when it cannot measure -----------------------------------------------------------


def test_missing_openvino_is_named_once(monkeypatch, capsys):
    monkeypatch.setattr(bench, "has_openvino", lambda: False)
    report = bench.Report()
    for _ in range(2):
        assert bench._able(case("unet3d-8"), Path(), report) == [OURS, EAGER]
    assert report.left_out == [contenders.NO_OPENVINO] and "pip install openvino" in str(report)
    assert capsys.readouterr().err.count("LEFT OUT: OpenVINO is not installed") == 1
    assert "left out: OpenVINO is not installed" in bench.in_words(
        bench.Report(rows(), ["OpenVINO is not installed"])
    )


def test_missing_diffusers_leaves_networks_out_and_no_ops(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "op_rows", lambda name, seconds: [name])
    report = bench.measure(("unet3d", "group_norm_silu"))
    assert report.rows == ["group_norm_silu"]
    assert report.left_out == ["unet3d: diffusers is not installed, which draws networks"]


def test_short_form_has_every_bench_once():
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--short"]
    # pytest-benchmark measures nothing in a worker of xdist, and this test may run in one.
    env = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [*command, "--collect-only", "-q"],
        **{"cwd": BENCHMARKS.parent, "env": env, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split("[")[0] for line in done.stdout.splitlines() if "::" in line]
    files = {line.split("::")[0] for line in found}
    assert files == {f"benchmarks/{file.name}" for file in BENCHMARKS.glob("bench_*.py")}
    assert sorted(set(found)) == sorted(line for line in found if "unet" not in line) + [
        "benchmarks/bench_unet.py::bench_unet"
    ]


@pytest.mark.parametrize(
    ("code", "words", "error", "message"),
    [
        (-9, "", contenders.OutOfMemoryError, "in the memory of this machine"),
        (1, "std::bad_alloc", contenders.OutOfMemoryError, "in the memory of this machine"),
        (1, "KeyError: 'unet4d'", RuntimeError, "KeyError: 'unet4d'"),
    ],
)
def test_conversion_that_fails(monkeypatch, code, words, error, message):
    done = subprocess.CompletedProcess([], code, "", words)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(error, match=f"modelscope: OpenVINO(.|\n)*{message}"):
        contenders.convert(case("modelscope"), Path())


def test_conversion_out_of_memory_leaves_openvino_out(monkeypatch):
    def fail(case, root):
        raise contenders.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench, "has_openvino", lambda: True)
    monkeypatch.setattr(bench, "convert", fail)
    report = bench.Report()
    assert OPENVINO not in bench._able(case("modelscope"), Path(), report)
    assert report.left_out == ["no memory"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "unet4d"], "unet4d"),
        (["--rounds", "0"], "--rounds expects at least 1"),
        (["--before", "/nowhere"], "--before expects a checkout"),
    ],
)
def test_command_line_refuses(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_command_line_takes_a_checkout():
    options = bench.parse(["--before", clip_turns.HERE, "--case", "clip-bf16", "--rounds", "2"])
    assert (options.before, list(options.case), options.rounds) == (
        clip_turns.HERE,
        ["clip-bf16"],
        2,
    )
    assert list(bench.parse([]).case) == list(bench.ALL)


def test_worker_insists_on_its_checkout(tmp_path, monkeypatch):
    fake = 'import sys\nprint("/elsewhere/vfengine/__init__.py", flush=True)\nsys.stdin.read()\n'
    (tmp_path / "worker.py").write_text(fake)
    monkeypatch.setattr(clip_turns, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(RuntimeError, match=r"expected in .* found in /elsewhere"):
        clip_turns.Worker(str(tmp_path), "bfloat16")


def test_clips_take_turns(tmp_path, monkeypatch):
    fake = (
        "import sys\nprint(sys.path[0] + '/vfengine', flush=True)\n"
        "for _ in sys.stdin: print(0.5, flush=True)\n"
    )
    (tmp_path / "worker.py").write_text(fake)
    monkeypatch.setattr(clip_turns, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setattr(clip_turns, "HERE", str(tmp_path))
    figures = clip_turns.clip_rows("float32", 2, str(tmp_path))
    assert {row.contender for row in figures} == {clip_turns.NOW, clip_turns.BEFORE}
    assert {row.value for row in figures if row.metric == "time / vfengine"} == {1.0}
