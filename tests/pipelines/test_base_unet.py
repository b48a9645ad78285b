"""A published image UNet as the base network of a decomposed model."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ON_CPU, tiny_config

import vfengine as vf
from vfengine.cli.settings import UsageError, read_settings
from vfengine.models import (
    CudaUNet,
    PretrainedGenerator,
    UNet,
    UNetConfig,
    load_unet,
    read_unet,
)

SHAPE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D",) * 2,
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D",) * 2,
}
CROSS = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
SCHEDULE = tiny_config().noise_schedule()
CALL = {"num_inference_steps": 3, "num_frames": 4}


def save_peer(folder, scheduler=None, **changes):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(**{**SHAPE, **changes}).save_pretrained(folder / "unet")
    if scheduler is not None:
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def open_with(checkpoint, base, **settings):
    return vf.VideoFusionPipeline.from_pretrained(
        checkpoint, base_unet=base, **{**ON_CPU, **settings}
    )


def test_walks_the_base_path_with_the_published_network(tiny_checkpoint, tmp_path):
    base = save_peer(tmp_path)
    pipe = open_with(tiny_checkpoint, base)
    out = pipe("jump", **CALL)
    unet = load_unet(base, torch.float32)
    noise = vf.decomposed_noise((1, 4, 3, 16, 16), base_seed=0, residual_seed=1).base
    expected = vf.sample_base(unet, noise, schedule=SCHEDULE, num_inference_steps=3)
    assert torch.equal(out.trajectory.states, expected.states)
    assert out.frames.shape == (1, 4, 16, 16, 3)
    given = open_with(tiny_checkpoint, unet)("jump", **CALL)
    assert np.array_equal(given.frames, out.frames)


def test_a_network_in_its_form_for_cuda_stays_as_it_is(tiny_checkpoint, tmp_path, monkeypatch):
    """As `load_unet` makes it there; here with the references of its ops."""
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")
    unet = CudaUNet(read_unet(save_peer(tmp_path), torch.float32), torch.float32)
    pipe = open_with(tiny_checkpoint, unet)
    path = pipe.walk_base("jump", num_inference_steps=2)
    assert pipe._session.networks["base"].unet is unet
    assert path.states.isfinite().all()
    assert path.metadata["model"] == pipe.walk_base("jump", num_inference_steps=2).metadata["model"]
    unet.unet.conv_in.weight.mul_(2)
    again = open_with(tiny_checkpoint, unet).walk_base("jump", num_inference_steps=2)
    assert again.metadata["model"] != path.metadata["model"]


def test_labels_are_left_to_the_residual_network(tiny_checkpoint, tmp_path):
    pipe = open_with(tiny_checkpoint, save_peer(tmp_path))
    jump, walk = (pipe(label, **CALL, guidance_scale=3.0) for label in ("jump", "walk"))
    assert torch.equal(jump.trajectory.states, walk.trajectory.states)
    assert not np.array_equal(jump.frames, walk.frames)


def test_a_table_of_classes_takes_labels_and_a_last_for_none(tiny_checkpoint, tmp_path):
    pipe = open_with(tiny_checkpoint, save_peer(tmp_path, num_class_embeds=4))
    jump, walk, none = (
        pipe.walk_base(label, num_inference_steps=2) for label in ("jump", "walk", None)
    )
    assert not torch.equal(jump.states, walk.states)
    assert not torch.equal(jump.states, none.states)


def test_v_prediction_is_read_from_the_scheduler(tiny_checkpoint, tmp_path):
    base = save_peer(tmp_path, {"prediction_type": "v_prediction", "beta_schedule": "linear"})
    said = open_with(tiny_checkpoint, base).walk_base(num_inference_steps=3)
    asked = open_with(tiny_checkpoint, base, base_prediction_type="v_prediction")
    other = open_with(tiny_checkpoint, base, base_prediction_type="epsilon")
    assert torch.equal(said.states, asked.walk_base(num_inference_steps=3).states)
    assert not torch.equal(said.states, other.walk_base(num_inference_steps=3).states)
    assert asked.config.fingerprint() != other.config.fingerprint()


def test_names_what_of_a_scheduler_is_not_taken(tiny_checkpoint, tmp_path):
    """How it samples is the model's business; a scheduler that samples as we do needs no word."""
    quiet = {"_class_name": "DDIMScheduler", "clip_sample": False}
    save_peer(tmp_path, quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = open_with(tiny_checkpoint, tmp_path).walk_base(num_inference_steps=2)
    save_peer(tmp_path, {**quiet, "clip_sample": True, "timestep_spacing": "trailing"})
    named = r'not taken .*: clip_sample = true, timestep_spacing = "trailing"$|timestep.*clip'
    with pytest.warns(UserWarning, match=named):
        found = open_with(tiny_checkpoint, tmp_path)
    assert torch.equal(found.walk_base(num_inference_steps=2).states, expected.states)


def test_says_what_is_taken_where_no_scheduler_lies_beside(tiny_checkpoint, tmp_path):
    with pytest.warns(UserWarning, match="no scheduler_config.json .* output for epsilon"):
        open_with(tiny_checkpoint, save_peer(tmp_path))
    with pytest.warns(UserWarning, match="output for v_prediction"):
        open_with(tiny_checkpoint, tmp_path, base_prediction_type="v_prediction")


def test_an_unconditional_network_is_a_base_network(tiny_checkpoint, tmp_path):
    """As such models are published: all files in one folder, its scheduler's among them."""
    from diffusers import UNet2DModel

    attention = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    shape = {**SHAPE, **dict(zip(("down_block_types", "up_block_types"), attention, strict=True))}
    torch.manual_seed(0)
    UNet2DModel(**shape, downsample_padding=0).save_pretrained(tmp_path)
    scheduler = tmp_path / "scheduler_config.json"
    scheduler.write_text('{"_class_name": "DDPMScheduler", "clip_sample": true}')
    with pytest.warns(UserWarning, match="clip_sample = true"):
        pipe = open_with(tiny_checkpoint, tmp_path)
    noise = vf.decomposed_noise((1, 4, 3, 16, 16), base_seed=0, residual_seed=1).base
    unet = load_unet(tmp_path, torch.float32)
    expected = vf.sample_base(unet, noise, schedule=SCHEDULE, num_inference_steps=3)
    assert torch.equal(pipe("jump", **CALL).trajectory.states, expected.states)
    scheduler.write_text('{"_class_name": "ScoreSdeVeScheduler"}')
    with pytest.raises(ValueError, match="noise levels σ"):
        open_with(tiny_checkpoint, tmp_path)


def test_v_prediction_becomes_noise():
    class Velocity(UNet):
        def forward(self, z, t, **conditions):
            a = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1).float()
            return a.sqrt() * noise - (1 - a).sqrt() * clean

    config = replace(tiny_config().base, num_classes=None, out_channels=3)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    t = torch.tensor([5, 900])
    a = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1).float()
    model = PretrainedGenerator(Velocity(config), SCHEDULE, "v_prediction")
    out = model(a.sqrt() * clean + (1 - a).sqrt() * noise, t)
    torch.testing.assert_close(out, noise, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        PretrainedGenerator(Velocity(config), SCHEDULE, "sample")


def test_paths_and_caches_do_not_mistake_base_networks(tiny_checkpoint, tmp_path):
    cache, base = tmp_path / "cache", save_peer(tmp_path)
    own = vf.VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU)
    other = open_with(tiny_checkpoint, base)
    walked = [pipe("jump", **CALL, base_cache=cache).trajectory for pipe in (own, other, other)]
    assert len(list(cache.iterdir())) == 2
    assert torch.equal(walked[1].states, walked[2].states)
    assert not torch.equal(walked[0].states, walked[1].states)
    with pytest.raises(ValueError, match="made by another model"):
        other("jump", **CALL, trajectory=walked[0])
    assert np.array_equal(
        other("jump", **CALL, trajectory=walked[1]).frames, other("jump", **CALL).frames
    )


@pytest.mark.parametrize(
    "changes, scheduler, message",
    [
        ({"in_channels": 4}, None, "4 input and 3 output channels, the clips have 3"),
        ({"out_channels": 6}, None, "3 input and 6 output channels"),
        (CROSS, None, "attends to a context of width 12"),
        ({"num_class_embeds": 3}, None, "3 classes, which are not this model's 3 labels and one"),
        ({"class_embed_type": "timestep"}, None, "takes class labels as a timestep"),
        ({}, {"prediction_type": "sample"}, "predicts 'sample'"),
        ({}, {"beta_schedule": "scaled_linear"}, "another noise schedule"),
        ({}, {"num_train_timesteps": 500}, "another noise schedule"),
        ({}, {"beta_schedule": "squaredcos_cap_v2"}, "another noise schedule"),
        ({}, {"beta_schedule": "sigmoid"}, 'beta_schedule = "sigmoid"'),
        ({}, {"beta_start": None}, "beta_start = null must be a number"),
        ({}, {"num_train_timesteps": None}, "num_train_timesteps must be an int"),
        ({}, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = true"),
        ({}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({}, {"_class_name": "EDMEulerScheduler"}, "noise levels σ"),
        ({}, {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348.0}, "noise levels σ"),
        ({}, {"_class_name": "HeunDiscreteScheduler"}, "another noise schedule"),
        ({}, {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sig"),
    ],
)
def test_refuses_what_does_not_fit(changes, scheduler, message, tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=f"base_unet: .*{message}"):
        open_with(tiny_checkpoint, save_peer(tmp_path, scheduler, **changes))


@pytest.mark.parametrize(
    "base, settings, message",
    [
        (UNet(replace(tiny_config().residual, in_channels=3, out_channels=3)), {}, "a video UNet"),
        (UNet(UNetConfig()), {"dtype": torch.bfloat16}, "is torch.float32 on cpu, the pipeline"),
        (UNet(replace(tiny_config().base, num_classes=7, out_channels=3)), {}, "has 7 classes"),
        (None, {"base_prediction_type": "epsilon"}, "that of a base_unet, and none is given"),
    ],
)
def test_refuses_modules_that_do_not_fit(base, settings, message, tiny_checkpoint):
    with pytest.raises(ValueError, match=message):
        open_with(tiny_checkpoint, base, **settings)


def test_refuses_what_is_no_network(tiny_checkpoint, tmp_path):
    with pytest.raises(TypeError, match="base_unet must be a folder or a UNet"):
        open_with(tiny_checkpoint, torch.nn.Identity())
    with pytest.raises(FileNotFoundError, match="no UNet in"):
        open_with(tiny_checkpoint, tmp_path)
    with pytest.raises(ValueError, match="_class_name = null"):  # one of our own checkpoints
        (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
            (tiny_checkpoint / "base.safetensors").read_bytes()
        )
        open_with(tiny_checkpoint, tmp_path)


def test_command_line_names_a_base_network(tiny_checkpoint, tmp_path, capsys):
    from vfengine.cli.generate import main

    base = save_peer(tmp_path)
    asked = [
        *("--model", str(tiny_checkpoint), "--label", "jump", "--base-unet", str(base)),
        *("--num-inference-steps", "2", "--output", str(tmp_path / "x.gif"), "--json"),
    ]
    assert main(asked) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["settings"]["base_unet"] == str(base)
    assert said["model_fingerprint"] == open_with(tiny_checkpoint, base).config.fingerprint()
    with pytest.raises(UsageError, match="--image cannot go with --base-unet"):
        read_settings(["--image", "x.png", "--base-unet", "y"])
