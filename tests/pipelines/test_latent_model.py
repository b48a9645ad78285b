"""Models of latents and prompts: prompts, order and memory, decoding, pictures, base paths."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from held import loops_of, networks_of
from latent_models import (
    PROMPTS,
    SIZE,
    latent_config,
    latent_video_config,
    part_modules,
    save_latent_model,
)
from PIL import Image

import vfengine as vf
from vfengine.formats.checkpoint import load_network, read_config
from vfengine.formats.word_tokenizer import WordTokenizer
from vfengine.pipelines.batches import Batches
from vfengine.pipelines.request import SamplingRequest
from vfengine.pipelines.videofusion import VideoFusionPipeline, to_uint8

STEPS = 3
JUMP, WALK = PROMPTS[1:]
RED = "a person in a red sweater walking"
PHASES = ("text", "base", "residual", "decode")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_latent_model(tmp_path_factory.mktemp("models") / "latent")


@pytest.fixture
def pipe(folder):
    return VideoFusionPipeline.from_pretrained(folder, **ON_CPU)


def call(pipe, prompt=WALK, **settings):
    return pipe(prompt=prompt, **{"num_inference_steps": STEPS, **settings})


# -- prompts ---------------------------------------------------------------------------------------


def test_a_label_is_its_prompt(pipe):
    clip = call(pipe).frames
    assert clip.shape == (1, 4, SIZE, SIZE, 3) and clip.dtype == np.float32
    assert 0.0 <= clip.min() < clip.max() <= 1.0
    assert np.array_equal(pipe("walk", num_inference_steps=STEPS).frames, clip)
    assert pipe.labels == ("cartwheel", "jump", "walk")
    for other in (JUMP, RED, ""):
        assert not np.array_equal(call(pipe, other).frames, clip)
    assert np.array_equal(pipe(num_inference_steps=STEPS).frames, call(pipe, "").frames)
    with pytest.raises(ValueError, match="unknown label 'swim', expected one of: cartwheel, jump"):
        pipe("swim")


@pytest.mark.parametrize("method", ["interleaved", "two_phase"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_is_the_samplers_on_plain_modules(pipe, folder, method, scale):
    config, parts = read_config(folder), part_modules(latent_config())
    tokenize = WordTokenizer(parts["tokenizer"], config.text_encoder.max_length)
    context, negative = parts["text_encoder"](tokenize([RED, "blue"])).detach().split(1)

    def guided(network):
        def model(z, t):
            conditional = network(z, t, context=context)
            return (1 - scale) * network(z, t, context=negative) + scale * conditional

        return model

    noise = vf.decomposed_noise((1, 4, 4, 8, 8), base_seed=5, residual_seed=6)
    z = vf.sample(
        *(guided(load_network(folder, config, name)) for name in config.networks),
        noise.base,
        noise.residual,
        schedule=config.noise_schedule(),
        num_inference_steps=STEPS,
        lam=config.lam,
        method=method,
    )
    mean, std = (torch.tensor(v).view(4, 1, 1) for v in (config.latent_mean, config.latent_std))
    with torch.no_grad():
        video = parts["autoencoder"].decode(z * std + mean)
    seeds = {"base_seed": 5, "residual_seed": 6}
    settings = {"negative_prompt": "blue", "guidance_scale": scale, "output_type": "pt", **seeds}
    out = call(pipe, RED, **settings)
    torch.testing.assert_close(out.trajectory.final[0], z[0, 2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.frames, (video / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_negative_prompts(pipe):
    plain = call(pipe, RED)
    blue = call(pipe, RED, negative_prompt="blue lawn")
    assert not np.array_equal(plain.frames, blue.frames)
    labelled = pipe("walk", negative_prompt="blue lawn", num_inference_steps=STEPS)
    assert np.array_equal(labelled.frames, call(pipe, negative_prompt="blue lawn").frames)
    unguided = call(pipe, RED, guidance_scale=1.0).frames
    assert np.array_equal(call(pipe, RED, negative_prompt=RED, guidance_scale=7.0).frames, unguided)
    each = call(pipe, [RED, WALK], negative_prompt=["blue lawn", ""]).frames
    assert np.array_equal(each[0], blue.frames[0])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"label": "walk"}, ValueError, "a prompt cannot go with a label: each says what to show"),
        ({"prompt": []}, ValueError, "prompt is an empty list"),
        ({"prompt": 3}, TypeError, "prompt must be a text or a list of texts, got 3"),
        ({"negative_prompt": None}, TypeError, "negative_prompt must be a text"),
        ({"negative_prompt": ["x", "y"]}, ValueError, "one for each of 1 prompts, got 2"),
    ],
)
def test_refused(pipe, settings, error, message):
    with pytest.raises(error, match=message):
        pipe(**{"prompt": WALK, **settings})
    assert not networks_of(pipe)


def test_a_model_of_labels_takes_no_prompt(tiny_checkpoint):
    pipe = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    for make in (pipe, pipe.preview, pipe.walk_base):
        with pytest.raises(ValueError, match="labels alone, so it takes no prompt, negative_prom"):
            make(prompt=WALK, negative_prompt="x", num_inference_steps=STEPS)


def test_words_are_named_that_it_does_not_know(pipe):
    with pytest.warns(UserWarning, match="does not know these words: zebra, stadium$"):
        call(pipe, "a zebra walking in a stadium", negative_prompt="a zebra")
    with pytest.warns(UserWarning, match="a prompt is cut: it has 10 tokens, .* reads 8: 'red red"):
        long = call(pipe, "red " * 10).frames
    assert np.array_equal(long, call(pipe, "red " * 8).frames)


# -- order and memory ------------------------------------------------------------------------------


def test_one_network_at_a_time(pipe):
    seen = []
    call(pipe, callback=lambda *step: seen.append((*step, tuple(networks_of(pipe)))))
    assert [step[:3] for step in seen] == [
        *(("text", k, 1) for k in range(2)),
        *(("base", k, STEPS) for k in range(STEPS + 1)),
        *(("residual", k, STEPS) for k in range(STEPS + 1)),
        *(("decode", k, 4) for k in range(5)),
    ]
    for phase, done, _, loaded in seen:
        assert loaded == (() if (phase, done) == ("text", 1) else (phase,))
    assert not networks_of(pipe) and not loops_of(pipe)


def test_networks_stay_where_they_are_needed_again(pipe):
    clips = call(pipe, [WALK, RED])
    assert set(networks_of(pipe)) == {"base", "residual", "decode"}
    again = call(pipe, [WALK, RED], offload_base=True)
    assert np.array_equal(again.frames, clips.frames) and not networks_of(pipe)


def test_timings_name_the_phases(pipe):
    timings = call(pipe).timings
    assert set(timings) == {"load", *PHASES}
    assert min(timings.values()) > 0.0
    assert set(pipe.preview(prompt=WALK, num_inference_steps=STEPS).timings) == set(timings)


def test_a_known_prompt_needs_no_text_encoder(pipe):
    reads, load = [], pipe._session.load
    pipe._session.load = lambda name: reads.append(name) or load(name)
    call(pipe, [WALK, RED, WALK])
    call(pipe, RED)
    assert reads.count("text") == 1
    call(pipe, JUMP)
    assert reads.count("text") == 2


@pytest.mark.parametrize("phase", PHASES)
def test_a_callback_stops_a_call(pipe, phase):
    def callback(name, done, total):
        if (name, done) == (phase, 1):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        call(pipe, callback=callback)
    assert np.array_equal(
        call(pipe).frames,
        call(VideoFusionPipeline.from_pretrained(pipe.folder, **ON_CPU)).frames,
    )


@pytest.mark.parametrize(
    ("missing", "before"),
    [
        ("tokenizer.json", []),
        ("text_encoder.safetensors", []),
        ("residual.safetensors", []),
        ("autoencoder.safetensors", []),
        ("base.safetensors", ["text", "text"]),
    ],
)
def test_missing_files_are_named_before_anything_is_sampled(folder, tmp_path, missing, before):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    pipe = VideoFusionPipeline.from_pretrained(tmp_path / "m", **ON_CPU)
    seen = []
    with pytest.raises(FileNotFoundError, match=f"checkpoint .* has no {missing}"):
        call(pipe, callback=lambda phase, *_: seen.append(phase))
    assert seen == before


# -- clips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("dpmsolver", 0.0)])
def test_a_clip_is_the_same_in_any_batch(pipe, solver, eta):
    settings = {"solver": solver, "eta": eta, "negative_prompt": "blue"}
    together = call(pipe, [WALK, RED], num_videos=2, **settings).frames
    assert not np.allclose(together[0], together[1], atol=0.01)
    for number, prompt in enumerate([WALK, WALK, RED, RED]):
        alone = call(pipe, prompt, sample_offset=number, **settings).frames
        np.testing.assert_allclose(alone[0], together[number], atol=2e-4)


def test_batches_count_the_steps_of_all_phases(pipe):
    request = SamplingRequest(prompt=RED, num_videos=3, num_inference_steps=STEPS)
    batches, seen = Batches(pipe, request, 2), []
    assert batches.steps.total == (1 + 2 * STEPS + 8) + (1 + 2 * STEPS + 4)
    made = list(batches.run(seen.append))
    assert seen[-1].done == seen[-1].total == 15 + 10  # the second batch knows the prompt
    whole = call(pipe, RED, num_videos=3).frames
    np.testing.assert_allclose(
        np.concatenate([batch.output.frames for batch in made]), whole, atol=2e-4
    )


def test_motions_of_one_base_path(pipe):
    out = call(pipe, num_residuals=2)
    assert out.frames.shape[0] == 2 and out.trajectory.final.shape == (1, 4, 8, 8)
    assert np.array_equal(out.frames[0, 2], out.frames[1, 2])
    assert not np.array_equal(out.frames[0, 1], out.frames[1, 1])


def test_windows_and_overlapped_phases(pipe):
    long = call(pipe, num_frames=9)
    assert long.frames.shape == (1, 9, SIZE, SIZE, 3)
    again = call(pipe, num_frames=9, overlap_phases=True)
    assert np.array_equal(again.frames, long.frames)
    assert torch.equal(again.trajectory.states, long.trajectory.states)
    assert not np.array_equal(call(pipe, num_frames=9, window=0).frames, long.frames)


@pytest.mark.parametrize("base_path", ["stepwise", "clean"])
def test_preview_is_the_base_frame_bit_for_bit(pipe, base_path):
    preview = pipe.preview(prompt=RED, num_inference_steps=STEPS)
    clip = call(pipe, RED, base_path=base_path)
    assert preview.frames.shape == (1, 1, SIZE, SIZE, 3)
    assert np.array_equal(clip.frames[0, 2], preview.frames[0, 0])
    phases = []
    request = SamplingRequest(prompt=RED, num_inference_steps=STEPS, preview=True)
    out = pipe.sample(request, lambda phase, *_: phases.append(phase))
    assert np.array_equal(out.frames, preview.frames)
    assert set(phases) == set(pipe.phases(request)) - {"text"} == {"base", "decode"}
    given = replace(request, trajectory=out.trajectory)
    assert pipe.phases(given) == ("decode",)
    assert np.array_equal(pipe.sample(given).frames, preview.frames)


def test_base_paths_are_latents_and_can_be_followed_again(pipe, tmp_path):
    first = call(pipe, RED, negative_prompt="blue")
    first.trajectory.save(tmp_path / "path.safetensors")
    path = vf.BaseTrajectory.load(tmp_path / "path.safetensors")
    assert path.final.shape == (1, 4, 8, 8)
    assert json.loads(path.metadata["prompts"]) == [RED]
    assert json.loads(path.metadata["negative_prompts"]) == ["blue"]
    phases = []
    again = call(
        pipe, RED, negative_prompt="blue", trajectory=path, callback=lambda *s: phases.append(s[0])
    )
    assert np.array_equal(again.frames, first.frames) and "base" not in phases


def test_the_base_cache_tells_prompts_apart(pipe, folder, tmp_path):
    def cached(prompt, **settings):
        phases = []
        out = call(
            pipe, prompt, base_cache=tmp_path, callback=lambda *s: phases.append(s[0]), **settings
        )
        return out.frames, "base" not in phases

    first, hit = cached(WALK)
    assert not hit
    again, hit = cached(WALK)
    assert hit and np.array_equal(again, first)
    for prompt, settings in ((RED, {}), (WALK, {"negative_prompt": "blue"})):
        assert cached(prompt, **settings)[1] is False
        assert cached(prompt, **settings)[1] is True
    labelled = pipe("walk", num_inference_steps=STEPS, base_cache=tmp_path)
    assert labelled.timings["base"] == 0.0 and len(list(tmp_path.iterdir())) == 3


def test_a_picture_goes_through_the_encoder(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image, config = Image.fromarray(pixels), pipe.config
    loaded = []
    out = call(pipe, image=image, callback=lambda *_: loaded.append(set(networks_of(pipe))))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    autoencoder = part_modules(latent_config())["autoencoder"].requires_grad_(False)
    mean, std = (torch.tensor(v).view(4, 1, 1) for v in (config.latent_mean, config.latent_std))
    z = autoencoder.encode(x)
    assert out.trajectory.base_path == "clean"
    torch.testing.assert_close(out.trajectory.final, (z - mean) / std, atol=1e-5, rtol=1e-5)
    frame = (autoencoder.decode(z)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(out.frames[0, 2], frame, atol=1e-4)
    assert not any("base" in names for names in loaded) and not networks_of(pipe)
    path = pipe.image_path(image, num_inference_steps=STEPS)
    assert torch.equal(path.states, out.trajectory.states) and not networks_of(pipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(folder, pipe, dtype):
    half = VideoFusionPipeline.from_pretrained(folder, dtype=dtype, device="cpu")
    a, b = (to_uint8(call(p, RED).frames).astype(int) for p in (half, pipe))
    assert np.abs(a - b).mean() < 4


# -- other combinations ----------------------------------------------------------------------------


def test_a_plain_video_model_may_have_both(tmp_path):
    config = latent_video_config()
    pipe = VideoFusionPipeline.from_pretrained(save_latent_model(tmp_path / "m", config), **ON_CPU)
    phases = []
    out = call(pipe, RED, callback=lambda *step: phases.append(step[0]))
    assert out.frames.shape == (1, 4, SIZE, SIZE, 3)
    assert list(dict.fromkeys(phases)) == ["text", "video", "decode"]
    assert not np.array_equal(out.frames, call(pipe).frames)
    assert np.array_equal(pipe("walk", num_inference_steps=STEPS).frames, call(pipe).frames)


def test_an_autoencoder_alone_and_a_text_encoder_alone(tmp_path, tiny_checkpoint):
    config = latent_config()
    classes = {"context_dim": None, "num_classes": 3}
    unets = {name: replace(getattr(config, name), **classes) for name in config.networks}
    labelled = replace(config, text_encoder=None, prompts=None, **unets)
    pipe = VideoFusionPipeline.from_pretrained(save_latent_model(tmp_path / "a", labelled))
    assert pipe("walk", num_inference_steps=1).frames.shape == (1, 4, SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="so it takes no prompt"):
        pipe(prompt=WALK)
    tiny = read_config(tiny_checkpoint)
    texts = {"num_classes": None, "context_dim": 16}
    unets = {name: replace(getattr(tiny, name), **texts) for name in tiny.networks}
    pixels = replace(tiny, text_encoder=config.text_encoder, prompts=PROMPTS, sha256={}, **unets)
    pipe = VideoFusionPipeline.from_pretrained(save_latent_model(tmp_path / "b", pixels))
    assert call(pipe, RED).frames.shape == (1, 4, 16, 16, 3)
    assert pipe.phases(SamplingRequest(prompt=RED)) == ("text", "base", "residual")
