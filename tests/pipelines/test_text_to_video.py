"""TextToVideoPipeline: order and memory, requests, latents, windows, stopping, what is refused."""

import gc

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from held import loops_of, networks_of
from published_folders import small_diffusers_folder

import vfengine as vf
from vfengine.pipelines.batches import Batches
from vfengine.pipelines.latents import LatentsFile, read_latents
from vfengine.pipelines.request import TextRequest
from vfengine.pipelines.videofusion import VideoFusionPipeline

PROMPT = "a panda eats bamboo"
SHORT = {"num_inference_steps": 2, "num_frames": 3}
PHASES = ["text", "video", "decode"]


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_diffusers_folder(tmp_path_factory.mktemp("published") / "diffusers")


@pytest.fixture
def pipe(folder):
    return vf.TextToVideoPipeline.from_pretrained(folder, **ON_CPU)


def test_a_sentence_becomes_a_clip(pipe):
    out = pipe(PROMPT, **SHORT)
    side = pipe.config.sample_size[0] * pipe.config.scale
    assert out.frames.shape == (1, 3, side, side, 3) and out.frames.dtype == np.float32
    assert 0 <= out.frames.min() < out.frames.max() <= 1
    assert out.latents.shape == (1, 3, 4, *pipe.config.sample_size)
    assert set(out.timings) == {"load", "text", "video", "decode"}
    assert all(seconds > 0 for seconds in out.timings.values())


def test_load_pipeline_knows_what_a_folder_holds(folder, tiny_checkpoint):
    assert isinstance(vf.load_pipeline(folder, **ON_CPU), vf.TextToVideoPipeline)
    assert isinstance(vf.load_pipeline(tiny_checkpoint, **ON_CPU), VideoFusionPipeline)
    assert isinstance(vf.load_pipeline(**ON_CPU), VideoFusionPipeline)
    with pytest.raises(ValueError, match="takes no base_unet"):
        vf.load_pipeline(folder, base_unet=tiny_checkpoint, **ON_CPU)


def test_output_types_are_one_result(pipe):
    frames = pipe(PROMPT, **SHORT).frames
    assert np.array_equal(
        pipe(PROMPT, output_type="pt", **SHORT).frames.permute(0, 1, 3, 4, 2).numpy(), frames
    )
    pictures = pipe(PROMPT, output_type="pil", **SHORT).frames
    assert [len(clip) for clip in pictures] == [3]
    assert np.array_equal(np.asarray(pictures[0][1]), (frames[0, 1] * 255).round().astype(np.uint8))
    latents = pipe(PROMPT, output_type="latent", **SHORT)
    assert latents.frames is latents.latents
    assert np.array_equal(pipe.decode(latents.latents), frames)


# -- order and memory ------------------------------------------------------------------------------


def test_one_network_at_a_time(pipe):
    seen = []

    def callback(phase, done, total):
        gc.collect()
        seen.append((phase, done, total, tuple(networks_of(pipe))))

    pipe(PROMPT, callback=callback, **SHORT)
    assert [step[:3] for step in seen] == [
        ("text", 0, 1),
        ("text", 1, 1),
        *(("video", k, 2) for k in range(3)),
        *(("decode", k, 3) for k in range(4)),
    ]
    for phase, done, _, loaded in seen:
        assert loaded == (() if (phase, done) == ("text", 1) else (phase,))
    gc.collect()
    assert not networks_of(pipe) and not loops_of(pipe)


def test_a_known_prompt_needs_no_text_encoder(pipe, monkeypatch):
    first = pipe(PROMPT, **SHORT).frames
    monkeypatch.setattr("vfengine.pipelines.published_session.load_text_encoder", None)
    phases = []
    again = pipe(PROMPT, callback=lambda phase, done, total: phases.append(phase), **SHORT)
    assert np.array_equal(again.frames, first) and "text" not in phases
    with pytest.raises(TypeError):  # another prompt reads it
        pipe("a fox", **SHORT)


def test_a_long_prompt_is_cut_with_a_warning(pipe):
    settings = {"num_inference_steps": 1, "num_frames": 1, "output_type": "latent"}
    with pytest.warns(
        UserWarning, match="it has 100 tokens, the text encoder reads 75: 'word word"
    ):
        long = pipe("word " * 100, **settings).latents
    assert torch.equal(long, pipe("word " * 75, **settings).latents)


@pytest.mark.parametrize("phase", PHASES)
def test_a_callback_stops_a_call(pipe, phase):
    whole = pipe(PROMPT, **SHORT).frames
    seen = []

    def callback(name, done, total):
        seen.append(name)
        if name == phase and done == 1:
            raise Stop

    fresh = vf.TextToVideoPipeline.from_pretrained(pipe.folder, **ON_CPU)
    with pytest.raises(Stop):
        fresh(PROMPT, callback=callback, **SHORT)
    assert seen[-1] == phase
    assert not networks_of(fresh) and not loops_of(fresh)
    assert np.array_equal(fresh(PROMPT, **SHORT).frames, whole)


# -- requests --------------------------------------------------------------------------------------


def test_a_clip_is_the_same_in_any_batch(pipe):
    together = pipe([PROMPT, "a fox"], num_videos=2, negative_prompt="blur", **SHORT).latents
    for number, prompt in enumerate([PROMPT, PROMPT, "a fox", "a fox"]):
        alone = pipe(prompt, negative_prompt=["blur"], sample_offset=number, **SHORT).latents
        assert torch.allclose(alone[0], together[number], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


def test_batches_count_the_steps_of_all_phases(pipe):
    request = TextRequest(prompt=PROMPT, num_videos=3, **SHORT)
    batches = Batches(pipe, request, 2)
    assert batches.steps.total == (1 + 2 + 6) + (1 + 2 + 3)
    seen = []
    made = list(batches.run(seen.append))
    assert [batch.first for batch in made] == [0, 2]
    assert seen[-1].done == seen[-1].total == 9 + 5  # the second batch knows the prompt
    whole = pipe(PROMPT, num_videos=3, **SHORT).latents
    assert torch.allclose(torch.cat([batch.output.latents for batch in made]), whole, atol=1e-4)


def test_guidance(pipe):
    clips = {
        (scale, negative): pipe(
            PROMPT, guidance_scale=scale, negative_prompt=negative, output_type="latent", **SHORT
        ).latents
        for scale in (1.0, 9.0)
        for negative in ("", "blur")
    }
    assert torch.equal(clips[1.0, ""], clips[1.0, "blur"])
    assert not torch.allclose(clips[9.0, ""], clips[9.0, "blur"], atol=1e-3)
    assert not torch.allclose(clips[9.0, ""], clips[1.0, ""], atol=1e-3)


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmsolver", "dpmsolver++", "unipc"])
def test_every_solver_runs(pipe, solver):
    out = pipe(PROMPT, solver=solver, num_inference_steps=4, num_frames=2, output_type="latent")
    assert out.latents.isfinite().all()


def test_sizes(pipe):
    out = pipe(PROMPT, height=24, width=40, num_frames=1, num_inference_steps=1)
    assert out.frames.shape[1:4] == (1, 24, 40)


def test_features_are_reused_window_by_window(pipe, tmp_path):
    """One clip of a batch is the clip alone; its file of latents notes the setting."""
    settings = {"num_inference_steps": 3, "num_frames": 6, "window": 4, "output_type": "latent"}
    file = tmp_path / "latents.safetensors"
    both = pipe(PROMPT, reuse_every=2, num_videos=2, save_latents=file, **settings).latents
    alone = pipe(PROMPT, reuse_every=2, sample_offset=1, **settings).latents
    assert torch.equal(both[1:], alone)
    assert not torch.equal(pipe(PROMPT, sample_offset=1, **settings).latents, alone)
    assert read_latents(file)[1]["reuse_every"] == 2


def test_windows_blend_long_clips(pipe):
    settings = {"num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    whole = pipe(PROMPT, **settings).latents
    windows = pipe(PROMPT, window=4, window_overlap=2, **settings).latents
    assert windows.shape == whole.shape and windows.isfinite().all()
    assert not torch.allclose(windows, whole, atol=1e-3)
    short = {**settings, "num_frames": 4}
    assert torch.equal(pipe(PROMPT, window=4, **short).latents, pipe(PROMPT, **short).latents)


@pytest.mark.parametrize("frames", [4, 9])
def test_loops(pipe, tmp_path, frames):
    settings = {"num_frames": frames, "num_inference_steps": 2, "output_type": "latent"}
    plain, file = pipe(PROMPT, **settings).latents, tmp_path / "l.safetensors"
    loop = pipe(PROMPT, loop=True, window=4, save_latents=file, **settings).latents
    assert loop.shape == plain.shape and loop.isfinite().all()
    assert not torch.allclose(loop, plain, atol=1e-3)
    assert read_latents(file)[1]["loop"] is True
    pipe(PROMPT, save_latents=file, **settings)
    assert "loop" not in read_latents(file)[1]
    whole = pipe(PROMPT, loop=True, window=0, **settings).latents
    assert torch.equal(pipe(PROMPT, loop=True, window=frames, **settings).latents, whole)


# -- latents ---------------------------------------------------------------------------------------


def test_latents_to_start_from(pipe):
    noise = torch.randn(2, 3, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    out = pipe(PROMPT, latents=noise, num_videos=2, num_inference_steps=2)
    assert out.latents.shape == noise.shape
    alone = pipe(PROMPT, latents=noise[1:].double(), num_inference_steps=2)
    assert torch.allclose(alone.latents, out.latents[1:], atol=1e-4)


def test_latents_are_in_a_file_before_they_are_decoded(pipe, tmp_path):
    file = tmp_path / "l.safetensors"

    def callback(phase, done, total):
        if phase == "decode":
            raise Stop

    with pytest.raises(Stop):
        pipe(PROMPT, seed=3, save_latents=file, callback=callback, **SHORT)
    latents, notes = read_latents(file)
    out = pipe(PROMPT, seed=3, **SHORT)
    assert torch.equal(latents, out.latents)
    assert (notes["prompt"], notes["seed"], notes["num_frames"]) == (PROMPT, 3, 3)
    assert np.array_equal(pipe.decode(latents), out.frames)


def test_a_file_holds_the_clips_of_all_batches(pipe, tmp_path):
    file = tmp_path / "l.safetensors"
    request = TextRequest(prompt=PROMPT, num_videos=3, save_latents=file, **SHORT)
    made = [batch.output.latents for batch in Batches(pipe, request, 2).run()]
    assert torch.equal(read_latents(file)[0], torch.cat(made))


def test_rejects_files_of_latents(tmp_path):
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        LatentsFile(tmp_path / "l.pt")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        LatentsFile(tmp_path / "no" / "l.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file of latents"):
        read_latents(tmp_path / "l.safetensors")
    file = tmp_path / "l.safetensors"
    file.write_bytes(b"none")
    with pytest.raises(ValueError, match="is not a complete file of latents"):
        read_latents(file)
    LatentsFile(file).add(torch.zeros(1, 2, 3), {})
    with pytest.raises(ValueError, match=r"must be float32 \[B, N, C, h, w\]"):
        read_latents(file)
    vf.BaseTrajectory.from_image(
        torch.zeros(1, 3, 4, 4), schedule=vf.NoiseSchedule.linear(), num_inference_steps=2
    ).save(file)
    with pytest.raises(ValueError, match="is not a file of latents"):
        read_latents(file)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prompt": None}, TypeError, "prompt must be a text or a list of texts, got None"),
        ({"prompt": [1]}, TypeError, "prompt must be a text"),
        ({"prompt": []}, ValueError, "prompt is an empty list"),
        (
            {"negative_prompt": ["a", "b"]},
            ValueError,
            "expected one negative_prompt for all or one",
        ),
        ({"negative_prompt": None}, TypeError, "negative_prompt must be a text"),
        ({"height": 12}, ValueError, "height must be a multiple of 2, got 12"),
        ({"width": 0}, ValueError, "width must be an int of at least 1"),
        ({"num_frames": 0}, ValueError, "num_frames must be an int of at least 1"),
        ({"num_videos": None}, ValueError, "num_videos must be an int of at least 1"),
        ({"guidance_scale": -1.0}, ValueError, r"guidance_scale must be in \[0, 100\]"),
        ({"num_inference_steps": 1001}, ValueError, "num_inference_steps must be an int in 1"),
        ({"solver": "euler"}, ValueError, "solver must be one of"),
        ({"solver": "unipc", "eta": 0.5}, ValueError, "eta must be 0"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"output_type": "jpg"}, ValueError, "output_type must be one of"),
        ({"window": 1}, ValueError, "window must be at least 2 frames"),
        ({"loop": True, "num_frames": 2}, ValueError, "a loop must have at least 3 frames, got 2"),
        ({"loop": True, "window": 2}, ValueError, "window must be at least 3 frames in a loop"),
        ({"window": 4, "window_overlap": 4}, ValueError, "window_overlap of a window of 4 frames"),
        ({"latents": 3}, TypeError, "latents must be a tensor of a float dtype, got int"),
        ({"latents": torch.zeros(1, 2, 3, 4, 4)}, ValueError, r"latents must be \[B, N, 4, h, w\]"),
        ({"latents": torch.zeros(2, 2, 4, 4, 4)}, ValueError, "latents hold 2 clips, but 1 are"),
        (
            {"latents": torch.zeros(1, 2, 4, 4, 4), "num_frames": 3},
            ValueError,
            "num_frames is 3, but the latents make 2",
        ),
    ],
)
def test_rejects_settings(pipe, monkeypatch, settings, error, message):
    monkeypatch.setattr(
        "vfengine.pipelines.published_session.load_text_encoder", None
    )  # refused before it
    settings = {"prompt": PROMPT, **settings}
    if "height" in settings:  # of a multiple that this model does not take
        settings["height"] = pipe.config.scale * 6 + 1
        message = f"height must be a multiple of {pipe.config.scale}, got {settings['height']}"
    with pytest.raises(error, match=message):
        pipe(settings.pop("prompt"), **settings)


def test_rejects_finished_latents(pipe):
    with pytest.raises(ValueError, match=r"finished latents must be \[B, N, 4, h, w\]"):
        pipe.decode(torch.zeros(2, 4, 4, 4))
    with pytest.raises(TypeError, match="finished latents must be a tensor of a float dtype"):
        pipe.decode(torch.zeros(1, 1, 4, 4, 4, dtype=torch.int64))


# -- memory on CUDA --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "cached", "kept"),
    [
        (2.1, 0.0, True),  # room for twice the weights: themselves, and as much to work in
        (1.9, 0.0, False),
        (1.9, 0.2, True),  # torch's own cache is room too
    ],
)
def test_on_cuda_networks_stay_where_there_is_room(pipe, monkeypatch, free, cached, kept):
    session, released = pipe._session, []
    size = pipe.config.num_weights["video"] * session.dtype.itemsize
    values = {"memory_reserved": cached * size, "memory_allocated": 0.0}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * size, 8 * size))
    monkeypatch.setattr(session, "release", released.append)
    session.make_room("video")  # a CPU asks nothing
    monkeypatch.setattr(session, "device", torch.device("cuda"))
    session.make_room("video")
    session.networks |= {"text": None}
    session.make_room("video")
    assert released == ([] if kept else ["text"])
