"""Clips of one base path, previews, images to animate, the base cache, and kept loops."""

import gc
import json
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ON_CPU, TINY_LABELS, save_tiny
from held import loops_of, networks_of
from PIL import Image

import vfengine as vf
from vfengine.media.pictures import read_picture, to_network, to_uint8
from vfengine.pipelines.videofusion import VideoFusionPipeline
from vfengine.sampling.api import sample_video

STEPS = 4


@pytest.fixture
def pipe(tiny_checkpoint):
    return VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)


def call(pipe, label="walk", **settings):
    return pipe(label, **{"num_inference_steps": STEPS, **settings})


# -- several clips of one base path ----------------------------------------------------------------


def test_residuals_are_motions_of_one_base_path(pipe):
    phases = []
    out = call(pipe, num_residuals=3, callback=lambda *step: phases.append(step[0]))
    assert out.frames.shape == (3, 4, 16, 16, 3)
    assert out.trajectory.final.shape[0] == 1
    assert phases == ["base"] * (STEPS + 1) + ["residual"] * (STEPS + 1)
    for k in range(3):
        assert np.array_equal(out.frames[k, 2], out.frames[0, 2])
        alone = call(pipe, trajectory=out.trajectory, sample_offset=k)
        np.testing.assert_allclose(alone.frames[0], out.frames[k], atol=2e-4)
    np.testing.assert_allclose(call(pipe).frames[0], out.frames[0], atol=2e-4)
    assert not np.array_equal(out.frames[0, 1], out.frames[1, 1])
    later = call(pipe, num_residuals=2, sample_offset=1)  # clips 1 and 2 of the same base path
    np.testing.assert_allclose(later.frames, out.frames[1:], atol=2e-4)


def test_preview_is_the_base_frame_bit_for_bit(pipe):
    for settings in ({}, {"base_path": "clean"}, {"num_residuals": 2}, {"overlap_phases": True}):
        base_path = settings.get("base_path")
        preview = pipe.preview("walk", num_inference_steps=STEPS)
        assert preview.frames.shape == (1, 1, 16, 16, 3)
        clip = call(pipe, **settings)
        assert np.array_equal(clip.frames[0, 2], preview.frames[0, 0]), base_path
    both = pipe.preview(["walk", "jump"], num_inference_steps=STEPS, num_videos=2)
    clips = call(pipe, ["walk", "jump"], num_videos=2)
    assert np.array_equal(both.frames[:, 0], clips.frames[:, 2])
    again = call(pipe, ["walk", "jump"], num_videos=2, trajectory=both.trajectory)
    assert np.array_equal(again.frames, clips.frames)


# -- images ----------------------------------------------------------------------------------------


def test_a_picture_is_animated_and_comes_out_as_it_was(clean_checkpoint):
    pipe = VideoFusionPipeline.from_pretrained(clean_checkpoint, **ON_CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = call(pipe, image=Image.fromarray(pixels))
    assert np.array_equal(to_uint8(out.frames)[0, 2], pixels)
    assert not np.array_equal(out.frames[0, 1], out.frames[0, 2])
    assert out.trajectory.base_path == "clean"
    assert set(networks_of(pipe)) == {"residual"}  # no base generator
    several = call(pipe, image=Image.fromarray(pixels), num_videos=2)
    assert np.array_equal(several.frames[0, 2], several.frames[1, 2])
    again = call(pipe, trajectory=out.trajectory)
    assert np.array_equal(again.frames, out.frames)


def test_a_photo_is_animated_alike_however_it_is_given(clean_checkpoint, tmp_path):
    pipe = VideoFusionPipeline.from_pretrained(clean_checkpoint, **ON_CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file, exif = tmp_path / "photo.png", Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.fromarray(np.rot90(pixels)).save(file, exif=exif)
    frames = torch.from_numpy(pixels).movedim(-1, 0) / 255
    for image in (str(file), file, Image.open(file), pixels, pixels / 255, frames):
        assert np.array_equal(to_uint8(call(pipe, image=image).frames)[0, 2], pixels)
    with pytest.raises(TypeError, match=r"image must be a path, a PIL image.*got int"):
        call(pipe, image=3)


@pytest.mark.parametrize(("clean_share", "animates"), [(0.5, True), (0.0, False)])
def test_the_checkpoint_says_whether_it_animates_pictures(tmp_path, clean_share, animates):
    folder = save_tiny(tmp_path / "m", clean_share=clean_share)
    pipe = VideoFusionPipeline.from_pretrained(folder, **ON_CPU)
    image = Image.new("RGB", (16, 16))
    if animates:
        assert call(pipe, image=image).frames.shape == (1, 4, 16, 16, 3)
    else:
        with pytest.raises(ValueError, match="cannot animate a picture"):
            call(pipe, image=image)
        assert networks_of(pipe) == {}


def test_pictures_are_cropped_and_resized(tmp_path):
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))  # the square in the middle
    x = to_network(wide, 3, 16, 16)
    assert x.shape == (1, 3, 16, 16)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0, :, 8, 8], torch.tensor([-1.0, -1.0, 1.0]))
    assert (x[0, 2] > 0.5).all()  # what was red is cropped away
    assert to_network(wide, 1, 8, 4).shape == (1, 1, 8, 4)
    glass = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    assert (to_network(glass, 3, 16, 16) == -1).all()  # on black
    with pytest.raises(ValueError, match="1 or 3 channels"):
        to_network(wide, 4, 16, 16)
    for mode in ("I;16", "I", "F"):  # Pillow would turn them white or black
        with pytest.raises(ValueError, match=f"8 bits a channel.*{mode}"):
            to_network(Image.new(mode, (16, 16)), 3, 16, 16)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    wide.save(turned, exif=exif)
    assert read_picture(turned).size == (20, 40)


def test_broken_pictures_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_picture(tmp_path / "none.png")
    whole, cut, text = (tmp_path / name for name in ("whole.png", "cut.png", "text.png"))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    cut.write_bytes(whole.read_bytes()[:2000])
    text.write_text("no image")
    for file in (cut, text):
        with pytest.raises(ValueError, match="not an image that can be read"):
            read_picture(file)


# -- the cache of base paths -----------------------------------------------------------------------


def test_cached_base_paths_give_the_same_clip_without_the_base_network(tiny_checkpoint, tmp_path):
    first = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    cache = tmp_path / "a" / "cache"
    settings = {"base_cache": cache, "base_seed": 3, "num_videos": 2}
    clip = call(first, **settings).frames
    assert np.array_equal(clip, call(first, base_seed=3, num_videos=2).frames)
    assert len(list(cache.iterdir())) == 1

    second = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    assert np.array_equal(call(second, **settings).frames, clip)
    assert set(networks_of(second)) == {"residual"}
    call(second, **{**settings, "residual_seed": 9, "num_frames": 7, "lam": 0.2})
    assert len(list(cache.iterdir())) == 1
    preview = second.preview("walk", num_inference_steps=STEPS, **settings)
    assert np.array_equal(preview.frames[:, 0], clip[:, 2])
    assert set(networks_of(second)) == {"residual"}


def test_cache_tells_apart_whatever_a_path_depends_on(tiny_checkpoint, tmp_path):
    cache = tmp_path / "cache"
    base = {"num_inference_steps": STEPS, "base_cache": cache}
    pipe = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    half = VideoFusionPipeline.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16, device="cpu")
    other = VideoFusionPipeline.from_pretrained(save_tiny(tmp_path / "other", seed=1), **ON_CPU)
    changes = [
        {},
        {"base_seed": 1},
        {"guidance_scale": 3.0},
        {"num_inference_steps": 5},
        {"solver": "dpmsolver++"},
        {"eta": 0.5},
        {"num_videos": 2},
        {"sample_offset": 1},
    ]
    for change in changes:
        pipe.walk_base("walk", **{**base, **change})
    pipe.walk_base("jump", **base)
    pipe.walk_base(None, **base)
    half.walk_base("walk", **base)
    other.walk_base("walk", **base)
    assert len(list(cache.iterdir())) == len(changes) + 4


@pytest.mark.parametrize("change", [{"base_std": 0.7}, {"labels": TINY_LABELS[::-1]}])
def test_cache_tells_configurations_of_the_same_weights_apart(tiny_checkpoint, tmp_path, change):
    edited = tmp_path / "edited"
    shutil.copytree(tiny_checkpoint, edited)
    entries = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**entries, **change}))
    settings = {"num_inference_steps": STEPS, "base_cache": tmp_path / "cache"}
    paths = [
        VideoFusionPipeline.from_pretrained(folder, **ON_CPU).walk_base("walk", **settings)
        for folder in (tiny_checkpoint, edited)
    ]
    assert not torch.equal(paths[0].states, paths[1].states)


def test_cache_needs_weights_that_are_named(tiny_checkpoint, tmp_path):
    nameless = tmp_path / "nameless"
    shutil.copytree(tiny_checkpoint, nameless)
    entries = json.loads((nameless / "config.json").read_text())
    (nameless / "config.json").write_text(json.dumps({**entries, "sha256": {}}))
    pipe = VideoFusionPipeline.from_pretrained(nameless, **ON_CPU)
    with pytest.raises(ValueError, match="without a recorded SHA-256"):
        call(pipe, base_cache=tmp_path / "cache")


def test_cache_may_be_filled_by_many_at_once(pipe, tmp_path):
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        settings = {"num_inference_steps": STEPS, "base_cache": cache}
        paths = list(pool.map(lambda _: pipe.walk_base("walk", **settings), range(4)))
    assert all(torch.equal(path.states, paths[0].states) for path in paths)
    assert len(list(cache.iterdir())) == 1


def test_cache_refuses_what_is_not_its_own(pipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        call(pipe, base_cache=tmp_path / "file")
    cache = tmp_path / "cache"
    pipe.walk_base("walk", num_inference_steps=STEPS, base_cache=cache)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="truncated"):
        call(pipe, base_cache=cache)
    pipe.walk_base("jump", num_inference_steps=STEPS).save(file)
    with pytest.raises(ValueError, match="under another's name"):
        call(pipe, base_cache=cache)


# -- loops, kept and used again --------------------------------------------------------------------


def test_loops_and_their_buffers_are_used_again(pipe, tiny_checkpoint):
    """Calls with other noise and labels use the loops again, with a fresh pipeline's results."""
    fresh = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    keep = {"offload_base": False}
    clip = call(pipe, **keep).frames
    first = loops_of(pipe)
    assert set(first) == {"base", "residual"}
    other = call(pipe, "jump", base_seed=8, residual_seed=9, **keep).frames
    assert loops_of(pipe) == first
    assert np.array_equal(other, call(fresh, "jump", base_seed=8, residual_seed=9).frames)
    assert np.array_equal(call(pipe, **keep).frames, clip)
    trajectory = call(pipe, **keep).trajectory
    states = trajectory.states.clone()
    call(pipe, base_seed=8, **keep)
    assert torch.equal(trajectory.states, states)  # what was given away is not written again


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 5},
        {"guidance_scale": 3.0},
        {"label": None},
        {"num_videos": 2},
        {"solver": "unipc"},
        {"num_frames": 3},
        {"lam": 0.3},
        {"base_path": "clean"},
        {"window": 3},
        {"eta": 0.5},
    ],
)
def test_another_call_gets_another_loop(pipe, tiny_checkpoint, change):
    keep = {"offload_base": False}
    call(pipe, **keep)
    first = loops_of(pipe)["residual"]
    clip = call(pipe, **{**keep, **change}).frames
    assert loops_of(pipe)["residual"] is not first
    fresh = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    assert np.array_equal(call(fresh, **change).frames, clip)


def test_noise_on_the_way_is_of_the_seeds_asked_for(pipe):
    """Seeds are constants of a captured step, so they make another loop where there is noise."""
    settings = {"eta": 1.0, "offload_base": False}
    seeds = ((1, 0), (2, 0), (2, 5), (1, 0))
    clips = [call(pipe, residual_seed=r, base_seed=b, **settings).frames for r, b in seeds]
    assert np.array_equal(clips[0], clips[3])
    assert not np.array_equal(clips[0][:, 0], clips[1][:, 0])
    assert not np.array_equal(clips[1][:, 2], clips[2][:, 2])


def test_a_path_of_another_precision_gets_another_loop(pipe, tiny_checkpoint):
    path = pipe.walk_base("walk", num_inference_steps=STEPS)
    double = replace(path, states=path.states.double() * (1 + 1e-10))
    call(pipe, trajectory=path)
    clip = call(pipe, trajectory=double).frames
    fresh = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    assert np.array_equal(clip, call(fresh, trajectory=double).frames)


@pytest.mark.parametrize("phase", ["base", "residual"])
def test_a_callback_may_use_the_pipeline(pipe, phase):
    """A call within a call has buffers of its own."""
    keep = {"offload_base": False}
    expected, inner = call(pipe, **keep).frames, []

    def callback(name, done, total):
        if name == phase and done == 2:
            inner.append(call(pipe, base_seed=5, **keep).frames)

    assert np.array_equal(call(pipe, callback=callback, **keep).frames, expected)
    assert np.array_equal(inner[0], call(pipe, base_seed=5, **keep).frames)


def test_threads_may_share_a_pipeline(pipe):
    keep = {"offload_base": False}
    expected = [call(pipe, base_seed=seed, **keep).frames for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            clips = pool.map(lambda seed: call(pipe, base_seed=seed, **keep).frames, range(3))
            assert all(np.array_equal(a, b) for a, b in zip(clips, expected, strict=True))


def test_released_weights_and_replaced_loops_leave_at_once(pipe):
    """They are freed at once, not by the garbage collector: there is no reference cycle."""
    call(pipe, offload_base=False)
    base = weakref.ref(networks_of(pipe)["base"])
    loop = weakref.ref(loops_of(pipe)["residual"])
    gc.collect()
    gc.disable()
    try:
        call(pipe, offload_base=True)
        assert base() is None
        call(pipe, num_frames=3)
        assert loop() is None
        seen = []

        def look(phase, done, total):
            if phase == "base" and done == 0:
                seen.append(weakref.ref(networks_of(pipe)["base"]))
            if phase == "residual" and done == 0:
                seen.append(seen[0]())

        call(pipe, callback=look)
        assert seen[1] is None
    finally:
        gc.enable()


def test_a_failed_call_leaves_nothing_behind(pipe):
    expected = call(pipe)

    def fail(phase, done, total):
        if (phase, done) == ("residual", 2):
            raise ArithmeticError("enough")

    with pytest.raises(ArithmeticError):
        call(pipe, callback=fail)
    out = call(pipe, trajectory=expected.trajectory)
    assert np.array_equal(out.frames, expected.frames)
    assert out.timings["base"] == 0.0


def test_new_weights_are_never_sampled_with_an_old_loop(pipe):
    keep = {"offload_base": False}
    clip, first = call(pipe, **keep).frames, loops_of(pipe)
    network = networks_of(pipe)["residual"]
    with torch.no_grad():
        network.unet.unet.time_embedding[-1].bias.add_(0.5)  # what a planned one leaves unpacked
    changed = call(pipe, **keep).frames
    assert loops_of(pipe)["residual"] is not first["residual"]
    assert loops_of(pipe)["base"] is first["base"]
    assert not np.array_equal(changed, clip)


# -- both phases at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_residuals": 3}, {"eta": 0.7}, {"num_videos": 2}])
def test_overlapped_phases_give_the_same_clip(pipe, settings):
    expected = call(pipe, **settings)
    for _ in range(2):  # the second time with the loops of the first
        out = call(pipe, overlap_phases=True, **settings)
        assert np.array_equal(out.frames, expected.frames)
        assert torch.equal(out.trajectory.states, expected.trajectory.states)
        assert out.trajectory.metadata == expected.trajectory.metadata
    assert np.array_equal(call(pipe, **settings).frames, expected.frames)
    other = call(pipe, overlap_phases=True, base_seed=4, **settings)
    assert not np.array_equal(other.frames, expected.frames)
    again = call(pipe, overlap_phases=True, **settings)
    assert np.array_equal(again.frames, expected.frames)


# -- plain video models ----------------------------------------------------------------------------


def test_a_plain_video_model_is_sampled_by_the_same_call(tiny_video_checkpoint):
    pipe = VideoFusionPipeline.from_pretrained(tiny_video_checkpoint, **ON_CPU)
    steps = []
    out = call(pipe, guidance_scale=1.0, callback=lambda *step: steps.append(step))
    assert out.trajectory is None
    assert steps == [("video", k, STEPS) for k in range(STEPS + 1)]
    labels = torch.tensor([TINY_LABELS.index("walk")])
    network = networks_of(pipe)["video"]
    noise = vf.decomposed_noise((1, 4, 3, 16, 16), 0, 1).residual
    video = sample_video(
        lambda z, t: network(z, t, class_labels=labels),
        noise,
        schedule=pipe.schedule,
        num_inference_steps=STEPS,
    )
    expected = (video / 2 + 0.5).clamp(0, 1).permute(0, 1, 3, 4, 2).numpy()
    np.testing.assert_allclose(out.frames, expected, atol=1e-6)
    part = call(pipe, sample_offset=1).frames
    np.testing.assert_allclose(call(pipe, num_videos=2).frames[1], part[0], atol=2e-4)


def test_base_paths_say_what_they_are_of(pipe, tmp_path):
    out = call(pipe, base_cache=tmp_path / "cache", guidance_scale=3.0)
    assert out.trajectory.metadata["guidance_scale"] == "3.0"
    key = json.loads(out.trajectory.metadata["cache_key"])
    assert key["labels"] == '["walk"]'
    assert key["timesteps"] == pipe.schedule.timesteps(STEPS).tolist()
