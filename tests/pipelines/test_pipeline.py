"""VideoFusionPipeline: conditions, guidance, seeds, base paths, loading and freeing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ON_CPU, TINY_LABELS, save_tiny
from held import loops_of, networks_of
from PIL import Image

import vfengine as vf
from vfengine.formats.checkpoint import build_network, load_network, read_config
from vfengine.pipelines import session as engine
from vfengine.pipelines.videofusion import VideoFusionPipeline, to_uint8

STEPS = 4


@pytest.fixture
def pipe(tiny_checkpoint):
    return VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)


def frames_of(pipe, label="walk", **settings):
    return pipe(label, **{"num_inference_steps": STEPS, **settings}).frames


@pytest.mark.parametrize("base_path", ["stepwise", "clean"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_matches_the_samplers_by_hand(pipe, tiny_checkpoint, base_path, scale):
    config = read_config(tiny_checkpoint)
    walk = torch.tensor([TINY_LABELS.index("walk")])
    null = torch.tensor([len(TINY_LABELS)])

    def guided(network):
        def model(z, t):
            conditional = network(z, t, class_labels=walk)
            return (1 - scale) * network(z, t, class_labels=null) + scale * conditional

        return model

    noise = vf.decomposed_noise((1, 4, 3, 16, 16), base_seed=5, residual_seed=6)
    video = vf.sample(
        guided(load_network(tiny_checkpoint, config, "base")),
        guided(load_network(tiny_checkpoint, config, "residual")),
        noise.base,
        noise.residual,
        schedule=config.noise_schedule(),
        num_inference_steps=STEPS,
        lam=config.lam,
        base_path=base_path,
    )
    out = frames_of(
        pipe,
        guidance_scale=scale,
        base_seed=5,
        residual_seed=6,
        base_path=base_path,
        output_type="pt",
    )
    torch.testing.assert_close(out, (video / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_output_types(pipe):
    settings = {"num_videos": 2, "num_inference_steps": STEPS}
    out = pipe(["walk", "jump"], **settings)
    assert out.frames.shape == (4, 4, 16, 16, 3)
    assert out.frames.dtype == np.float32
    assert 0.0 <= out.frames.min() < out.frames.max() <= 1.0
    tensor = pipe(["walk", "jump"], output_type="pt", **settings).frames
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), out.frames)
    tensor.add_(1.0)  # an ordinary tensor, not one of inference mode
    pictures = pipe(["walk", "jump"], output_type="pil", **settings).frames
    assert isinstance(pictures[3][2], Image.Image)
    assert np.array_equal(np.asarray(pictures[3][2]), to_uint8(out.frames)[3, 2])
    assert set(out.timings) == {"load", "base", "residual"}
    assert min(out.timings.values()) > 0.0


def test_label_and_seeds_decide(pipe):
    clip = frames_of(pipe)
    assert np.array_equal(clip, frames_of(pipe))
    assert not np.array_equal(clip, frames_of(pipe, "jump"))
    assert not np.array_equal(clip, frames_of(pipe, None))
    assert not np.array_equal(clip, frames_of(pipe, base_seed=7))
    other = frames_of(pipe, residual_seed=7)
    assert not np.array_equal(clip, other)
    assert np.array_equal(clip[:, 2], other[:, 2])  # the base frame, N // 2


def test_base_frame_is_the_trajectory_whatever_the_rest(pipe):
    outs = [
        pipe("walk", num_inference_steps=STEPS, **rest)
        for rest in ({}, {"num_frames": 1}, {"num_frames": 7, "lam": 0.2, "residual_seed": 9})
    ]
    for out in outs:
        preview = (out.trajectory.final / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(out.frames[:, out.frames.shape[1] // 2], preview)
        assert torch.equal(out.trajectory.states, outs[0].trajectory.states)


@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("dpmsolver", 0.0)])
def test_parts_of_a_batch_equal_the_batch(pipe, solver, eta):
    settings = {"solver": solver, "eta": eta}
    whole = frames_of(pipe, num_videos=3, **settings)
    assert not np.array_equal(whole[0], whole[1])
    for k in range(3):
        part = frames_of(pipe, sample_offset=k, **settings)
        np.testing.assert_allclose(part[0], whole[k], atol=2e-4)


def test_trajectory_is_used_instead_of_the_base_network(pipe, tiny_checkpoint, tmp_path):
    first = pipe("walk", num_inference_steps=STEPS, base_seed=3)
    first.trajectory.save(tmp_path / "path.safetensors")
    loaded = vf.BaseTrajectory.load(tmp_path / "path.safetensors")
    assert loaded.metadata["base_seed"] == "3"
    assert loaded.metadata["model"] == read_config(tiny_checkpoint).fingerprint()

    (tiny_copy := tmp_path / "copy").mkdir()
    for name in ("config.json", "residual.safetensors"):
        (tiny_copy / name).write_bytes((tiny_checkpoint / name).read_bytes())
    other = VideoFusionPipeline.from_pretrained(tiny_copy, **ON_CPU)  # has no base network at all
    again = other("walk", num_inference_steps=STEPS, trajectory=loaded)
    assert np.array_equal(first.frames, again.frames)
    several = other("walk", num_inference_steps=STEPS, trajectory=loaded, num_videos=2)
    assert np.array_equal(several.frames[0, 2], several.frames[1, 2])
    assert not np.array_equal(several.frames[0, 1], several.frames[1, 1])

    clean = frames_of(pipe, base_seed=3, base_path="clean")
    assert np.array_equal(frames_of(other, trajectory=loaded, base_path="clean"), clean)


def test_an_image_is_animated(pipe):
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    path = vf.BaseTrajectory.from_image(image, schedule=pipe.schedule, num_inference_steps=STEPS)
    clip = frames_of(pipe, trajectory=path, output_type="pt")
    torch.testing.assert_close(clip[:, 2], image / 2 + 0.5)
    with pytest.raises(ValueError, match="base_path can only be clean"):
        frames_of(pipe, trajectory=path, base_path="stepwise")


def test_foreign_trajectories_are_refused(pipe, tmp_path):
    path = pipe.walk_base("walk", num_inference_steps=STEPS)
    for settings, message in (
        ({"num_inference_steps": 5}, "num_inference_steps 4, but 5 is asked for"),
        ({"solver": "dpmsolver"}, "solver ddim, but dpmsolver"),
        ({"eta": 0.5}, "eta 0.0, but 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            frames_of(pipe, trajectory=path, **settings)
    two = pipe.walk_base("walk", num_inference_steps=STEPS, num_videos=2)
    with pytest.raises(ValueError, match="holds 2 clips, neither 1 nor the 3 asked for"):
        frames_of(pipe, trajectory=two, num_videos=3)

    other = VideoFusionPipeline.from_pretrained(save_tiny(tmp_path / "other", seed=1), **ON_CPU)
    with pytest.raises(ValueError, match="made by another model"):
        frames_of(other, trajectory=path)
    cosine = vf.NoiseSchedule.cosine(1000)
    image = vf.BaseTrajectory.from_image(
        torch.zeros(1, 3, 16, 16), schedule=cosine, num_inference_steps=STEPS
    )
    with pytest.raises(ValueError, match="made with noise schedule"):
        frames_of(pipe, trajectory=image)
    large = vf.BaseTrajectory.from_image(
        torch.zeros(1, 3, 32, 16), schedule=pipe.schedule, num_inference_steps=STEPS
    )
    with pytest.raises(ValueError, match=r"\[3, 32, 16\], this model's are \[3, 16, 16\]"):
        frames_of(pipe, trajectory=large)


def test_base_path_defaults_to_the_checkpoints_choice(pipe, tmp_path):
    clean = VideoFusionPipeline.from_pretrained(
        save_tiny(tmp_path / "m", base_path="clean"), **ON_CPU
    )
    assert np.array_equal(frames_of(clean), frames_of(pipe, base_path="clean"))
    assert not np.array_equal(frames_of(clean), frames_of(pipe))
    assert np.array_equal(frames_of(clean, base_path="stepwise"), frames_of(pipe))


def test_guidance_of_one_asks_for_one_estimate(pipe, monkeypatch):
    sizes = []

    def counting(*args):
        network = load_network(*args)
        network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        return network

    monkeypatch.setattr(engine, "load_network", counting)
    frames_of(pipe, guidance_scale=1.0)
    assert sizes == [1] * 2 * STEPS
    frames_of(pipe, None, guidance_scale=5.0)
    assert sizes == [1] * 4 * STEPS
    frames_of(pipe, guidance_scale=2.0)
    assert sizes == [1] * 4 * STEPS + [2] * 2 * STEPS


@pytest.mark.parametrize(
    ("label", "offload", "freed"),
    [
        ("walk", None, True),
        (None, None, True),
        (["walk"], None, True),
        (["walk", "jump"], None, False),
        ("walk", False, False),
        (["walk", "jump"], True, True),
    ],
)
def test_base_network_is_freed_between_the_phases(tiny_checkpoint, label, offload, freed):
    pipe = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    during = []

    def look(phase, done, total):
        during.append((phase, done, frozenset(networks_of(pipe))))

    clip = frames_of(pipe, label, callback=look, offload_base=offload)
    after = {"residual"} if freed else {"base", "residual"}
    assert during == [
        *(("base", k, {"base"}) for k in range(STEPS + 1)),
        *(("residual", k, after) for k in range(STEPS + 1)),
    ]
    assert np.array_equal(frames_of(pipe, label, offload_base=offload), clip)  # it is read again
    assert ("base" in loops_of(pipe)) is not freed


@pytest.mark.parametrize("needed_again", [False, True])
@pytest.mark.parametrize(
    ("loaded", "free", "idle", "goes"),
    [
        (set(), 4.1, 0.0, False),
        (set(), 3.9, 0.0, True),
        (set(), 3.9, 0.2, False),  # torch's own cache is room too
        ({"base"}, 2.1, 0.0, False),
        ({"base"}, 1.9, 0.0, True),
        ({"base", "residual"}, 0.0, 0.0, False),
    ],
)
def test_on_cuda_the_base_network_goes_only_for_want_of_room(
    tiny_checkpoint, monkeypatch, loaded, free, idle, goes, needed_again
):
    """free, idle: in weights of one network; both networks are about equally large."""
    pipe = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    base, residual = (
        sum(weight.numel() for weight in build_network(pipe.config, name).unet.parameters())
        for name in pipe.config.networks
    )
    assert pipe.lets_base_go(needed_again) is not needed_again  # on a CPU
    cuda = torch.device("cuda", 0)
    session = engine.Session(pipe.config, pipe.folder, cuda, pipe.dtype, capture=False)
    session.networks = dict.fromkeys(loaded)
    size = 4 * (residual if loaded else (base + residual) / 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * size, 2 * free * size))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * size)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: (10 - idle) * size)
    assert session.lets_base_go(needed_again) is goes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(tiny_checkpoint, pipe, dtype):
    half = VideoFusionPipeline.from_pretrained(tiny_checkpoint, dtype=dtype, device="cpu")
    out = frames_of(half)
    assert out.dtype == np.float32
    assert np.abs(out - frames_of(pipe)).mean() < 0.03


def test_bad_arguments(pipe):
    for settings, error, message in (
        ({"label": "fly"}, ValueError, "unknown label 'fly', expected one of: cartwheel, jump"),
        ({"label": []}, ValueError, "empty list"),
        ({"num_frames": 0}, ValueError, "num_frames must be an int of at least 1"),
        ({"num_frames": 2.0}, ValueError, "num_frames must be an int of at least 1"),
        ({"num_videos": 0}, ValueError, "num_videos must be"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be"),
        ({"num_inference_steps": 1001}, ValueError, "num_inference_steps must be"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be in"),
        ({"guidance_scale": -1.0}, ValueError, "guidance_scale must be in"),
        ({"base_seed": -1}, ValueError, "base_seed must be in"),
        ({"residual_seed": 1.5}, TypeError, "residual_seed must be an int"),
        ({"base_path": "straight"}, ValueError, "base_path must be one of"),
        ({"output_type": "jpg"}, ValueError, "output_type must be one of"),
        ({"solver": "euler"}, ValueError, "solver must be one of"),
        ({"eta": 2.0}, ValueError, "eta must be"),
        ({"lam": 1.5}, ValueError, "lam must be in"),
        ({"lam": [0.5, 0.5]}, ValueError, "lam must be a number or"),
    ):
        with pytest.raises(error, match=message):
            frames_of(pipe, **settings)
    assert networks_of(pipe) == {}  # nothing was even read


def test_bad_checkpoints_and_devices(tiny_checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        VideoFusionPipeline.from_pretrained(tmp_path, **ON_CPU)
    for device, message in (
        ("toaster", "unknown device 'toaster'"),
        ("meta", "is not supported"),
        (f"cuda:{torch.cuda.device_count()}", "torch finds"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoFusionPipeline.from_pretrained(tiny_checkpoint, device=device)
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of"):
        VideoFusionPipeline.from_pretrained(tiny_checkpoint, dtype=torch.int8, device="cpu")


@pytest.mark.parametrize("name", ["base", "residual"])
def test_truncated_weights_are_found_before_sampling(tmp_path, name):
    folder = save_tiny(tmp_path / "m")
    file = folder / f"{name}.safetensors"
    data = file.read_bytes()
    steps = []
    for broken in (data[:-100], data[:4], b""):
        file.write_bytes(broken)
        pipe = VideoFusionPipeline.from_pretrained(folder, **ON_CPU)
        with pytest.raises(ValueError, match=f"{name}.safetensors is"):
            frames_of(pipe, callback=lambda *step: steps.append(step))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}.safetensors"):
        frames_of(VideoFusionPipeline.from_pretrained(folder, **ON_CPU))
    assert steps == []


def test_a_model_without_labels(tmp_path):
    config = read_config(save_tiny(tmp_path / "labelled"))
    networks = {
        name: replace(getattr(config, name), num_classes=None) for name in ("base", "residual")
    }
    pipe = VideoFusionPipeline.from_pretrained(
        save_tiny(tmp_path / "m", labels=(), **networks), **ON_CPU
    )
    assert frames_of(pipe, None, num_videos=2).shape == (2, 4, 16, 16, 3)
    with pytest.raises(ValueError, match="this model takes no label"):
        frames_of(pipe, "walk")
