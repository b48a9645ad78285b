"""Training a residual network for a published text-to-image model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from published_images import SIDE, WIDTH, image_networks, save_images
from seeded import filled, normal
from test_latent_training import SHAPE
from test_training import FAST, state_of

from vfengine.formats.checkpoint import load_network
from vfengine.training.batch import Latents
from vfengine.training.options import TrainingOptions
from vfengine.training.parts import Coder
from vfengine.training.published import PublishedParts
from vfengine.training.recipes import latent_model
from vfengine.training.trainer import Trainer

FRAMES, PROMPTS = 4, {"walk": "a walk"}
OPTIONS = {"train": "residual", "clean_share": 0.5, "base_jitter": 0.1, "batch_size": 3}
PUBLISHED = replace(SHAPE, size=2 * SIDE, base_channels=None)


@pytest.fixture(scope="module")
def networks():
    return image_networks()


@pytest.fixture(scope="module")
def images(networks, tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("images"), networks)


@pytest.fixture(scope="module")
def latents():
    clips = normal(6, FRAMES, 4, SIDE, SIDE).half()
    return Latents(clips, normal(6, 2, 7, WIDTH, seed=2).half(), normal(7, WIDTH, seed=3).half())


@pytest.fixture
def new_trainer(images, latents):
    def make(**options) -> Trainer:
        options = TrainingOptions(**{**FAST, **OPTIONS, "class_dropout": 0.3, **options})
        parts = PublishedParts.read(images, options.train != "residual")
        config = latent_model(PUBLISHED, parts, PROMPTS, 0.6)
        return Trainer(config, options, latents, parts=parts)

    return make


@pytest.mark.parametrize("train", ["residual", "both"])
def test_losses_are_those_of_the_paper_with_the_published_noise_estimate(
    new_trainer, networks, train
):
    """Restated from the equations; b̂ by diffusers' UNet, which predicts v."""
    trainer = new_trainer(train=train, extra_images=0)
    residual = filled(trainer.networks["residual"], gain=0.5)
    batch = trainer.batch_sampler(0)
    x, context, _ = batch.clips(3)
    t, m, lam = batch.timesteps(3), FRAMES // 2, 0.5
    b, r = batch.normal(x[:, m].shape), batch.normal(x.shape)
    exact = (batch.uniform(3) < 0.5).view(3, 1, 1, 1)
    std = batch.uniform(3, 1, 1, 1) * 0.1
    jitter = batch.normal(x[:, m].shape) * std * exact
    a = networks.scheduler.alphas_cumprod[t].view(3, 1, 1, 1)
    eps = lam**0.5 * b[:, None] + (1 - lam) ** 0.5 * r
    eps[:, m] = b
    z = a[:, None].sqrt() * x + (1 - a[:, None]).sqrt() * eps
    with torch.no_grad():
        v = networks.unet(z[:, m], t, context.float()).sample
        b_hat = a.sqrt() * v + (1 - a).sqrt() * z[:, m]
        used = torch.where(exact, b, b_hat)
        shares = torch.full((FRAMES, 1, 1, 1), lam**0.5)
        shares[m] = 1
        seen = z - shares * (1 - a[:, None]).sqrt() * used[:, None]
        seen[:, m] += a.sqrt() * jitter
        r_hat = residual(seen, t, context=context.float())
    error = eps - lam**0.5 * used[:, None] - (1 - lam) ** 0.5 * r_hat
    others = [i for i in range(FRAMES) if i != m]
    noise = ((1 - a) / a).flatten()

    def weighted(square, share, std):
        return square * noise * ((1 / (share * noise)).clamp(max=10) + std**-2)

    expected = {"residual": weighted(error[:, others].square().mean((1, 2, 3, 4)), 1 - lam, 0.6)}
    if train == "both":
        expected["base"] = weighted((b - b_hat).square().mean((1, 2, 3)), 1.0, 1.0)
    with torch.no_grad():
        found = trainer.losses(0)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name][0], loss, rtol=2e-4, atol=1e-5)
        assert torch.equal(found[name][1], t)


def test_frames_and_texts_are_coded_as_the_published_parts_do(images, networks):
    coder = Coder(PublishedParts.read(images, trained=False))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    z = coder.encode(torch.from_numpy(pixels))
    assert z.shape == (2, 3, 4, SIDE, SIDE) and z.dtype == torch.float16
    x = torch.from_numpy(pixels).movedim(-1, -3).flatten(0, 1) / 127.5 - 1
    with torch.no_grad():
        mean = networks.vae.encode(x).latent_dist.mean * networks.vae.config.scaling_factor
    torch.testing.assert_close(z.flatten(0, 1).float(), mean, rtol=0.05, atol=0.02)
    assert coder.states(["a cat", ""]).shape == (2, 77, WIDTH)


@pytest.mark.parametrize("train", ["residual", "both"])
def test_fixed_base_stays_and_a_trained_one_is_the_models_own(new_trainer, train, tmp_path):
    trainer = new_trainer(train=train, ema=0.5)
    before = {name: p.clone() for name, p in trainer.networks["base"].named_parameters()}
    trainer.step()
    moved = [not torch.equal(p, before[n]) for n, p in trainer.networks["base"].named_parameters()]
    assert all(moved) if train == "both" else not any(moved)
    trainer.save(tmp_path / "state")
    again = new_trainer(train=train, ema=0.5)
    again.restore(tmp_path / "state")
    config = trainer.export(tmp_path / "model")
    assert again.export(tmp_path / "again").sha256 == config.sha256
    files = {path.name for path in (tmp_path / "model").iterdir()}
    own = "base.safetensors" if train == "both" else "unet"
    assert files == {
        *("config.json", "residual.safetensors", own, "vae", "text_encoder", "tokenizer")
    }
    if train == "both":
        base = load_network(tmp_path / "model", config, "base")
        assert base.prediction_type == "v_prediction"
    else:
        assert not any(name.startswith("fixed") for name in state_of(trainer, tmp_path / "state"))
        weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
        assert weights.stat().st_nlink > 1  # not copied


def test_base_network_is_read_where_a_step_asks_it_alone(new_trainer):
    assert new_trainer(clean_share=1.0).networks.keys() == {"residual"}
    with pytest.raises(ValueError, match="--size must be a multiple of 2, got 15"):
        latent_model(replace(PUBLISHED, size=15), new_trainer()._parts, PROMPTS, 0.6)


def test_state_is_that_of_one_base_network(new_trainer, images, tmp_path):
    trainer = new_trainer()
    trainer.save(tmp_path / "state")
    other = save_images(tmp_path / "other", image_networks(seed=3))
    parts = PublishedParts.read(other, False)
    stranger = Trainer(trainer.config, trainer.options, trainer.data, parts=parts)
    with pytest.raises(ValueError, match="the training state of another model"):
        stranger.restore(tmp_path / "state")
