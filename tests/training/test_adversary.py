"""vfengine/training/adversary.py: it learns, pushes as hard as asked, and resumes to the bit."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from small_autoencoder import OPTIONS, SMALL, few_frames

from vfengine.cli.flags import UsageError
from vfengine.cli.train import main
from vfengine.cli.train_settings import read_settings
from vfengine.formats.folders import folder_digest
from vfengine.training.adversary import Adversary, Discriminator, hinge, scaled
from vfengine.training.autoencoder import AutoencoderTraining
from vfengine.training.options import TrainingOptions


@pytest.fixture(scope="module")
def frames():
    return few_frames()


def training_of(frames, steps, adversary, **options):
    options = TrainingOptions(steps=steps, adversary=adversary, **{**OPTIONS, **options})
    return AutoencoderTraining(options, frames, config=SMALL)


def weights(training):
    return [p.detach().clone() for p in training.networks["decoder"].parameters()]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- in a training ---------------------------------------------------------------------------------


def test_decoder_is_left_alone_for_the_first_steps_while_the_discriminator_learns(frames):
    without, beside = (training_of(frames, 40, weight) for weight in (0.0, 0.1))
    fresh = [p.detach().clone() for p in beside.adversary.parameters]
    for step in range(3):
        theirs, ours = without.step().losses, beside.step().losses
        assert set(theirs) == {"whole", "half"}
        assert set(ours) == {"whole", "half", "adversary", "discriminator"}
        assert (ours["whole"] == theirs["whole"]) and (ours["half"] == theirs["half"])
        assert same(weights(without), weights(beside)) == (step < 2)  # 5 % of 40 steps
    assert not same(fresh, beside.adversary.parameters)


def test_crops_and_whole_pictures_are_both_judged(frames):
    training = training_of(frames, 4, 0.5)
    for _ in range(4):  # FloatingPointError if a loss is not finite
        training.step()
    assert all(p.isfinite().all() for p in weights(training))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_takes_the_same_steps(frames, tmp_path, precision):
    whole, start, resumed = (training_of(frames, 6, 0.5, precision=precision) for _ in range(3))
    for _ in range(3):
        start.step()
    start.save(tmp_path / "state.safetensors")
    resumed.restore(tmp_path / "state.safetensors")
    assert resumed.steps_done == 3
    for training, count in ((whole, 6), (resumed, 3)):
        for _ in range(count):
            training.step()
    assert same(weights(resumed), weights(whole))
    assert same(resumed.adversary.state(), whole.adversary.state())


def test_state_with_an_adversary_is_not_that_without(frames, tmp_path):
    for name, weight, other in (("with", 0.1, 0.0), ("without", 0.0, 0.1)):
        training_of(frames, 2, weight).save(tmp_path / name)
        with pytest.raises(ValueError, match="another model or of other data"):
            training_of(frames, 2, other).restore(tmp_path / name)


def test_identity_without_an_adversary_is_that_of_earlier_states(frames):
    assert training_of(frames[:1], 2, 0.0)._identity() == "e2dc83a709725986"


# -- the push --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.05, 1.0])
def test_gradients_at_the_last_convolution_have_the_ratio_asked_for(frames, weight):
    decoder = training_of(frames, 2, weight).networks["decoder"]
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    decoded = decoder(z)
    loss = (decoded - 1).abs().mean()
    push = 1e-5 * torch.randn_like(decoded)
    last = decoder.conv_out.weight
    share = scaled(push, decoded, loss, last, weight)
    own, second = (torch.autograd.grad(x, last, retain_graph=True)[0] for x in (loss, share))
    assert second.norm() == pytest.approx(weight * own.norm().item(), rel=1e-4)
    (of_pictures,) = torch.autograd.grad(share, decoded)
    assert F.cosine_similarity(of_pictures.flatten(), push.flatten(), 0) > 0.9999


def test_nothing_is_pushed_without_a_direction(frames):
    decoder = training_of(frames, 2, 0.1).networks["decoder"]
    decoded = decoder(torch.zeros(1, 4, 8, 8))
    share = scaled(torch.zeros_like(decoded), decoded, decoded.mean(), decoder.conv_out.weight, 1.0)
    (gradient,) = torch.autograd.grad(share, decoder.conv_out.weight)
    assert torch.equal(gradient, torch.zeros_like(gradient))


# -- the discriminator -----------------------------------------------------------------------------


def pictures(frames, blurred):
    x = frames[..., :3].movedim(-1, 1).float() / 127.5 - 1
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if blurred else x


def test_discriminator_tells_blurred_pictures_from_sharp_ones(frames):
    options = TrainingOptions(steps=60, **{**OPTIONS, "learning_rate": 1e-3})
    torch.manual_seed(0)
    last = torch.nn.Parameter(torch.ones(()))
    adversary = Adversary(options, last, "cpu")
    sharp, blurred = pictures(frames, False), pictures(frames, True)
    for step in range(60):
        chosen = torch.arange(4) * 4 + step % 3
        decoded = blurred[chosen] * last
        _, losses = adversary.step(sharp[chosen], decoded, last.square(), step)
    assert losses["discriminator"] < 1.6  # 2 is to tell nothing
    with torch.no_grad():
        of_sharp, of_blurred = (adversary.network(x).mean((1, 2, 3)) for x in (sharp, blurred))
    assert (of_sharp > of_blurred).float().mean() > 0.9


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (128, 128)])
def test_discriminator_takes_any_size(size):
    height, width = size
    scores = Discriminator()(torch.zeros(1, 3, height, width))
    assert scores.shape == (1, 1, height // 4 - 2, width // 4 - 2)


def test_discriminator_is_small_and_sees_patches_of_36():
    network = Discriminator()
    assert 0.3e6 < sum(p.numel() for p in network.parameters()) < 0.7e6
    x = torch.randn(1, 3, 96, 96, requires_grad=True)
    network(x)[0, 0, 10, 10].backward()
    seen = x.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [36, 36]


def test_weights_in_use_have_a_largest_singular_value_of_1():
    torch.manual_seed(0)
    network = Discriminator()
    for layer in (*network.layers, network.scores):
        for _ in range(100):
            layer.iterate()
        matrix = layer.weight.detach().flatten(1)
        largest = torch.dot(layer.left, matrix @ layer.right)
        assert torch.linalg.matrix_norm(matrix, 2) == pytest.approx(largest.item(), rel=0.02)


def test_hinge_loss():
    scores = torch.tensor([-2.0, 0.0, 2.0])
    assert hinge(scores, scores) == pytest.approx(8 / 3)
    assert hinge(torch.tensor([1.5]), torch.tensor([-1.0])) == 0
    assert hinge(torch.zeros(3), torch.zeros(3)) == 2


# -- the setting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_weight_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="adversary"):
        TrainingOptions(adversary=bad)


def test_setting_is_one_of_autoencoders_alone():
    given = ["--output", "runs", "--adversary", "0.1"]
    assert read_settings([*given, "--objective", "autoencoder"]).adversary == 0.1
    assert read_settings(["--output", "runs", "--objective", "autoencoder"]).adversary == 0
    assert read_settings(["--output", "runs"]).adversary == 0
    for objective in ("decomposed", "vdm", "text"):
        with pytest.raises(UsageError, match="--adversary has no meaning for"):
            read_settings([*given, "--objective", objective])


def test_command_logs_the_losses_of_both(tmp_path):
    arguments = ["--objective", "autoencoder", "--output", str(tmp_path), "--size", "32"]
    arguments += ["--num-clips", "2", "--batch-size", "1", "--precision", "fp32"]
    arguments += ["--sample-every", "0", "--log-every", "1", "--adversary", "0.1"]
    assert main([*arguments, "--steps", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["adversary"] == 0.1
    assert [line["step"] for line in lines[1:]] == [1, 2]
    assert all({"adversary", "discriminator"} <= set(line) for line in lines[1:])
    checkpoint = tmp_path / "checkpoint"
    digest = folder_digest(checkpoint)
    shutil.rmtree(checkpoint)  # as if the run had been interrupted between it and the state
    assert main([*arguments, "--steps", "2", "--resume"]) == 0
    assert folder_digest(checkpoint) == digest
