"""Training on latents with captions: both networks, or one alone; what weighs more."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_latents import NUM_FRAMES, SIZE, Squares
from test_training import FAST, assert_equal_states, state_of
from tiny_parts import save_tiny_parts

from vfengine.formats.checkpoint import load_network, read_config
from vfengine.formats.parts import load_checkpoint_autoencoder, load_checkpoint_text_encoder
from vfengine.training.batch import BatchSampler, Latents
from vfengine.training.latents import make_latents, residual_std
from vfengine.training.options import TrainingOptions
from vfengine.training.parts import Coder, Parts
from vfengine.training.recipes import Shape, latent_model
from vfengine.training.samples import Showcase
from vfengine.training.trainer import Trainer

PROMPTS = {"kick": "a person kicking", "walk": "a person walking"}
SHAPE = Shape(
    num_frames=NUM_FRAMES,
    size=SIZE,
    fps=8.0,
    base_channels=(32, 32),
    residual_channels=(32, 32),
    layers_per_block=(1, 1),
    patch_size=1,
    lam=0.5,
    base_path="clean",
    clean_share=0.85,
)
ALONE = {"residual": {"train": "residual", "clean_share": 1.0}, "base": {"train": "base"}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return Parts.read(*save_tiny_parts(tmp_path_factory.mktemp("parts")))


@pytest.fixture(scope="module")
def latents(parts, tmp_path_factory) -> Latents:
    folder = tmp_path_factory.mktemp("latents")
    return make_latents(Squares(), parts, Coder(parts), folder, 6, 2)


@pytest.fixture
def new_trainer(parts, latents):
    def make(**options) -> Trainer:
        config = latent_model(SHAPE, parts, PROMPTS, residual_std(latents))
        options = TrainingOptions(**{**FAST, **options})
        return Trainer(config, options, latents, parts=parts)

    return make


# -- the model -------------------------------------------------------------------------------------


def test_networks_are_of_the_latents(parts):
    config = latent_model(SHAPE, parts, PROMPTS, 0.6)
    assert (config.channels, config.height, config.width) == (4, 4, 4)
    assert config.picture_size == (SIZE, SIZE)
    assert (config.base.in_channels, config.base.out_channels) == (4, 5)
    assert (config.residual.in_channels, config.residual.out_channels) == (8, 7)
    for unet in (config.base, config.residual):
        assert unet.num_classes is None and unet.context_dim == 16
    assert all(config.base.spatial_attention) and not config.base.is_video
    assert config.residual.temporal_attention == (False, True)
    assert config.residual.temporal_conv == (True, True)
    assert (config.base_std, config.residual_std) == (1.0, 0.6)
    assert dict(zip(config.labels, config.prompts, strict=True)) == PROMPTS
    with pytest.raises(ValueError, match="--size must be a multiple of 4, got 18"):
        latent_model(replace(SHAPE, size=18), parts, PROMPTS, 0.6)


def test_default_networks_have_the_published_sizes(parts):
    """11.2 M and 3.0 M: with the parts 40 MB of float16 at most."""
    from vfengine.cli.train_settings import read_settings
    from vfengine.formats.checkpoint import build_network

    settings = read_settings(["--output", "x", "--autoencoder", "a", "--text-encoder", "t"])
    names = ("base_channels", "residual_channels", "layers_per_block", "patch_size")
    shape = replace(SHAPE, size=128, **{name: getattr(settings, name) for name in names})
    real = replace(
        parts,
        autoencoder=replace(parts.autoencoder, latent_channels=8, block_out_channels=(8, 16, 16)),
        latent_mean=(0.0,) * 8,
        latent_std=(1.0,) * 8,
        text_encoder=replace(parts.text_encoder, width=256),
    )
    config = latent_model(shape, real, PROMPTS, 0.7)
    assert (config.channels, config.height, config.width) == (8, 16, 16)
    base, residual = (
        sum(p.numel() for p in build_network(config, name).parameters()) / 1e6
        for name in config.networks
    )
    assert 11 < base < 11.5 and 2.4 < residual < 3.1


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["both", "base", "residual"])
def test_loss_falls_and_every_trained_weight_moves(new_trainer, train):
    options = {"steps": 40, "batch_size": 4, "extra_images": 4, "learning_rate": 3e-3}
    trainer = new_trainer(**{**options, **ALONE.get(train, {})})
    before = {n: [p.clone() for p in net.parameters()] for n, net in trainer.networks.items()}
    reports = [trainer.step() for _ in range(40)]
    trained = ("base", "residual") if train == "both" else (train,)
    assert tuple(reports[0].losses) == trained
    for name in trained:
        losses = [report.losses[name] for report in reports]
        assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10]), name
    for name, old in before.items():
        same = [
            torch.equal(a, b) for a, b in zip(old, trainer.networks[name].parameters(), strict=True)
        ]
        assert not any(same) if name in trained else all(same), name


@pytest.mark.parametrize("train", ["both", "base", "residual"])
def test_resumed_run_equals_the_uninterrupted_one(new_trainer, tmp_path, train):
    options = {"precision": "bf16", "cell_weight": 3.0, "timestep_shift": 2.0}
    options |= ALONE.get(train, {})
    whole, first = new_trainer(**options), new_trainer(**options)
    assert repr(whole.step()) == repr(first.step())
    first.save(tmp_path / "state")
    resumed = new_trainer(**options)
    resumed.restore(tmp_path / "state")
    assert repr(resumed.step()) == repr(whole.step())
    states = [state_of(t, tmp_path / name) for t, name in ((resumed, "a"), (whole, "b"))]
    if train == "both":
        assert_equal_states(*states)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_state_names_the_networks_that_it_trains(new_trainer, tmp_path):
    new_trainer(**ALONE["base"]).save(tmp_path / "state")
    for options in ({}, ALONE["residual"]):
        with pytest.raises(ValueError, match="state of another model"):
            new_trainer(**options).restore(tmp_path / "state")


def test_base_network_alone_sees_base_frames_of_the_whole_batch(new_trainer):
    trainer = new_trainer(batch_size=3, extra_images=4, **ALONE["base"])
    trainer.networks["residual"].register_forward_hook(lambda *_: pytest.fail("was called"))
    shapes = []
    trainer.networks["base"].register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    loss, t = trainer.losses(0)["base"]
    assert shapes == [(7, 4, 4, 4)] and loss.shape == t.shape == (7,)


def test_residual_network_alone_sees_the_exact_base(new_trainer):
    trainer = new_trainer(batch_size=3, base_jitter=0.0, **ALONE["residual"])
    trainer.networks["base"].register_forward_hook(lambda *_: pytest.fail("was called"))
    seen = {}
    residual = trainer.networks["residual"]
    residual.register_forward_pre_hook(lambda _, args: seen.update(z=args[0], t=args[1]))
    trainer.losses(0)
    x, _, _ = trainer.batch_sampler(0).clips(3)
    signal = trainer.objective.schedule.alphas_cumprod[seen["t"]].sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["z"][:, 2].double(), signal * x[:, 2], rtol=1e-4, atol=1e-4)


def test_residual_network_alone_needs_the_exact_base(new_trainer):
    with pytest.raises(ValueError, match=r"clean_share must be 1, got 0\.5"):
        new_trainer(train="residual", clean_share=0.5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_captions_give_way_to_the_empty_prompt(new_trainer, latents, share):
    trainer = new_trainer(batch_size=4, class_dropout=share)
    seen = []
    for network in trainer.networks.values():
        network.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["context"]), with_kwargs=True
        )
    trainer.losses(0)
    assert len(seen) == 2  # a call of each network
    for context in seen:
        empty = (context == latents.null).flatten(1).all(1)
        assert bool(empty.all()) if share else not empty.any()


# -- what weighs more ------------------------------------------------------------------------------


def test_cells_of_the_figure_weigh_more(new_trainer):
    trainer = new_trainer(cell_weight=3.0)
    figure = torch.zeros(2, 1, 4, 4)
    figure[0, 0, 0, 0], figure[0, 0, 0, 1] = 1.0, 0.5
    weights = trainer.objective._cells(figure)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(2))
    assert float(weights[0, 0, 0, 0] / weights[0, 0, 3, 3]) == pytest.approx(3)
    assert float(weights[0, 0, 0, 1] / weights[0, 0, 3, 3]) == pytest.approx(2)
    assert torch.equal(weights[1], torch.ones(1, 4, 4))


def test_cells_that_the_base_figure_leaves_weigh_more_too(new_trainer):
    trainer = new_trainer(cell_weight=3.0)
    figure = torch.zeros(1, NUM_FRAMES, 1, 4, 4)
    for i in range(NUM_FRAMES):
        figure[0, i, 0, 0, i] = 1
    weights = trainer.objective._cells(figure, 2)
    for i in range(NUM_FRAMES):
        heavy = weights[0, i, 0, 0] > 2 * weights[0, i, 0, 3, 3]
        assert heavy.nonzero().flatten().tolist() == sorted({2, i})


@pytest.mark.parametrize("name", ["base", "residual"])
def test_weights_of_cells_change_the_losses_alone(new_trainer, monkeypatch, name):
    """Weights of 1 change nothing; those of the residual network are its frames' own."""
    plain, weighted = new_trainer(), new_trainer(cell_weight=3.0)
    ones = new_trainer(cell_weight=3.0)
    monkeypatch.setattr(ones.objective, "_cells", lambda figure, m=None: torch.ones_like(figure))
    losses = [trainer.losses(0)[name] for trainer in (plain, weighted, ones)]
    assert not torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])
    torch.testing.assert_close(losses[0][0], losses[2][0])


def test_weights_of_cells_need_to_know_the_figure(new_trainer):
    with pytest.raises(ValueError, match="known where the figure is"):
        new_trainer(cell_weight=3.0).objective._cells(None)  # what pixels give


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_timesteps_are_shifted_to_more_noise(latents, shift):
    sampler = BatchSampler(
        latents,
        (0, 0),
        dropout=0.0,
        num_timesteps=1000,
        timestep_shift=shift,
        device=torch.device("cpu"),
    )
    t = sampler.timesteps(2000).double() / 1000
    u = (torch.arange(2000) + 0.5) / 2000
    torch.testing.assert_close(t, shift * u.double() / (1 + (shift - 1) * u), rtol=0, atol=2e-3)


# -- what comes of it ------------------------------------------------------------------------------


def test_export_holds_the_parts(new_trainer, parts, tmp_path):
    trainer = new_trainer()
    config = trainer.export(tmp_path / "model")
    assert config == read_config(tmp_path / "model")
    for name in ("base", "residual"):
        load_network(tmp_path / "model", config, name)
    autoencoder = load_checkpoint_autoencoder(tmp_path / "model", config)
    assert autoencoder.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, SIZE, SIZE)
    encoder = load_checkpoint_text_encoder(tmp_path / "model", config)
    assert encoder(encoder.tokenize(["a person"])).shape == (1, 8, 16)


def test_network_that_is_not_trained_stays_as_it_started(new_trainer, tmp_path):
    base = new_trainer(ema=0.5, **ALONE["base"])
    base.step()
    base.export(tmp_path / "base")
    residual = new_trainer(ema=0.5, seed=1, **ALONE["residual"])
    residual.warm_start(tmp_path / "base")
    residual.step()
    residual.save(tmp_path / "state")
    config = residual.export(tmp_path / "both")
    assert config.sha256["base"] == read_config(tmp_path / "base").sha256["base"]
    assert config.sha256["residual"] != read_config(tmp_path / "base").sha256["residual"]
    again = new_trainer(ema=0.5, seed=1, **ALONE["residual"])  # without the folder of the other
    again.restore(tmp_path / "state")
    assert again.export(tmp_path / "again").sha256 == config.sha256
    merged = new_trainer()
    merged.warm_start(tmp_path / "base")
    merged.warm_start(tmp_path / "both", only="residual")
    assert merged.export(tmp_path / "merged").sha256 == config.sha256


@pytest.mark.parametrize("train", ["both", "base", "residual"])
def test_samples_stand_above_real_clips(parts, latents, tmp_path, train):
    from PIL import Image

    config = latent_model(SHAPE, parts, PROMPTS, 0.5)
    options = TrainingOptions(**{**FAST, **ALONE.get(train, {})})
    showcase = Showcase.of(Squares(), Coder(parts))
    trainer = Trainer(config, options, latents, parts=parts, showcase=showcase)
    trainer.write_samples(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    columns, rows = (8, 2) if train == "base" else (NUM_FRAMES, 16)
    assert pixels.shape == (rows * (SIZE + 1) - 1, columns * (SIZE + 1) - 1, 3)
    real = showcase.pixels[0, 2 if train == "base" else 0].numpy()
    assert np.array_equal(pixels[SIZE + 1 : 2 * SIZE + 1, :SIZE], real)
    assert len((tmp_path / "prompts.txt").read_text().splitlines()) == 8


def test_latents_that_do_not_fit_are_refused(parts, latents):
    config = latent_model(SHAPE, parts, PROMPTS, 0.5)
    options = TrainingOptions(**FAST)
    for wrong in (
        replace(latents, clips=latents.clips[:, :3]),
        replace(latents, clips=latents.clips[:0], captions=latents.captions[:0]),
    ):
        with pytest.raises(ValueError, match="expected latents"):
            Trainer(config, options, wrong)
    for wrong in (
        replace(latents, captions=latents.captions[:3]),
        replace(latents, captions=latents.captions[..., :8], null=latents.null[..., :8]),
    ):
        with pytest.raises(ValueError, match="expected captions' states"):
            Trainer(config, options, wrong)
