"""The published text-to-video pipeline, value by value: diffusers' and ModelScope's are the oracle.

Each part gets the oracle's input, and then the whole pipeline its noise. Weights are random
(tests/tools/published_folders.py), in the real architecture at a small width.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ON_CPU
from published_folders import save_diffusers, save_modelscope, small_networks
from seeded import normal
from test_scheduler import modelscope_walk
from torch import Tensor

import vfengine as vf
from vfengine.media.pictures import to_uint8
from vfengine.models import load_text_encoder, load_unet

PROMPT, NEGATIVE = "A panda eats bamboo, 4k", "blurry"
FRAMES = 3
SIZES = {"square": (64, 64), "odd": (40, 72)}  # height and width in pixels
PIXELS = 8  # of a latent, along each side
TOKENS = {"max_length": 77, "truncation": True, "return_tensors": "pt"}


class Model(NamedTuple):
    """One model in both forms, and diffusers' pipeline of it."""

    diffusers: Path
    modelscope: Path
    seed: int

    def peer(self, dtype: torch.dtype = torch.float32):
        from diffusers import TextToVideoSDPipeline
        from diffusers.utils import logging

        logging.set_verbosity_error()  # it says at every call that it is deprecated
        peer = TextToVideoSDPipeline.from_pretrained(self.diffusers).to(dtype)
        peer.set_progress_bar_config(disable=True)
        return peer

    def noise(self, size: str = "square") -> Tensor:
        """[1, N, C, h, w]"""
        height, width = SIZES[size]
        return normal(1, FRAMES, 4, height // PIXELS, width // PIXELS, seed=self.seed + 10)

    def pipe(self, form: str = "diffusers", dtype: torch.dtype = torch.float32):
        return vf.TextToVideoPipeline.from_pretrained(
            getattr(self, form), **{**ON_CPU, "dtype": dtype}
        )


@pytest.fixture(scope="module", params=[0, 1], ids=["seed 0", "seed 1"])
def model(request, tmp_path_factory) -> Model:
    folder, networks = tmp_path_factory.mktemp("published"), small_networks(request.param)
    return Model(
        save_diffusers(folder / "diffusers", networks),
        save_modelscope(folder / "modelscope", networks),
        request.param,
    )


@pytest.fixture(scope="module")
def peer(model):
    return model.peer()


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).norm() / exact.double().norm())


def latents_of(peer, model: Model, size: str, guidance_scale: float, steps: int) -> Tensor:
    """diffusers' finished latents, [B, N, C, h, w]."""
    noise = model.noise(size).transpose(1, 2).to(peer.unet.dtype)
    height, width = SIZES[size]
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": steps}
    settings |= {"num_frames": FRAMES, "height": height, "width": width}
    out = peer(PROMPT, negative_prompt=NEGATIVE, latents=noise, output_type="latent", **settings)
    return out.frames.transpose(1, 2).float()


def ours_of(pipe, model: Model, size: str, guidance_scale: float, steps: int) -> Tensor:
    return pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        latents=model.noise(size),
        guidance_scale=guidance_scale,
        num_inference_steps=steps,
        output_type="latent",
    ).latents


@torch.no_grad()
def decoded(peer, latents: Tensor) -> Tensor:
    """diffusers' frames [B, N, 3, H, W] in 0..1; one by one: in bf16 a batch changes its result."""
    z = latents.to(peer.vae.dtype) / peer.vae.config.scaling_factor
    frames = [peer.vae.decode(frame).sample.float() for frame in z[0].split(1)]
    return (torch.cat(frames)[None] / 2 + 0.5).clamp(0, 1)


# -- part by part ----------------------------------------------------------------------------------


def test_ids_and_embeddings(model, peer):
    texts = [PROMPT, NEGATIVE, "", "word " * 100]
    ids = peer.tokenizer(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        expected = peer.text_encoder(ids)[0]
    for folder in (model.diffusers, model.modelscope):
        text = load_text_encoder(folder, torch.float32)
        assert torch.equal(text.tokenize(texts), ids)
        assert (text(ids) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_one_call_of_the_unet(model, peer, size):
    z, context = model.noise(size), normal(1, 77, peer.unet.config.cross_attention_dim)
    for folder in (model.diffusers, model.modelscope):
        unet = load_unet(folder, torch.float32)
        for t in (1, 981):
            with torch.no_grad():
                expected = peer.unet(z.transpose(1, 2), t, context).sample.transpose(1, 2)
            assert error(unet(z, torch.tensor([t]), context), expected) <= 1e-5


@pytest.mark.parametrize("form", ["diffusers", "modelscope"])
@pytest.mark.parametrize("steps", [5, 50])
def test_one_step(model, peer, form, steps):
    peer.scheduler.set_timesteps(steps)
    table = model.pipe(form).table("ddim", steps)
    assert table.timesteps.tolist() == peer.scheduler.timesteps.tolist()
    assert (table.timesteps[0], table.timesteps[-1]) == (1001 - 1000 // steps, 1)
    z, eps = model.noise(), normal(*model.noise().shape, seed=2)
    for t, (c1, c2, sigma) in zip(table.timesteps.tolist(), table.coeffs.tolist(), strict=True):
        expected = peer.scheduler.step(eps, t, z).prev_sample
        off = (c1 * z + c2 * eps - expected).abs().max()
        assert sigma == 0 and off <= 1e-6 * expected.abs().max()


def test_decoded_pixels(model, peer):
    latents = model.noise("odd") * peer.vae.config.scaling_factor
    expected = decoded(peer, latents)
    assert 0.2 < ((expected > 0) & (expected < 1)).float().mean()  # not all are clamped
    for form in ("diffusers", "modelscope"):
        frames = model.pipe(form).decode(latents, output_type="pt")
        assert (frames - expected).abs().max() <= 1e-5


# -- the whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance_scale", [1.0, 9.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("steps", [5, 50])
def test_latents(model, peer, size, guidance_scale, steps):
    settings = (model, size, guidance_scale, steps)
    assert error(ours_of(model.pipe(), *settings), latents_of(peer, *settings)) <= 2e-5


@pytest.mark.parametrize(
    "entries",
    [
        {"prediction_type": "v_prediction"},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "set_alpha_to_one": True, "steps_offset": 0},
    ],
    ids=lambda entries: "-".join(entries),
)
def test_other_schedules(model, tmp_path, entries):
    """What retrained checkpoints may say of their schedule."""
    folder = shutil.copytree(model.diffusers, tmp_path / "diffusers")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    changed = model._replace(diffusers=folder)
    settings = (changed, "square", 9.0, 5)
    assert error(ours_of(changed.pipe(), *settings), latents_of(changed.peer(), *settings)) <= 2e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("guidance_scale", [1.0, 9.0], ids=["unguided", "guided"])
@pytest.mark.parametrize("steps", [5, 50])
def test_frames(model, peer, size, guidance_scale, steps):
    """Both from the same noise; as uint8 they may differ by 1."""
    height, width = SIZES[size]
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": steps}
    settings["negative_prompt"] = NEGATIVE
    noise = model.noise(size)
    sizes = {"num_frames": FRAMES, "height": height, "width": width}
    theirs = peer(PROMPT, latents=noise.transpose(1, 2), **sizes, **settings).frames
    ours = model.pipe()(PROMPT, latents=noise, **settings).frames
    assert ours.shape == theirs.shape == (1, FRAMES, height, width, 3)
    assert np.abs(to_uint8(ours).astype(int) - to_uint8(theirs)).max() <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 9.0], ids=["unguided", "guided"])
def test_both_forms_are_one_model(model, guidance_scale):
    """The same bits from the diffusers folder and from ModelScope's."""
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": 3}
    settings |= {"latents": model.noise("odd"), "negative_prompt": NEGATIVE}
    outputs = [model.pipe(form)(PROMPT, **settings) for form in ("diffusers", "modelscope")]
    assert torch.equal(outputs[0].latents, outputs[1].latents)
    assert np.array_equal(outputs[0].frames, outputs[1].frames)


@pytest.mark.parametrize("steps", [5, 50])
def test_modelscopes_own_formulas(model, peer, steps):
    """Its DDIM loop in float64, with a call for each branch: u + 9 (y - u)."""
    with torch.no_grad():
        rows, unguided = (
            peer.text_encoder(peer.tokenizer([text], padding="max_length", **TOKENS).input_ids)[0]
            for text in (PROMPT, "")
        )

        def estimate(z: Tensor, t: int) -> Tensor:
            clip = z.float().transpose(1, 2)
            y, u = (peer.unet(clip, t, context).sample for context in (rows, unguided))
            return (u + 9 * (y - u)).transpose(1, 2).double()

        timesteps, states = modelscope_walk(estimate, model.noise().double(), steps)
    assert (timesteps[0], timesteps[-1]) == (1001 - 1000 // steps, 1)
    pipe = model.pipe("modelscope")
    out = pipe(PROMPT, latents=model.noise(), num_inference_steps=steps, output_type="latent")
    assert error(out.latents, states[-1]) <= 2e-5


# -- bf16 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(model):
    return model.peer(torch.bfloat16)


def test_parts_in_bf16(model, peer, half):
    """Errors of ours against those of diffusers in bf16, both against fp32: at most 1.5 times."""
    text, unet = (load(model.diffusers, torch.bfloat16) for load in (load_text_encoder, load_unet))
    ids, z, t = text.tokenize([PROMPT]), model.noise(), torch.tensor([981])
    with torch.no_grad():
        rows, rows_half = (p.text_encoder(ids)[0] for p in (peer, half))
        clip = z.transpose(1, 2)
        eps = peer.unet(clip, 981, rows).sample.transpose(1, 2)
        eps_half = half.unet(clip.bfloat16(), 981, rows.bfloat16()).sample.transpose(1, 2)
    assert error(text(ids), rows) <= 1.5 * error(rows_half, rows)
    assert error(unet(z, t, rows), eps) <= 1.5 * error(eps_half, eps)
    frames = decoded(peer, z)
    pipe = model.pipe(dtype=torch.bfloat16)
    ours = pipe.decode(z, output_type="pt")
    assert error(ours, frames) <= 1.5 * error(decoded(half, z), frames)


@pytest.mark.parametrize("guidance_scale", [1.0, 9.0], ids=["unguided", "guided"])
@pytest.mark.parametrize(("size", "steps"), [("square", 5), ("odd", 5), ("square", 50)])
def test_latents_in_bf16(model, peer, half, size, guidance_scale, steps):
    settings = (model, size, guidance_scale, steps)
    exact = latents_of(peer, *settings)
    ours = ours_of(model.pipe(dtype=torch.bfloat16), *settings)
    assert error(ours, exact) <= 1.5 * error(latents_of(half, *settings), exact)
