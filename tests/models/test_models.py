"""The UNet family: shapes, memory layout, what sees what, and that published blocks map onto it."""

import functools
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from torch import nn

from vfengine.models import BaseGenerator, ResidualGenerator, UNet
from vfengine.models.layers import (
    RelativePositionBias,
    ResBlock,
    TemporalConv,
    Transformer,
    attend,
    images,
    rows,
)

IMAGE, CLIP = replace(tiny_config().base, out_channels=3), tiny_config().residual
BASE = tiny_config().base
RGB = {"in_channels": 3, "out_channels": 3}
SCHEDULE = tiny_config().noise_schedule()


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere: layers that start at zero would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module.eval()


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch, height, width", [(2, 16, 16), (1, 4, 12)])
@pytest.mark.parametrize("frames", [None, 1, 4, 5])
def test_unet_keeps_shape(frames, batch, height, width):
    config = IMAGE if frames is None else replace(CLIP, **RGB)
    shape = (batch, 3, height, width) if frames is None else (batch, frames, 3, height, width)
    unet = randomise(UNet(config))
    out = unet(normal(*shape), torch.arange(batch), class_labels=torch.zeros(batch).long())
    assert out.shape == shape
    assert bool(out.isfinite().all())


def test_every_convolution_sees_channels_last():
    unet = randomise(UNet(replace(CLIP, **RGB, temporal_conv=(True, True))))
    seen = []

    def check(module, inputs):
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_pre_hook(check)
    unet(normal(2, 4, 3, 16, 16), torch.tensor([3, 900]))
    assert len(seen) > 15
    assert all(seen)


def test_folding_frames_and_pixels_copies_nothing():
    x = normal(6, 8, 4, 5).to(memory_format=torch.channels_last)
    assert rows(x).data_ptr() == x.data_ptr()
    assert torch.equal(images(rows(x), 4, 5), x)
    assert images(rows(x), 4, 5).data_ptr() == x.data_ptr()
    temporal = rows(x).unflatten(0, (-1, 3)).permute(0, 3, 1, 2)  # as TemporalConv sees it
    assert temporal.data_ptr() == x.data_ptr()
    assert temporal.is_contiguous(memory_format=torch.channels_last)


def test_a_skip_is_gone_once_it_is_joined():
    unet, skips, held = UNet(IMAGE).eval(), [], []
    unet.conv_in.register_forward_hook(lambda layer, x, h: skips.append(weakref.ref(h)))
    last = [stage for step, stage in unet.steps if step.kind == "stage"][-1]
    last.register_forward_pre_hook(lambda layer, x: held.append(skips[0]() is not None))
    with torch.no_grad():
        unet(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))
    assert held == [False]


def test_starts_as_zero_and_every_weight_learns():
    torch.manual_seed(0)
    unet = UNet(replace(CLIP, **RGB, temporal_conv=(True, True)))
    x, t, labels = normal(2, 4, 3, 16, 16), torch.tensor([5, 700]), torch.tensor([0, 2])
    assert not bool(unet(x, t, class_labels=labels).any())
    optimizer = torch.optim.SGD(unet.parameters(), 0.1)
    for _ in range(4):  # layers behind a zero layer wait for it to move first
        optimizer.zero_grad()
        (
            unet(x, t, class_labels=labels) - normal(2, 4, 3, 16, 16, seed=5)
        ).square().sum().backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    silent = [name for name, p in unet.named_parameters() if not bool(p.grad.any())]
    assert silent == []


def test_frames_meet_only_through_temporal_layers():
    x, t = normal(1, 4, 3, 16, 16), torch.tensor([500])
    other = x.clone()
    other[:, 3] += 1
    for temporal, expected in ((True, True), (False, False)):
        config = replace(CLIP, **RGB, temporal_attention=(False, temporal))
        unet = randomise(UNet(config))
        assert bool((unet(x, t)[:, 0] != unet(other, t)[:, 0]).any()) is expected


def test_frame_embedding_tells_frames_apart():
    unet = randomise(UNet(replace(CLIP, **RGB, temporal_attention=(False, False))))
    out = unet(normal(1, 1, 3, 16, 16).expand(1, 4, 3, 16, 16), torch.tensor([500]))
    assert float((out[:, 0] - out[:, 3]).detach().abs().max()) > 1e-3


def test_class_label_and_null_class():
    unet = randomise(UNet(IMAGE))
    x, t = normal(2, 3, 16, 16), torch.tensor([10, 20])
    null = torch.full((2,), IMAGE.num_classes)
    assert torch.equal(unet(x, t), unet(x, t, class_labels=null))
    assert bool((unet(x, t) != unet(x, t, class_labels=torch.tensor([0, 1]))).any())


@pytest.mark.parametrize("config", [IMAGE, replace(CLIP, **RGB)])
def test_context_sequence_is_attended_to(config):
    unet = randomise(UNet(replace(config, context_dim=24)))
    x = normal(2, 4, 3, 16, 16) if config.is_video else normal(2, 3, 16, 16)
    t, context = torch.tensor([10, 20]), normal(2, 7, 24)
    out = unet(x, t, context)
    context[1] += 1
    changed = unet(x, t, context)
    assert torch.equal(out[0], changed[0])
    assert bool((out[1] != changed[1]).any())


def test_the_frames_of_a_clip_share_its_context():
    spatial = randomise(Transformer(16, "space", replace(CLIP, context_dim=24)))
    x, context = normal(6, 16, 4, 4).to(memory_format=torch.channels_last), normal(2, 5, 24)
    shared = spatial(x, 3, context)
    torch.testing.assert_close(shared, spatial(x, 3, context.repeat_interleave(3, dim=0)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda u: u(normal(2, 4, 3, 16, 16), torch.zeros(2).long()), "expected .B, C, H, W."),
        (lambda u: u(normal(2, 4, 16, 16), torch.zeros(2).long()), "C = 3"),
        (lambda u: u(normal(2, 3, 18, 16), torch.zeros(2).long()), "multiples of 4"),
        (lambda u: u(normal(2, 3, 16, 16), torch.zeros(3).long()), "t must have shape"),
        (
            lambda u: u(normal(2, 3, 16, 16), torch.zeros(2).long(), normal(2, 7, 24)),
            "context_dim=None",
        ),
        (
            lambda u: u(
                normal(2, 3, 16, 16), torch.zeros(2).long(), class_labels=torch.zeros(1).long()
            ),
            "class_labels",
        ),
    ],
)
def test_unet_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call(UNet(IMAGE))


def test_config_rejects_uneven_levels_and_heads():
    with pytest.raises(ValueError, match="spatial_attention needs 2 entries"):
        replace(IMAGE, spatial_attention=(True,))
    with pytest.raises(ValueError, match="head_dim"):
        replace(IMAGE, head_dim=12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head_dims": (8,)}, "head_dims needs 2 entries"),
        ({"head_dims": (8, 12)}, "head_dim=12"),
        ({"transformer_depths": (1, 0)}, "transformer_depths cannot hold 0"),
        ({"transformer_in_heads": 0}, "transformer_in_heads must be an int"),
        ({"mid_blocks": -1}, "mid_blocks must be an int"),
        ({"mid_spatial_attention": "yes"}, "mid_spatial_attention must be true, false or null"),
        ({"temporal_self_attentions": 3}, "temporal_self_attentions must be 1 or 2"),
        ({"norm_eps": "small"}, "norm_eps must be a number"),
        ({"frequency_shift": 2}, "frequency_shift must be a number"),
        ({"any_size": 1}, "any_size must be true or false"),
        ({"class_embedding": "identity"}, "class_embedding must be one of"),
        ({"class_embedding": "table", "num_classes": None}, "needs num_classes"),
        ({"class_features": 4}, "class_features go with"),
    ],
)
def test_config_rejects_unknown_variants(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(IMAGE, **changes)


def test_later_entries_are_written_only_where_they_say_something():
    assert "norm_eps" not in IMAGE.to_dict()
    assert "norm_eps" not in repr(IMAGE)
    other = replace(IMAGE, norm_eps=1e-6, head_dims=(8, 16))
    assert set(other.to_dict()) - set(IMAGE.to_dict()) == {"norm_eps", "head_dims"}
    assert type(IMAGE)(**other.to_dict()) == other
    assert set(IMAGE.identity()) - set(IMAGE.to_dict()) == {"temporal_feed_forward"}


def test_blocks_of_a_deep_transformer_start_as_the_identity_and_all_matter():
    config = replace(IMAGE, context_dim=24, transformer_depths=(1, 3), norm_over_frames=True)
    spatial = Transformer(16, "space", config, 8, depth=3)
    x, context = normal(2, 16, 4, 4), normal(2, 5, 24)
    x = x.to(memory_format=torch.channels_last)
    assert torch.equal(spatial(x, 1, context), x)
    randomise(spatial)
    out = spatial(x, 1, context)
    assert not spatial.norm_over_frames  # a temporal transformer's
    for block in spatial.rest:
        block.attn2.to_out.weight.data.mul_(2)
        changed = spatial(x, 1, context)
        assert not torch.equal(changed, out)
        out = changed


@pytest.mark.parametrize("length", [1, 16, 64, 65])
@pytest.mark.parametrize("biased", [True, False])
def test_attend_matches_fused_attention(length, biased):
    q, k, v = (normal(2, 3, length, 8, seed=s) for s in (1, 2, 3))
    bias = normal(3, length, length) if biased else None
    mask = None if bias is None else bias.double()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_relative_position_buckets():
    buckets = RelativePositionBias(4).buckets(200, torch.device("cpu"))
    first = buckets[0]  # the query is frame 0: keys lie ahead
    assert first[:9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]  # exact up to 8
    assert bool((first[1:] >= first[:-1]).all())
    assert first[128:].unique().tolist() == [31]
    assert buckets[:, 0][:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(buckets[:16, :16], RelativePositionBias(4).buckets(16, torch.device("cpu")))


# -- blocks as diffusers publishes them ------------------------------------------------------------


def test_resblock_takes_weights_of_diffusers():
    from diffusers.models.resnet import ResnetBlock2D

    peer = randomise(
        ResnetBlock2D(in_channels=32, out_channels=64, temb_channels=48, groups=32, eps=1e-5)
    )
    ours = ResBlock(32, 64, 48, groups=32, scale_shift=False)
    ours.load_state_dict(peer.state_dict())
    x, embedding = normal(2, 32, 8, 8), normal(2, 48)
    with torch.no_grad():  # the peer applies SiLU to the embedding itself
        torch.testing.assert_close(
            ours(x, F.silu(embedding)), peer(x, embedding), rtol=1e-4, atol=1e-5
        )


def test_temporal_conv_takes_weights_of_diffusers():
    from diffusers.models.resnet import TemporalConvLayer

    peer = randomise(TemporalConvLayer(32, 32))
    ours = TemporalConv(32, groups=32, depth=4)
    state = peer.state_dict()
    for i in range(4):
        conv = f"conv{i + 1}." + (
            "2." if i == 0 else "3."
        )  # a dropout stands before the later ones
        ours.norms[i].load_state_dict({k: state[f"conv{i + 1}.0.{k}"] for k in ("weight", "bias")})
        weight = state[conv + "weight"]
        ours.convs[i].load_state_dict({"weight": weight[..., 0], "bias": state[conv + "bias"]})
    x = normal(6, 32, 4, 4).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, 3), peer(x, num_frames=3), rtol=1e-4, atol=1e-5)


def test_spatial_transformer_takes_weights_of_diffusers():
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    peer = randomise(
        Transformer2DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=64,
            num_layers=1,
            cross_attention_dim=24,
            norm_num_groups=32,
            use_linear_projection=True,
        )
    )
    config = replace(
        IMAGE,
        block_out_channels=(64, 64),
        head_dim=16,
        norm_groups=32,
        context_dim=24,
        feed_forward_mult=4,
    )
    ours = Transformer(64, "space", config)
    names = {"to_out.0.": "to_out.", "ff.net.0.proj.": "ff.proj.", "ff.net.2.": "ff.out."}
    state = {}
    for name, value in peer.state_dict().items():
        name = name.removeprefix("transformer_blocks.0.")
        for theirs, mine in names.items():
            name = name.replace(theirs, mine)
        state[name] = value
    ours.load_state_dict(state)
    ours.norm.eps = peer.norm.eps
    x, context = normal(2, 64, 8, 8), normal(2, 7, 24)
    with torch.no_grad():
        expected = peer(x, encoder_hidden_states=context).sample
        out = ours(x.to(memory_format=torch.channels_last), 1, context)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


# -- generators ------------------------------------------------------------------------------------


def test_base_generator_is_its_clean_estimate_in_noise_form():
    generator = BaseGenerator(randomise(UNet(BASE)), SCHEDULE)
    z, t = normal(3, 3, 16, 16), torch.tensor([0, 400, 999])
    a = SCHEDULE.alphas_cumprod[t].view(3, 1, 1, 1)
    with torch.no_grad():
        rebuilt = (
            a.sqrt() * generator.denoise(z, t).double() + (1 - a).sqrt() * generator(z, t).double()
        )
    torch.testing.assert_close(rebuilt.float(), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [1, 4, 5])
def test_residual_generator_leaves_the_base_frame_alone(frames):
    generator = ResidualGenerator(randomise(UNet(CLIP)), SCHEDULE, lam=0.5)
    z, t = normal(2, frames, 3, 16, 16), torch.tensor([30, 800])
    a = SCHEDULE.alphas_cumprod[t].view(2, 1, 1, 1, 1)
    with torch.no_grad():
        clean, noise = generator.denoise(z, t), generator(z, t)
    m = frames // 2
    assert not bool(noise[:, m].any())
    torch.testing.assert_close(clean[:, m].double(), z[:, m] / a[:, 0].sqrt(), rtol=1e-5, atol=1e-6)
    rebuilt = a.sqrt() * clean.double() + ((1 - a) * 0.5).sqrt() * noise.double()
    torch.testing.assert_close(rebuilt.float(), z, rtol=1e-4, atol=1e-4)


def test_residual_generator_takes_the_sampler_s_lam():
    generator = ResidualGenerator(randomise(UNet(CLIP)), SCHEDULE, lam=0.5)
    z, t = normal(2, 4, 3, 16, 16), torch.tensor([30, 800])
    assert torch.equal(generator(z, t), generator(z, t, lam=0.5))
    lam = torch.tensor([0.0, 0.2, 1.0, 0.9])
    with torch.no_grad():
        clean, noise = generator.denoise(z, t, lam=lam), generator(z, t, lam=lam)
    a = SCHEDULE.alphas_cumprod[t].view(2, 1, 1, 1, 1)
    rebuilt = a.sqrt() * clean + ((1 - a) * (1 - lam).view(4, 1, 1, 1)).sqrt() * noise
    torch.testing.assert_close(rebuilt.float(), z, rtol=1e-4, atol=1e-4)


def test_residual_generator_blends_what_the_unet_says():
    generator = ResidualGenerator(UNet(CLIP), SCHEDULE, lam=0.5)
    z, t = normal(1, 4, 3, 16, 16), torch.tensor([200])
    base = z[:, 2:3] / SCHEDULE.alphas_cumprod[200].sqrt()
    bias = generator.unet.conv_out.bias.data.view(6, -1)  # the untrained UNet says its bias
    bias[:3] = torch.tensor([0.1, -0.2, 0.3]).view(3, 1)
    bias[3] = 50.0  # all weight on the base frame
    repeated = generator.denoise(z, t)
    torch.testing.assert_close(repeated, base.expand_as(z).float())
    bias[5] = 100.0  # all weight on the paint
    painted = generator.denoise(z, t)[:, [0, 1, 3]]
    torch.testing.assert_close(
        painted, torch.tensor([0.1, -0.2, 0.3]).view(3, 1, 1).expand_as(painted)
    )


def test_casting_a_generator_keeps_the_schedule_exact():
    generator = BaseGenerator(UNet(BASE), SCHEDULE).to(torch.bfloat16)
    assert generator.alphas_cumprod.dtype == torch.float64
    assert generator.unet.dtype == torch.bfloat16
    out = generator(normal(1, 3, 16, 16), torch.tensor([10]))
    assert out.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"block_out_channels": (27, 24)}, False),
        ({"block_out_channels": (24, 27)}, True),
        ({"block_out_channels": (2, 24), "frequency_shift": 1.0}, False),
        ({"block_out_channels": (4, 24), "frequency_shift": 1.0}, True),
        ({"block_out_channels": (2, 24), "frequency_shift": 0}, True),
    ],
)
def test_the_finest_level_is_as_wide_as_an_embedding_of_timesteps(changes, fits):
    made = functools.partial(replace, IMAGE, head_dim=1, norm_groups=1, **changes)
    if not fits:
        with pytest.raises(ValueError, match="finest level must have an even number of channels"):
            made()
        return
    with torch.no_grad():
        out = UNet(made()).eval()(torch.ones(1, 3, 16, 16), torch.tensor([7]))
    assert out.isfinite().all()
