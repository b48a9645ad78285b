"""A training's gradients from our kernels beside PyTorch's, and a step's calls of its networks."""

import numpy as np
import pytest
import torch

import vfengine.models.layers as layers
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.formats.checkpoint import DecomposedConfig
from vfengine.models import UNetConfig
from vfengine.training.options import TrainingOptions
from vfengine.training.trainer import Trainer

SIZE, FRAMES = 8, 4
UNET = {
    **{"block_out_channels": (32, 64), "layers_per_block": (1, 1), "patch_size": 1},
    **{"spatial_attention": (False, True), "temporal_attention": (False, False)},
    **{"temporal_conv": (False, False), "head_dim": 16, "norm_groups": 8, "num_classes": 2},
}
VIDEO = {"in_channels": 6, "out_channels": 6, "frame_embedding": True}
VIDEO |= {"temporal_attention": (False, True), "temporal_conv": (True, False)}


def trainer(**changes) -> Trainer:
    """Of small networks, all of whose layers are there, with weights that let gradients through."""
    base = UNetConfig(**{**UNET, "in_channels": 3, "out_channels": 4})
    config = DecomposedConfig(
        **{"num_frames": FRAMES, "height": SIZE, "width": SIZE, "channels": 3, "fps": 8.0},
        labels=("a", "b"),
        base=base,
        residual=UNetConfig(**{**UNET, **VIDEO}),
        clean_share=0.5,
        schedule=NoiseSchedule.linear().to_dict(),
        lam=0.5,
    )
    random = np.random.default_rng(0)
    clips = random.integers(0, 256, (6, FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
    how = {"steps": 9, "batch_size": 3, "extra_images": 2, "clean_share": 0.5, "precision": "fp32"}
    made = Trainer(config, TrainingOptions(**{**how, **changes}), clips, np.arange(6) % 2)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters:  # layers that start at zero pass nothing on
            parameter += 0.02 * torch.randn_like(parameter)
    return made


def gradients(training: Trainer) -> list[torch.Tensor]:
    enabled = training.options.precision == "bf16"
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        losses = training.losses(0)
    total = sum(loss.mean() for loss, _ in losses.values())
    return [total.detach(), *torch.autograd.grad(total, training.parameters)]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Of all gradients together, relative."""
    of = lambda all_of_them: torch.cat([x.double().flatten() for x in all_of_them[1:]])  # noqa: E731
    return float((of(found) - of(expected)).norm() / of(expected).norm())


@pytest.fixture
def by_pytorch(monkeypatch):
    """Call it: from then on layers take PyTorch's kernels."""
    return lambda: monkeypatch.setattr(layers, "records_gradients", lambda *tensors: False)


def test_gradients_in_fp32_are_pytorchs_to_rounding(by_pytorch):
    training = trainer()
    found = gradients(training)
    by_pytorch()
    expected = gradients(training)
    assert distance(found, expected) < 1e-5
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)


def test_gradients_in_bf16_err_no_more_than_twice_pytorchs(by_pytorch):
    training, exact = trainer(precision="bf16"), trainer()
    found = gradients(training)
    by_pytorch()
    expected = gradients(exact)
    assert distance(found, expected) <= 2 * distance(gradients(training), expected)


def test_our_kernels_run_in_training(monkeypatch):
    """And only there."""
    called = set()
    names = ("differentiable_conv3x3", "differentiable_group_norm_silu")

    def noting(name, run):
        def noted(*arguments):
            called.add(name)
            return run(*arguments)

        return noted

    for name in names:
        monkeypatch.setattr(layers, name, noting(name, getattr(layers, name)))
    training = trainer()
    with torch.no_grad():
        training.losses(0)
    assert not called
    training.step()
    assert called == set(names)


def test_the_base_network_is_called_once_a_step():
    training, calls = trainer(), []
    training.networks["base"].register_forward_hook(lambda *call: calls.append(len(call[2])))
    training.step()
    assert calls == [5]  # clips and further base frames


def test_one_call_has_the_losses_of_two(monkeypatch):
    """Those of the clips alone, and of the further frames alone."""
    training = trainer()
    together = training.losses(0)["base"][0]
    real = training.objective._model

    def apart(network, condition, null=None):
        if network is not training.networks["base"]:
            return real(network, condition, null)
        return lambda z, t: torch.cat(
            [
                real(network, condition[rows])(z[rows], t[rows])
                for rows in (slice(0, 3), slice(3, 5))
            ]
        )

    monkeypatch.setattr(training.objective, "_model", apart)
    torch.testing.assert_close(training.losses(0)["base"][0], together, rtol=1e-5, atol=0)
