"""Engines: what they make of jobs, alone and in batches; cancelling, stopping, failing."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ON_CPU, save_tiny
from latent_models import PROMPTS, save_latent_model
from PIL import Image
from published_folders import small_diffusers_folder
from serving_engines import acting, engine_of, run_all
from serving_jobs import STEPS, add, files_of, frames_of, put, settings_of

from vfengine.media.metadata import read_metadata
from vfengine.media.pictures import enlarge
from vfengine.media.video import read_video, write_video
from vfengine.pipelines.videofusion import VideoFusionPipeline, to_uint8
from vfengine.serving import making
from vfengine.serving.engine import model_info
from vfengine.serving.jobs import SOURCE, SPRITESHEET, THUMBNAIL, UPLOAD
from vfengine.serving.model_info import ModelInfo
from vfengine.serving.store import Store


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of pixels and labels, which also animates pictures, and of latents and prompts."""
    place = tmp_path_factory.mktemp("models")
    return {
        "pixels": save_tiny(place / "pixels", clean_share=0.5),
        "latents": save_latent_model(place / "latents"),
    }


@pytest.fixture
def engine(folders, store):
    return engine_of(folders["pixels"], store)


def made_alone(folder, settings):
    """The frames of a new clip, by the pipeline itself, uint8."""
    pipe = VideoFusionPipeline.from_pretrained(folder, **ON_CPU)
    names = ("label", "prompt", "negative_prompt", "num_frames", "num_inference_steps", "solver")
    names += ("guidance_scale", "base_seed", "residual_seed", "base_path", "eta")
    return to_uint8(pipe(**{name: getattr(settings, name) for name in names}).frames[0])


# -- clips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixels", "latents"])
@pytest.mark.parametrize("base_path", ["stepwise", "clean"])
def test_jobs_in_any_batch_are_the_pipelines_clips(folders, tmp_path, kind, base_path):
    shown = {
        "pixels": [{"label": "walk"}, {"label": "jump"}, {"label": "walk"}],
        "latents": [
            {"prompt": PROMPTS[1]},
            {"label": "jump"},
            {"prompt": "red", "negative_prompt": "in"},
        ],
    }[kind]
    many = [
        settings_of(**one, base_seed=k // 2, residual_seed=k, base_path=base_path, scale=2)
        for k, one in enumerate(shown)
    ]
    made = {}
    for size in (1, 3):
        store = Store(tmp_path / str(size))
        engine = engine_of(folders[kind], store, batch_size=size)
        names = add(store, *many)
        assert run_all(engine) == {1: 3, 3: 1}[size]
        made[size] = [files_of(store, name) for name in names]
        assert all(files.keys() == {"video.webp", THUMBNAIL, SPRITESHEET} for files in made[size])
        for name, settings in zip(names, many, strict=True):
            expected = enlarge(made_alone(folders[kind], settings), 2)
            assert np.array_equal(frames_of(store, name), expected)
            assert np.array_equal(read_video(store.file(name, "video.webp")).frames, expected)
            base = np.asarray(Image.open(store.file(name, THUMBNAIL)))
            assert np.array_equal(base, expected[len(expected) // 2])
            job = store.get(name)
            assert job.progress == 100 and job.has_base and job.result["batch"] == size
            assert job.result["num_frames"] == 4 and job.result["seconds"] == 0.5
    assert made[1] == made[3]


def test_what_the_engine_says(engine, store, folders):
    assert not engine.run_once()
    add(store, settings_of(), settings_of(residual_seed=8))
    engine.batch_size = 2
    assert engine.run_once() and not engine.run_once()
    (event,) = engine.events
    assert (event["event"], event["clips"]) == ("batch", 2)
    assert {"base", "residual", "write"} <= event["seconds"].keys()
    assert event["peak_memory_mb"] > 0 and event["process_memory_mb"] > 0
    info = model_info(engine.maker.pipe, "tiny", 4)
    assert ModelInfo.of(json.loads(json.dumps(asdict(info)))) == info
    assert (info.kind, info.width, info.height, info.num_frames) == ("decomposed", 16, 16, 4)
    assert info.labels == ("cartwheel", "jump", "walk") and not info.takes_prompts
    assert info.animates_pictures and info.base_path == "stepwise" and info.max_batch == 4
    assert info.least_loop == 4
    latent = model_info(engine_of(folders["latents"], store).maker.pipe, "tiny", 4)
    assert latent.takes_prompts and (latent.width, latent.height) == (32, 32)


def test_a_plain_model(tiny_video_checkpoint, store):
    engine = engine_of(tiny_video_checkpoint, store, batch_size=4)
    names = add(store, settings_of(), settings_of(residual_seed=8))
    assert run_all(engine) == 2 and [event["clips"] for event in engine.events] == [1, 1]
    for name in names:
        frames = frames_of(store, name)
        assert np.array_equal(np.asarray(Image.open(store.file(name, THUMBNAIL))), frames[2])
        assert store.get(name).has_base
    info = model_info(engine.maker.pipe, "plain", 4)
    assert (info.kind, info.base_paths, info.has_base, info.max_batch) == ("plain", (), False, 1)
    assert info.least_loop is None


def test_a_clip_says_what_made_it(folders, store):
    engine = engine_of(folders["latents"], store)
    look = {"label": "walk", "prompt": None, "negative_prompt": ""}
    names = add(
        store,
        settings_of(prompt="red", format="mp4"),
        settings_of(prompt="red", look=look),
        settings_of(picture=True),
        settings_of(num_frames=2, extends=""),
    )
    Image.new("RGB", (32, 32), "red").save(store.folder / "red.png")
    put(store, names[2], (store.folder / "red.png").read_bytes(), UPLOAD)
    write_video(store.folder / "sent.webp", np.zeros((3, 32, 32, 3), np.uint8), 8.0)
    put(store, names[3], (store.folder / "sent.webp").read_bytes(), SOURCE)
    run_all(engine)
    records = []
    for name in names:
        text = read_metadata(store.file(name, store.get(name).settings.video_file))
        assert str(store.folder) not in text
        records.append(json.loads(text))
    made, looked, pictured, stitched = records
    wanted = {"prompt": "red", "base_seed": 5, "residual_seed": 6, "num_frames": 4, "fps": 8.0}
    assert wanted.items() <= made["settings"].items() and "beyond" not in made
    assert looked["beyond"]["look"] == look
    assert pictured["files"]["image"]["name"] == "upload"
    assert stitched["beyond"]["source"] == {"frames": 3}


def test_a_text_to_video_model(tmp_path, store):
    folder = small_diffusers_folder(tmp_path / "diffusers")
    engine = engine_of(folder, store, batch_size=4)
    info = model_info(engine.maker.pipe, "text", 4)
    assert (info.kind, info.takes_prompts, info.labels, info.has_base) == ("text", True, (), False)
    settings = settings_of(prompt="a panda eats bamboo", num_frames=3, num_inference_steps=2)
    good, small, bad = add(
        store, settings, replace(settings, height=8, width=16), replace(settings, picture=True)
    )
    run_all(engine)
    frames = frames_of(store, good)
    pipe = engine.maker.pipe
    alone = pipe(
        "a panda eats bamboo", num_frames=3, num_inference_steps=2, seed=6, guidance_scale=2
    )
    assert np.array_equal(frames, to_uint8(alone.frames[0]))
    assert frames.shape[1:3] == (info.height, info.width)
    assert frames_of(store, small).shape == (3, 8, 16, 3)
    assert "no base frame" in store.get(bad).error["message"]


def test_loops(engine, store, folders):
    loop = settings_of(loop=True, num_frames=8)
    name, other, bad = add(store, loop, replace(loop, loop=False), replace(loop, extends=""))
    run_all(engine)
    pipe = VideoFusionPipeline.from_pretrained(folders["pixels"], **ON_CPU)
    alone = pipe(
        "walk", num_inference_steps=STEPS, base_seed=5, residual_seed=6, num_frames=8, loop=True
    )
    assert np.array_equal(frames_of(store, name), to_uint8(alone.frames[0]))
    assert not np.array_equal(frames_of(store, name), frames_of(store, other))
    assert "no loop" in store.get(bad).error["message"]


def test_noise_in_each_step(engine, store, folders):
    """With eta, noise is drawn by the batch's one seed: a clip at a time."""
    engine.batch_size = 4
    many = [settings_of(eta=0.5, residual_seed=seed) for seed in (6, 7)]
    names = add(store, *many)
    assert run_all(engine) == 1 and [event["clips"] for event in engine.events] == [1, 1]
    for name, settings in zip(names, many, strict=True):
        assert np.array_equal(frames_of(store, name), made_alone(folders["pixels"], settings))


def test_a_base_path_is_walked_once(engine, store, monkeypatch):
    steps = acting(monkeypatch, "none", 0, None)
    engine.batch_size = 2
    add(store, *[settings_of(residual_seed=seed) for seed in range(5)])
    assert run_all(engine) == 3
    assert [step for step in steps if step[0] == "base" and step[1]] == [
        ("base", done, STEPS) for done in (1, 2, 3)
    ]
    assert len(list(store.base_paths.iterdir())) == 1
    assert [(event["walked"], event["found"]) for event in engine.events] == [
        (1, 1),
        (0, 2),
        (0, 1),
    ]
    add(store, *[settings_of(eta=0.5, residual_seed=seed) for seed in (1, 2)])
    run_all(engine)
    assert [(event["walked"], event["found"]) for event in engine.events[3:]] == [(1, 0), (0, 1)]


# -- what starts from something --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_pictures(folders, store, tmp_path, kind):
    engine = engine_of(folders[kind], store, batch_size=2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    names = add(store, *[settings_of(picture=True, residual_seed=seed) for seed in (1, 2)])
    for name, picture in zip(names, pixels, strict=True):
        Image.fromarray(picture).save(tmp_path / "picture.png")
        put(store, name, (tmp_path / "picture.png").read_bytes(), UPLOAD)
    assert run_all(engine) == 1
    pipe = VideoFusionPipeline.from_pretrained(folders[kind], **ON_CPU)
    for name, picture, seed in zip(names, pixels, (1, 2), strict=True):
        image = Image.fromarray(picture)
        alone = pipe("walk", num_inference_steps=STEPS, residual_seed=seed, image=image)
        assert np.array_equal(frames_of(store, name), to_uint8(alone.frames[0]))


def test_another_motion_of_a_look(folders, store, monkeypatch):
    engine = engine_of(folders["latents"], store)
    first = settings_of(prompt=PROMPTS[0], negative_prompt="red")
    look = {"label": None, "prompt": PROMPTS[0], "negative_prompt": "red"}
    motion = replace(first, residual_seed=9)
    other = replace(first, prompt=PROMPTS[1], negative_prompt="", look=look)
    names = add(store, first, motion, other)
    run_all(engine)
    assert len(list(store.base_paths.iterdir())) == 1
    clips = [frames_of(store, name) for name in names]
    assert all(np.array_equal(clip[2], clips[0][2]) for clip in clips)
    for clip in clips[1:]:
        assert not np.array_equal(clip, clips[0])
    pipe = VideoFusionPipeline.from_pretrained(folders["latents"], **ON_CPU)
    base = {"num_inference_steps": STEPS}
    path = pipe.walk_base(prompt=PROMPTS[0], negative_prompt="red", base_seed=5, **base)
    alone = pipe(prompt=PROMPTS[1], trajectory=path, residual_seed=6, **base)
    assert np.array_equal(clips[2], to_uint8(alone.frames[0]))


def test_a_clip_goes_on(engine, store):
    (first,) = add(store, settings_of(scale=3))
    run_all(engine)
    source = frames_of(store, first)
    settings = settings_of(scale=3, num_frames=6, extends=first, residual_seed=9)
    names = add(store, settings, settings)
    for name in names:
        put(store, name, store.file(first, SPRITESHEET).read_bytes(), SOURCE)
    store.delete(first)  # which nothing needs any more
    run_all(engine)
    for name in names:
        frames = frames_of(store, name)
        assert len(frames) == 4 + 6 and np.array_equal(frames[:4], source)
        assert store.get(name).result["seconds"] == 10 / 8
    base = np.asarray(Image.open(store.file(name, THUMBNAIL)))
    assert np.array_equal(base, source[-1])  # it goes on from exactly this picture
    pipe = engine.maker.pipe
    picture = Image.fromarray(source[-1][::3, ::3])
    alone = pipe("walk", num_frames=13, num_inference_steps=STEPS, residual_seed=9, image=picture)
    added = enlarge(to_uint8(alone.frames[0])[7:], 3)
    assert np.array_equal(frames[4:], added)


# -- what ends before time -------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["base", "residual"])
def test_deleting_stops_within_a_step(engine, store, monkeypatch, phase):
    names = add(store, settings_of(), settings_of(residual_seed=8))
    engine.batch_size = 2
    steps = acting(monkeypatch, phase, 1, lambda: [store.delete(name) for name in names])
    assert engine.run_once() and not engine.events
    assert steps[-1] == (phase, 1, STEPS)  # the step during which they were deleted is the last
    assert [files_of(store, name) for name in names] == [{}, {}]
    assert not engine.run_once()
    (name,) = add(store, settings_of())
    run_all(engine)
    assert store.get(name).status == "completed"


@pytest.mark.parametrize("phase", ["base", "residual", "write"])
def test_deleting_one_leaves_the_others(engine, store, folders, monkeypatch, phase):
    many = [settings_of(base_seed=seed, residual_seed=seed) for seed in range(3)]
    names = add(store, *many)
    engine.batch_size = 3
    acting(monkeypatch, phase, 1, lambda: store.delete(names[1]))
    run_all(engine)
    assert store.get(names[1]) is None and not store.folder_of(names[1]).exists()
    assert engine.events[0]["clips"] == 2
    for k in (0, 2):
        expected = made_alone(folders["pixels"], many[k])
        assert np.array_equal(frames_of(store, names[k]), expected)


@pytest.mark.parametrize("phase", ["base", "residual", "write"])
def test_stopping_gives_jobs_back(folders, tmp_path, monkeypatch, phase):
    many = [settings_of(residual_seed=seed) for seed in range(2)]
    store = Store(tmp_path / "store")
    names = add(store, *many)
    engine = engine_of(folders["pixels"], store, batch_size=2)
    with monkeypatch.context() as patched:
        acting(patched, phase, 1, engine.stop.set)
        engine.run()  # ends by itself
    jobs = [store.get(name) for name in names]
    finished = sum(job.status == "completed" for job in jobs)
    assert finished == (phase == "write")
    waiting = [job for job in jobs if job.status == "queued"]
    assert len(waiting) == 2 - finished
    assert all((job.attempts, job.progress, job.phase) == (0, 0, "") for job in waiting)
    steps = acting(monkeypatch, "none", 0, None)
    run_all(engine_of(folders["pixels"], store, batch_size=2))
    assert any(step[0] == "base" and step[1] for step in steps) == (phase == "base")
    for name, settings in zip(names, many, strict=True):
        assert np.array_equal(frames_of(store, name), made_alone(folders["pixels"], settings))


def test_a_job_that_fails_leaves_its_batch(engine, store):
    good, bad, also = add(store, *[settings_of(picture=True, residual_seed=k) for k in range(3)])
    Image.new("RGB", (16, 16), "red").save(store.folder / "red.png")
    for name in (good, also):
        put(store, name, (store.folder / "red.png").read_bytes(), UPLOAD)
    put(store, bad, b"no picture", UPLOAD)
    engine.batch_size = 3
    assert run_all(engine) == 1
    assert [store.get(name).status for name in (good, bad, also)] == [
        *("completed", "failed", "completed")
    ]
    error = store.get(bad).error
    assert error["code"] == "invalid_request"
    assert error["message"] == "input_reference: not a picture that can be read"
    assert engine.events[0] == {"event": "failed", "code": "invalid_request"}


def test_settings_that_the_model_cannot_take(engine, store):
    many = [settings_of(label="swim"), settings_of(prompt="x"), settings_of(num_inference_steps=0)]
    names = add(store, *many)
    run_all(engine)
    errors = [store.get(name).error for name in names]
    assert [error["code"] for error in errors] == ["invalid_request"] * 3
    assert "unknown label 'swim', expected one of: cartwheel" in errors[0]["message"]


def test_a_batch_that_fails_is_made_one_by_one(engine, store, folders, monkeypatch):
    many = [settings_of(residual_seed=seed) for seed in range(4)]
    names = add(store, *many)
    sampled, sizes = making.sample_together, []

    def limited(pipe, requests, **rest):
        sizes.append(len(requests))
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        if requests[0].residual_seed == 2:
            raise RuntimeError("a secret of /the/disk")
        return sampled(pipe, requests, **rest)

    monkeypatch.setattr(making, "sample_together", limited)
    engine.batch_size = 4
    run_all(engine)
    assert sizes == [4, 1, 1, 1, 1] and engine.batch_size == 2
    for name, settings in zip(names, many, strict=True):
        if settings.residual_seed == 2:
            error = store.get(name).error
            assert error == {
                "code": "server_error",
                "message": "the clip could not be made (RuntimeError)",
            }
        else:
            assert np.array_equal(frames_of(store, name), made_alone(folders["pixels"], settings))


def test_out_of_memory(engine, store, monkeypatch):
    def too_much(*_, **__):
        raise MemoryError

    monkeypatch.setattr(making, "sample_together", too_much)
    (name,) = add(store, settings_of())
    run_all(engine)
    assert store.get(name).error["code"] == "out_of_memory"
    assert engine.events == [{"event": "failed", "code": "out_of_memory"}]


# -- progress --------------------------------------------------------------------------------------


def test_progress_runs_over_all_phases(folders, store, monkeypatch):
    monkeypatch.setattr("vfengine.serving.watch._SECONDS_BETWEEN", 0.0)
    engine = engine_of(folders["latents"], store)
    shown, report = [], store.report

    def noted(name, worker, phase, progress, has_base=None):
        shown.append((phase, progress, bool(has_base)))
        return report(name, worker, phase, progress, has_base)

    monkeypatch.setattr(store, "report", noted)
    steps = {"num_inference_steps": 10}
    for settings in (settings_of(**steps), settings_of(**steps), settings_of(base_seed=9, **steps)):
        shown.clear()
        add(store, settings)
        run_all(engine)
        values = [progress for _, progress, _ in shown]
        assert values == sorted(values) and values[0] == 0 and values[-1] <= 99
        phases = [phase for phase, _, _ in shown]
        order = list(dict.fromkeys(phases))
        assert [name for name in order if name != "text"] == [
            *("base", "residual", "decode", "write")
        ]
        before = [phase for phase, _, has_base in shown if has_base]
        assert before == ["base"]
