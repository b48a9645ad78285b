"""Clips of the shipped model on a GPU against the CPU's, and what moves from one to the other."""

import functools

import pytest
import torch
from few_step_models import save_student

import vfengine as vf
from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.formats.checkpoint import load_network, read_config
from vfengine.pipelines.videofusion import VideoFusionOutput, VideoFusionPipeline

from .graphs import assert_same, distance

FP32, BF16 = torch.float32, torch.bfloat16
STEPS = 4
# fp32 on two devices, pixels in 0..1. Noise estimates that err by 1e-4, which is what
# test_networks.py allows, move a clip of STEPS by 3e-4 unguided; guidance doubles errors and more.
CLOSE = 1e-3
CONFIG = read_config()


def sample(device: str, dtype: torch.dtype, **settings) -> VideoFusionOutput:
    pipe = VideoFusionPipeline.from_pretrained(device=device, dtype=dtype)
    return pipe("cartwheel", num_inference_steps=STEPS, output_type="pt", **settings)


@functools.cache
def on_cpu(dtype: torch.dtype) -> torch.Tensor:
    return sample("cpu", dtype).frames


def test_fp32_clip_is_the_cpu_s(device):
    """Guided, as by default."""
    frames = sample(device, FP32).frames.cpu()
    assert (frames - on_cpu(FP32)).abs().max() <= CLOSE


def test_bf16_clip_errs_as_the_cpu_s(device):
    """Against fp32 on the CPU: at most twice as far as a clip in bf16 on the CPU is."""
    frames = sample(device, BF16).frames.cpu()
    error, peer = distance(frames, on_cpu(FP32)), distance(on_cpu(BF16), on_cpu(FP32))
    assert 0 < peer < 0.1
    assert error <= 2 * peer, f"{error:.3g}, the CPU {peer:.3g}"


def test_base_path_travels_by_file(device, tmp_path):
    """A path sampled here and saved can be followed on the CPU, and here after loading."""
    out = sample(device, FP32, base_path="stepwise")
    assert out.trajectory.states.device.type == device
    out.trajectory.save(tmp_path / "path.safetensors")
    loaded = BaseTrajectory.load(tmp_path / "path.safetensors")
    assert loaded.states.device.type == "cpu"
    assert torch.equal(loaded.states, out.trajectory.states.cpu())
    followed = sample("cpu", FP32, base_path="stepwise", trajectory=loaded)
    assert (followed.frames - out.frames.cpu()).abs().max() <= CLOSE
    back = BaseTrajectory.load(tmp_path / "path.safetensors", device=device)
    again = sample(device, FP32, base_path="stepwise", trajectory=back)
    assert_same(again.frames, out.frames, CLOSE, "followed again")


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_base_here_and_residual_on_the_cpu(overlap, capture, device):
    """The networks on two devices; as both on the CPU, within fp32's rounding."""
    schedule = CONFIG.noise_schedule()
    shape = (1, CONFIG.num_frames, CONFIG.channels, CONFIG.height, CONFIG.width)
    noise = vf.decomposed_noise(shape, 0, 1)
    residual, text = load_network(None, CONFIG, "residual"), CONFIG.text_encoder
    context = torch.randn(
        1, text.max_length, text.width, generator=torch.Generator().manual_seed(2)
    )
    settings = {"schedule": schedule, "num_inference_steps": STEPS, "lam": CONFIG.lam}

    def clip(place: str, **options) -> torch.Tensor:
        base = load_network(None, CONFIG, "base", place)
        networks = [  # a step that is captured copies nothing from the CPU
            lambda z, t, network=network, own=own: network(z, t.to(z.device), context=own)
            for network, own in ((base, context.to(place)), (residual, context))
        ]
        return vf.sample(*networks, noise.base.to(place), noise.residual, **settings, **options)

    out = clip(device, overlap_phases=overlap, capture=capture)
    assert out.device.type == "cpu"
    assert (out - clip("cpu")).abs().max() <= 2 * CLOSE  # of -1..1


@functools.cache
def stepwise_on_cpu() -> torch.Tensor:
    return sample("cpu", FP32, base_path="stepwise").frames


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_pipeline_on_two_devices(overlap, capture, device):
    """The CPU and a GPU, either way round, and two GPUs where there are."""
    pairs = [("cpu", device), (device, "cpu")]
    pairs += [("cuda:0", "cuda:1")] if device == "cuda" and torch.cuda.device_count() > 1 else []
    how = {"num_inference_steps": STEPS, "output_type": "pt", "base_path": "stepwise"}
    for base, residual in pairs:
        places = {"base_device": base, "residual_device": residual}
        pipe = VideoFusionPipeline.from_pretrained(dtype=FP32, capture=capture, **places)
        for _ in range(2):
            out = pipe("cartwheel", overlap_phases=overlap, **how)
            assert out.frames.device.type == torch.device(residual).type
            assert out.trajectory.states.device == out.frames.device
            assert (out.frames.cpu() - stepwise_on_cpu()).abs().max() <= CLOSE


@pytest.mark.parametrize("base_path", ["clean", "stepwise"])
def test_a_distilled_model_is_captured_as_any_other(base_path, device, tmp_path):
    """In its own steps, told the guidance scale: as step by step, and as on the CPU."""
    folder, clips = save_student(tmp_path / "student"), {}
    for place, capture in ((device, True), (device, False), ("cpu", False)):
        pipe = VideoFusionPipeline.from_pretrained(
            folder, device=place, dtype=FP32, capture=capture
        )
        for scale in (1.0, 3.0):
            out = pipe("walk", guidance_scale=scale, base_path=base_path, output_type="pt")
            clips[place, capture, scale] = out.frames.cpu()
    for scale in (1.0, 3.0):
        captured = clips[device, True, scale]
        assert_same(captured, clips[device, False, scale], CLOSE, "captured")
        assert (captured - clips["cpu", False, scale]).abs().max() <= CLOSE
    assert (clips["cpu", False, 1.0] - clips["cpu", False, 3.0]).abs().max() > 10 * CLOSE
