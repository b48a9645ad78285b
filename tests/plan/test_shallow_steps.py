"""The shallow part of a UNet with features that were kept: every form against layers by hand."""

import pytest
import torch
import torch.nn.functional as F
from test_planned import cast, distance, inputs, network, plan

from vfengine.models import topology
from vfengine.plan.cuda import CudaUNet
from vfengine.sampling.features import Kept

MOST = "video, context and classes"
SOME = (
    *("image, patches of 2", "image, odd size", "image, three levels, odd size"),
    *(MOST, "video, narrow transformer first"),
)
some_cases = pytest.mark.parametrize("case", SOME)


def steps_of(case):
    """The inputs of a whole step and of a shallow one."""
    first = inputs(case)
    return first, {**first, "x": inputs(case, seed=5)["x"], "t": first["t"] - 5}


def both(form, case):
    """What a form of the network makes in both steps."""
    kept = Kept()
    whole, shallow = steps_of(case)
    with torch.no_grad():
        first = form(**whole, kept=kept)
        kept.shallow = True
        return first, form(**shallow, kept=kept)


@torch.no_grad()
def by_hand(unet, case):
    """The shallow step, layer by layer: the input of the last stage is split into its two parts."""
    seen = []
    last = unet.up[-1][-1]
    hook = last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    whole, now = steps_of(case)
    unet(**whole)
    hook.remove()
    deep = seen[0][:, : -unet.config.block_out_channels[0]]
    x, context = now["x"], now.get("context")
    frames = x.shape[1] if unet.config.is_video else 1
    embedding = F.silu(unet.embed(now["t"], now.get("class_labels"), frames))
    images = x.flatten(0, 1) if unet.config.is_video else x
    h = unet.conv_in(F.pixel_unshuffle(images, unet.config.patch_size))
    if unet.transformer_in is not None:
        h = unet.transformer_in(h, frames)
    h = last(torch.cat([deep, h], dim=1), embedding, frames, context)
    h = unet.conv_out(F.silu(unet.conv_norm_out(h)))
    return F.pixel_shuffle(h, unet.config.patch_size).unflatten(0, x.shape[: x.dim() - 3])


@some_cases
def test_a_shallow_step_is_the_last_stage_on_kept_features(case, monkeypatch):
    unet = network(case)
    expected = by_hand(unet, case)
    whole, shallow = both(unet, case)
    with torch.no_grad():
        assert torch.equal(whole, unet(**steps_of(case)[0]))
        assert distance(shallow, expected) < 1e-5
        assert distance(shallow, unet(**steps_of(case)[1])) > 1e-3
    monkeypatch.setenv("VFENGINE_KERNEL_BACKEND", "reference")
    assert distance(both(CudaUNet(network(case), torch.float32), case)[1], expected) < 1e-5


@some_cases
def test_a_plan_has_a_shallow_program_beside_the_whole_one(case):
    unet = network(case)
    planned = plan(unet)
    whole, shallow = both(planned, case)
    assert distance(shallow, by_hand(unet, case)) < 1e-5
    (pair,) = planned._programs.values()
    assert pair.shallow.program.arena is pair.program.arena
    assert torch.equal(whole, planned(**steps_of(case)[0]))


@pytest.mark.parametrize("stages", [2, 9])
def test_the_shallow_part_may_be_all_of_the_finest_level(stages, monkeypatch):
    """With the skips that the way down makes for it, and never more than the level."""
    monkeypatch.setattr(topology, "SHALLOW", stages)
    unet = network(MOST)
    assert distance(both(plan(unet), MOST)[1], both(unet, MOST)[1]) < 1e-5


def test_each_place_has_features_of_its_own_and_none_depends_on_the_batch():
    """Two calls a step take turns in one program, as windows do, or are one batch."""
    planned, steps, kept = plan(network(MOST)), steps_of(MOST), Kept()
    together = both(planned, MOST)[1]
    for kept.shallow, values in enumerate(steps):
        alone = [
            planned(**{name: value[k : k + 1] for name, value in values.items()}, kept=kept.part(k))
            for k in range(2)
        ]
    assert torch.equal(torch.cat(alone), together)


def test_a_shallow_step_in_bf16_is_as_close_as_the_modules():
    unet, steps, kept = network(MOST), steps_of(MOST), Kept()
    exact = by_hand(unet, MOST)
    planned = both(plan(unet, torch.bfloat16), MOST)[1]
    unet.bfloat16()
    for kept.shallow, values in enumerate(steps):
        with torch.no_grad():
            module = unet(**cast(values, torch.bfloat16), kept=kept)
    assert distance(planned, exact) < 2 * distance(module, exact)
