"""A decomposed model on a published text-to-image model: value by value as its parts compute."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from latent_models import TEXT, save_latent_model
from published_images import (
    FRAMES,
    SIDE,
    image_networks,
    published_model,
    save_decomposed,
    save_images,
)

import vfengine as vf
from vfengine.files import write_tensors
from vfengine.formats.checkpoint import load_network, read_config
from vfengine.pipelines.forecast import forecast
from vfengine.pipelines.request import SamplingRequest

PROMPT, AVOID, STEPS, SCALE = "a red cat jumps", "blurry", 5, 3.0
CALL = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "negative_prompt": AVOID}
COLOURS = ("red sweater", "blue sweater")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def networks():
    return image_networks()


@pytest.fixture(scope="module")
def images(networks, tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), networks)


@pytest.fixture(scope="module")
def checkpoint(images, tmp_path_factory):
    return save_decomposed(tmp_path_factory.mktemp("models") / "model", images)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return vf.VideoFusionPipeline.from_pretrained(checkpoint, **ON_CPU)


@pytest.fixture(scope="module")
def rows(networks):
    """Token rows of the prompt and of the negative prompt, by transformers."""
    tokenizer = published_model.clip_tokenizer()
    ids = tokenizer([PROMPT, AVOID], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        return networks.text(ids.input_ids).last_hidden_state


@pytest.fixture(scope="module")
def walked(networks, rows):
    """Latents of base frames by diffusers' UNet and scheduler, as StableDiffusionPipeline's loop.

    d_t of each step beside them, [S, 1, C, h, w].
    """
    scheduler = networks.scheduler
    scheduler.set_timesteps(STEPS)
    z = vf.decomposed_noise((1, FRAMES, 4, SIDE, SIDE), base_seed=0, residual_seed=1).base
    clean = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            v, v_avoid = (networks.unet(z, t, row[None]).sample for row in rows)
            a = scheduler.alphas_cumprod[t]
            out = v_avoid + SCALE * (v - v_avoid)
            clean.append(a.sqrt() * (a.sqrt() * z - (1 - a).sqrt() * out))
            z = scheduler.step(out, t, z).prev_sample
    return z, torch.stack(clean)


def test_prompts_are_read_as_the_published_text_encoder_reads_them(pipe, rows):
    found = pipe._session.embedded([PROMPT, AVOID], pipe._run(None))
    torch.testing.assert_close(found, rows, **CLOSE)


def test_base_frames_are_those_of_the_published_loop(pipe, networks, walked):
    path = pipe.walk_base(prompt=PROMPT, **CALL)
    z, clean = walked
    assert path.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert (path.final - z).norm() < 1e-5 * z.norm()
    assert (path.states[:-1] - clean).norm() < 1e-5 * clean.norm()
    preview = pipe.preview(prompt=PROMPT, **CALL, output_type="pt")
    with torch.no_grad():
        pixels = networks.vae.decode(z / networks.vae.config.scaling_factor).sample
    expected = (pixels / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(preview.frames[:, 0], expected, rtol=0, atol=2e-5)


def test_clips_are_those_of_algorithm_2(pipe, checkpoint, networks, rows, walked):
    """z over all frames at once, in float64; both networks under guidance."""
    config = read_config(checkpoint)
    residual = load_network(checkpoint, config, "residual")
    scheduler, m = networks.scheduler, FRAMES // 2
    noise = vf.decomposed_noise((1, FRAMES, 4, SIDE, SIDE), base_seed=0, residual_seed=1)
    lam = torch.full((FRAMES, 1, 1, 1), config.lam, dtype=torch.float64)
    lam[m] = 1
    z = lam.sqrt() * noise.base.double()[:, None] + (1 - lam).sqrt() * noise.residual.double()
    z[:, m] = noise.base.double()
    steps = scheduler.timesteps.tolist()
    with torch.no_grad():
        for t in steps:
            a = scheduler.alphas_cumprod[t].double()
            p = scheduler.alphas_cumprod[max(t - 1000 // STEPS, 0)].double()
            given = z[:, m].float()
            v, v_avoid = (networks.unet(given, t, row[None]).sample for row in rows)
            v = (v_avoid + SCALE * (v - v_avoid)).double()
            b = a.sqrt() * v + (1 - a).sqrt() * z[:, m]
            seen = (z - lam.sqrt() * (1 - a).sqrt() * b[:, None]).float()
            at = torch.tensor([t])
            r, r_avoid = (residual(seen, at, context=row[None]) for row in rows)
            r = (r_avoid + SCALE * (r - r_avoid)).double()
            eps = lam.sqrt() * b[:, None] + (1 - lam).sqrt() * r
            eps[:, m] = b
            c1 = (p / a).sqrt()
            z = c1 * z + ((1 - p).sqrt() - c1 * (1 - a).sqrt()) * eps
        latents = z[0].float() / networks.vae.config.scaling_factor
        expected = (networks.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    done = []
    out = pipe(
        prompt=PROMPT,
        **CALL,
        base_path="stepwise",
        output_type="pt",
        callback=lambda phase, step, total: done.append((phase, step, total)),
    )
    torch.testing.assert_close(out.frames[0], expected, rtol=0, atol=1e-4)
    assert done[-1] == ("decode", FRAMES, FRAMES)


def test_a_picture_is_encoded_and_animated(pipe, networks):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    path = pipe.image_path(pixels, num_inference_steps=STEPS)
    with torch.no_grad():
        z = networks.vae.encode(x).latent_dist.mean * networks.vae.config.scaling_factor
        decoded = networks.vae.decode(z / networks.vae.config.scaling_factor).sample
    torch.testing.assert_close(path.final, z, rtol=1e-4, atol=1e-5)
    assert path.timesteps.tolist() == [801, 601, 401, 201, 1]
    out = pipe(prompt=PROMPT, **CALL, image=pixels, output_type="pt")
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(out.frames[:, FRAMES // 2], expected, rtol=0, atol=5e-5)


def test_motions_windows_and_files_of_base_paths(pipe, tmp_path):
    motions = pipe(prompt=PROMPT, **CALL, num_residuals=2)
    assert motions.frames.shape == (2, FRAMES, 16, 16, 3)
    assert np.array_equal(motions.frames[0, FRAMES // 2], motions.frames[1, FRAMES // 2])
    assert not np.array_equal(motions.frames[0], motions.frames[1])
    path = tmp_path / "path.safetensors"
    motions.trajectory.save(path)
    kept = vf.BaseTrajectory.load(path)
    again = pipe(prompt=PROMPT, **CALL, trajectory=kept)
    np.testing.assert_allclose(again.frames[0], motions.frames[0], atol=2e-4)
    long = pipe(prompt=PROMPT, **CALL, num_frames=7, trajectory=kept)  # windows of the trained 4
    assert long.frames.shape == (1, 7, 16, 16, 3)
    assert np.array_equal(long.frames[0, 3], again.frames[0, FRAMES // 2])
    cached = {**CALL, "base_cache": tmp_path / "cache", "prompt": PROMPT}
    found = [pipe.walk_base(**cached).states for _ in range(2)]
    assert torch.equal(*found) and len(list((tmp_path / "cache").iterdir())) == 1


def test_memory_holds_one_network_at_a_time(checkpoint):
    pipe = vf.VideoFusionPipeline.from_pretrained(checkpoint, **ON_CPU)
    held = set()
    pipe(
        prompt=PROMPT,
        num_inference_steps=1,
        callback=lambda *done: held.add(tuple(pipe._session.networks)),
    )
    assert held - {()} == {("text",), ("base",), ("residual",), ("decode",)}


def test_model_is_its_own_folder(checkpoint, images, pipe, tmp_path):
    """It can be moved, without the folder that it was made of; a label is short for a prompt."""
    assert {path.name for path in checkpoint.iterdir()} == {
        *("config.json", "residual.safetensors"),
        *("unet", "vae", "text_encoder", "tokenizer"),
    }
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    again = vf.load_pipeline(moved, **ON_CPU)
    assert again.labels == ("cartwheel", "jump", "walk")
    named = again.walk_base("jump", num_inference_steps=2)
    assert torch.equal(named.states, pipe.walk_base(prompt="a jump", num_inference_steps=2).states)
    assert again.fingerprint == pipe.fingerprint


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer"])
def test_parts_that_are_missing_or_exchanged_are_refused(checkpoint, tmp_path, part):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    weights = max((folder / part).iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[-40] ^= 1
    weights.write_bytes(data)
    exchanged = "unet is not|vae is not|text_encoder is not|tokenizer"
    call = {"prompt": PROMPT, "num_inference_steps": 1}
    pipe = vf.VideoFusionPipeline.from_pretrained(folder, **ON_CPU)
    with pytest.raises(ValueError, match=exchanged):
        pipe(**call)
    weights.write_bytes(data[:-400])
    with pytest.raises(ValueError, match=part):
        pipe(**call)
    shutil.rmtree(folder / part)
    pipe = vf.VideoFusionPipeline.from_pretrained(folder, **ON_CPU)
    with pytest.raises(FileNotFoundError, match=part):
        pipe(**call)


# -- in place of a model's own base network --------------------------------------------------------


def test_another_published_network_takes_the_place_of_the_base(checkpoint, images, tmp_path):
    other = image_networks(seed=7)
    source = save_images(tmp_path / "other", image_networks()._replace(unet=other.unet))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its parts and its scheduler are the model's own
        pipe = vf.VideoFusionPipeline.from_pretrained(checkpoint, **ON_CPU, base_unet=source)
    own = save_decomposed(tmp_path / "own", source)
    expected = vf.VideoFusionPipeline.from_pretrained(own, **ON_CPU)
    call = {**CALL, "prompt": PROMPT}
    assert np.array_equal(pipe(**call).frames, expected(**call).frames)
    assert pipe.fingerprint != expected.fingerprint  # with what it predicts, or without
    planned = forecast(pipe, SamplingRequest(**call, base_path="stepwise"))
    assert planned.calls["base"] == 2 * STEPS and planned.memory.weights["base"] > 0
    planned = forecast(expected, SamplingRequest(**call))
    assert planned.calls["base"] == planned.calls["residual"] == 2 * STEPS
    assert planned.memory.weights["base"] > planned.memory.weights["decode"] > 0
    save_images(source, other)
    with pytest.warns(UserWarning, match="the text encoder beside it is another one"):
        vf.VideoFusionPipeline.from_pretrained(checkpoint, **ON_CPU, base_unet=source)


def test_a_model_of_our_own_takes_one_that_attends_to_its_prompts(tmp_path):
    networks = image_networks(cross_attention_dim=TEXT.width)
    save_latent_model(tmp_path / "model")
    source = tmp_path / "unet"
    networks.unet.save_pretrained(source)
    with pytest.warns(UserWarning, match="no scheduler_config.json"):
        pipe = vf.VideoFusionPipeline.from_pretrained(
            tmp_path / "model", **ON_CPU, base_unet=source, base_prediction_type="v_prediction"
        )
    red, blue = (pipe.walk_base(prompt=f"a {colour}", num_inference_steps=2) for colour in COLOURS)
    assert not torch.equal(red.states, blue.states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 16}, "attends to a context of width 16, .* makes rows of 32"),
        ({"in_channels": 8, "out_channels": 8}, "8 input and 8 output channels, the clips have 4"),
        ({"scheduler": {"beta_schedule": "linear"}}, "another noise schedule"),
        ({"scheduler": {"rescale_betas_zero_snr": True}}, "rescale_betas_zero_snr"),
    ],
)
def test_networks_of_other_latents_or_texts_are_refused(checkpoint, tmp_path, changes, message):
    source = tmp_path / "other"
    made = image_networks(**changes)
    made.unet.save_pretrained(source / "unet")
    made.scheduler.save_pretrained(source / "scheduler")
    with pytest.raises(ValueError, match=f"base_unet: .*{message}"):
        vf.VideoFusionPipeline.from_pretrained(checkpoint, **ON_CPU, base_unet=source)


def test_an_autoencoder_of_another_architecture_is_refused(checkpoint, images, tmp_path):
    source = tmp_path / "other"
    shutil.copytree(images, source)
    file = source / "vae" / "config.json"
    file.write_text(file.read_text().replace('"norm_num_groups": 4', '"norm_num_groups": 2'))
    with pytest.raises(ValueError, match="the autoencoder beside it is of another architecture"):
        vf.VideoFusionPipeline.from_pretrained(checkpoint, **ON_CPU, base_unet=source)


def test_lora_changes_its_networks_by_their_published_names(checkpoint, pipe, networks, tmp_path):
    layer = networks.text.get_submodule("encoder.layers.0.self_attn.q_proj")
    walks, pipes = [pipe.walk_base(prompt=PROMPT, num_inference_steps=2).final], {}
    for name, weight in (
        ("unet.conv_in", networks.unet.conv_in.weight),
        ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", layer.weight),
    ):
        up, down = torch.ones(len(weight), 2, 1, 1), torch.full((2, *weight.shape[1:]), 0.1)
        up = up[..., 0, 0] if weight.dim() == 2 else up
        file = tmp_path / f"{name}.safetensors"
        write_tensors(file, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
        pipes[name] = vf.load_pipeline(checkpoint, lora=file, **ON_CPU)
        walks.append(pipes[name].walk_base(prompt=PROMPT, num_inference_steps=2).final)
    assert len({walk.numpy().tobytes() for walk in walks}) == 3
    unet, text = pipes.values()
    assert unet.fingerprint != pipe.fingerprint == text.fingerprint
    assert text.config.sha256["text_encoder"] != pipe.config.sha256["text_encoder"]
