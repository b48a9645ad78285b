"""VDM*, plain video diffusion on the base UNet: its network and its files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, tiny_config, tiny_video_config
from test_checkpoint import contents, edit_config
from test_models import normal, randomise

from vfengine.formats.checkpoint import (
    build_network,
    load_network,
    read_config,
    save_checkpoint,
)
from vfengine.models import BaseGenerator, UNet, UNetConfig, VideoGenerator, vdm_config
from vfengine.models.layers import Transformer

BASE = tiny_config().base
SCHEDULE = tiny_config().noise_schedule()


def warm_started(base: BaseGenerator, config: UNetConfig | None = None) -> VideoGenerator:
    """A VDM* with the weights of the base network, its temporal layers still at zero."""
    generator = VideoGenerator(UNet(config or vdm_config(BASE)), SCHEDULE).eval()
    generator.unet.load_state_dict(base.unet.state_dict(), strict=False)
    return generator


# -- networks --------------------------------------------------------------------------------------


def test_vdm_config_adds_temporal_attention_alone():
    config = vdm_config(BASE)
    assert config.temporal_attention == BASE.spatial_attention
    changes = {"temporal_attention": (False, False), "temporal_feed_forward": True}
    assert replace(config, **changes) == BASE
    wider = vdm_config(BASE, channels=(32, 48))
    assert wider == replace(config, block_out_channels=(32, 48))


def test_vdm_always_has_a_position_bias():
    assert vdm_config(replace(BASE, position_buckets=0)).position_buckets == 32
    assert vdm_config(replace(BASE, position_buckets=64)).position_buckets == 64


def test_vdm_config_refuses_what_is_no_base():
    with pytest.raises(ValueError, match=r"needs an image UNet .* got a video UNet"):
        vdm_config(tiny_config().residual)
    with pytest.raises(ValueError, match="got one without"):
        vdm_config(replace(BASE, spatial_attention=(False, False)))


@pytest.mark.parametrize("mult", [0, 2])
def test_every_spatial_attention_has_a_temporal_one_without_feed_forward(mult):
    unet = UNet(vdm_config(replace(BASE, feed_forward_mult=mult)))
    layers = [module for module in unet.modules() if isinstance(module, Transformer)]
    axes = [layer.axis for layer in layers]  # in the order of the network
    assert axes == ["space", "time"] * 4
    for layer in layers:
        temporal = layer.axis == "time"
        assert (layer.ff is None) == (temporal or not mult)
        assert (layer.bias is not None) == temporal


def test_temporal_feed_forward_is_on_unless_turned_off():
    assert UNetConfig().temporal_feed_forward
    assert UNet(tiny_config().residual).mid[0].temporal.ff is not None
    with pytest.raises(ValueError, match="temporal_feed_forward must be true or false"):
        replace(BASE, temporal_feed_forward=None)


def test_weights_of_the_base_are_a_part_of_those_of_vdm():
    base, video = UNet(BASE).state_dict(), UNet(vdm_config(BASE)).state_dict()
    assert {key: video[key].shape for key in base} == {k: v.shape for k, v in base.items()}
    added = video.keys() - base.keys()
    assert added and all(".temporal." in key for key in added)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_untrained_temporal_layers_leave_the_base_network(frames):
    base = BaseGenerator(randomise(UNet(BASE)), SCHEDULE)
    video = warm_started(base)
    unchanged = []
    for module in video.modules():
        if isinstance(module, Transformer) and module.axis == "time":
            module.register_forward_hook(lambda _, args, out: unchanged.append((args[0], out)))
    z, t, labels = normal(2, frames, 3, 16, 16), torch.tensor([30, 800]), torch.tensor([0, 2])
    with torch.no_grad():
        estimate = video(z, t, class_labels=labels)
        expected = [base(z[:, i], t, class_labels=labels) for i in range(frames)]
    assert len(unchanged) == 4
    assert all(torch.equal(before, after) for before, after in unchanged)
    # what is left is the rounding of the same products in batches of another size
    torch.testing.assert_close(estimate, torch.stack(expected, 1), rtol=1e-5, atol=1e-5)


def test_trained_temporal_layers_show_the_frames_to_each_other():
    generator = VideoGenerator(randomise(UNet(vdm_config(BASE))), SCHEDULE)
    z, t = normal(1, 4, 3, 16, 16), torch.tensor([500])
    other = z.clone()
    other[:, 3] += 1
    with torch.no_grad():
        assert bool((generator(z, t)[:, 0] != generator(other, t)[:, 0]).any())
        reordered = generator(z.flip(1), t).flip(1)
        assert not torch.allclose(generator(z, t), reordered, atol=1e-5)  # the position bias


def test_video_generator_is_its_clean_estimate_in_noise_form():
    generator = VideoGenerator(randomise(UNet(vdm_config(BASE))), SCHEDULE)
    z, t = normal(3, 4, 3, 16, 16), torch.tensor([0, 400, 999])
    a = SCHEDULE.alphas_cumprod[t].view(3, 1, 1, 1, 1)
    with torch.no_grad():
        clean, noise = generator.denoise(z, t).double(), generator(z, t).double()
    torch.testing.assert_close(
        (a.sqrt() * clean + (1 - a).sqrt() * noise).float(), z, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BASE, "needs a video UNet, got one of images"),
        (replace(vdm_config(BASE), out_channels=3), r"C \+ 1 outputs, got 3 and 3"),
        (tiny_config().residual, r"C \+ 1 outputs, got 6 and 6"),
    ],
)
def test_video_generator_refuses_other_networks(config, message):
    with pytest.raises(ValueError, match=f"VideoGenerator: .*{message}"):
        VideoGenerator(UNet(config), SCHEDULE)


# -- on disk ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved VDM* with random weights."""
    state = randomise(build_network(tiny_video_config(), "video")).unet.state_dict()
    save_checkpoint(tmp_path / "model", tiny_video_config(), state)
    return tmp_path / "model"


def test_vdm_checkpoint_round_trips(tmp_path):
    state = randomise(build_network(tiny_video_config(), "video")).unet.state_dict()
    config = save_checkpoint(tmp_path / "model", tiny_video_config(video_std=0.4), state)
    assert sorted(contents(tmp_path)) == ["model/config.json", "model/video.safetensors"]
    assert read_config(tmp_path / "model") == config
    assert replace(config, sha256={}) == tiny_video_config(video_std=0.4)
    assert (config.objective, config.networks) == ("vdm", ("video",))
    assert not config.animates_pictures
    assert config.fingerprint() == config.sha256["video"][:16] != ""
    generator = load_network(tmp_path / "model", config, "video")
    assert isinstance(generator, VideoGenerator)
    assert generator.data_std == 0.4 and not generator.training
    loaded = generator.unet.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(loaded[key], value.half().float()), key


def test_vdm_config_file_holds_its_own_entries_alone(folder):
    values = json.loads((folder / "config.json").read_text())
    assert values["format"] == "vfengine-vdm-1"
    assert values["video"]["temporal_feed_forward"] is False
    assert list(values) == [
        *("format", "num_frames", "height", "width", "channels", "labels", "fps", "schedule"),
        *("video", "video_std", "sha256"),
    ]


def test_saving_a_vdm_replaces_a_decomposed_model_whole(tmp_path):
    model = save_tiny(tmp_path / "model")
    config = tiny_video_config()
    save_checkpoint(model, config, build_network(config, "video").unet.state_dict())
    assert sorted(contents(tmp_path)) == ["model/config.json", "model/video.safetensors"]


def test_networks_of_the_other_objective_are_refused(folder, tiny_checkpoint):
    config = read_config(folder)
    for name in ("base", "residual"):
        with pytest.raises(ValueError, match=rf"model: a VDM\* has no {name} network, but video$"):
            load_network(folder, config, name)
    with pytest.raises(ValueError, match=r"has no video network, but base and residual$"):
        load_network(tiny_checkpoint, read_config(tiny_checkpoint), "video")
    with pytest.raises(ValueError, match="has no base network"):
        build_network(config, "base")
    with pytest.raises(ValueError, match="has no video network"):
        build_network(tiny_config(), "video")


def test_state_dicts_that_are_not_the_networks_are_refused(tmp_path):
    state = build_network(tiny_video_config(), "video").unet.state_dict()
    with pytest.raises(ValueError, match="vdm model has the networks video, got 2 state dicts"):
        save_checkpoint(tmp_path / "model", tiny_video_config(), state, state)
    with pytest.raises(ValueError, match="has the networks base, residual, got 1 state"):
        save_checkpoint(tmp_path / "model", tiny_config(), state)
    assert not (tmp_path / "model").exists()


def test_damaged_and_foreign_weights_are_refused(folder):
    file = folder / "video.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"video\.safetensors is truncated"):
        load_network(folder, read_config(folder), "video")
    file.write_bytes(whole)
    video = json.loads((folder / "config.json").read_text())["video"]
    edit_config(folder, video={**video, "temporal_feed_forward": True})
    with pytest.raises(ValueError, match=r"another architecture .*temporal\.ff.* is absent"):
        load_network(folder, read_config(folder), "video")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no video\.safetensors"):
        load_network(folder, read_config(folder), "video")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "vfengine-vdm-2"}, '"format" is not one of'),
        ({"format": "vfengine-decomposed-1"}, "unknown entries: video, video_std"),
        ({"lam": 0.5}, "unknown entries: lam"),
        ({"clean_share": 0.5, "base": None}, "unknown entries: base, clean_share"),
        ({"video": None}, "video must be an object, got None"),
        ({"video": {}}, "classes"),
        ({"video_std": 0}, "video_std is out of range"),
        ({"video_std": "wide"}, "video_std must be a number"),
        ({"channels": 1}, "video takes 3 channels"),
        ({"labels": ["a"]}, "video has 3 classes, not 1"),
    ],
)
def test_vdm_config_that_is_none_is_refused(folder, changes, reason):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json is not the configuration .*{reason}"):
        read_config(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lam": 0.5}, "unexpected keyword argument 'lam'"),
        ({"base": BASE}, "unexpected keyword argument 'base'"),
        ({"base_path": "clean"}, "unexpected keyword argument 'base_path'"),
        ({"video": None}, "video must be a UNetConfig, got None"),
    ],
)
def test_entries_of_both_objectives_are_refused(changes, reason):
    with pytest.raises(TypeError, match=reason):
        tiny_video_config(**changes)
    with pytest.raises(TypeError, match="unexpected keyword argument 'video_std'"):
        tiny_config(video_std=0.3)
