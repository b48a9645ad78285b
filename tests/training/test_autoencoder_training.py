"""vfengine/training/autoencoder.py: it learns, resumes to the bit, and exports what it measured."""

import os

import numpy as np
import pytest
import torch
from small_autoencoder import OPTIONS, SMALL, few_frames

from vfengine.formats.parts import read_autoencoder
from vfengine.media.pictures import network_to_pixels, pixels_to_network
from vfengine.models.autoencoder import Autoencoder, Decoder, Encoder
from vfengine.training.autoencoder import CONFIG, AutoencoderTraining, _error, frame_pool, psnr
from vfengine.training.options import TrainingOptions


@pytest.fixture(scope="module")
def frames():
    return few_frames()


def trained(frames, steps, take=None, **options):
    training = AutoencoderTraining(
        TrainingOptions(steps=steps, **{**OPTIONS, **options}), frames, config=SMALL
    )
    for _ in range(steps if take is None else take):
        training.step()
    return training


def test_loss_falls(frames):
    training = trained(frames, 60, take=0)
    first, *_, last = [training.step().losses["whole"] for _ in range(60)]
    assert last < first / 2


def test_steps_see_crops_and_then_whole_pictures(frames):
    training = trained(frames, 10, take=0)
    for step, shape in ((4, (6, 3, 16, 16)), (5, (2, 3, 32, 32))):
        pictures, figure, _ = training._batch(step)
        assert pictures.shape == shape
        assert figure.shape == (shape[0], 1, *shape[2:])
        assert 0 <= figure.min() and figure.max() <= 1


def test_resumed_run_takes_the_same_steps(frames, tmp_path):
    whole, start = trained(frames, 6), trained(frames, 6, take=3)
    start.save(tmp_path / "state.safetensors")
    resumed = trained(frames, 6, take=0)
    resumed.restore(tmp_path / "state.safetensors")
    assert resumed.steps_done == 3
    for _ in range(3):
        resumed.step()
    for name in ("encoder", "decoder"):
        ours, theirs = (t.averaged[name].state_dict() for t in (resumed, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert torch.equal(resumed.scale.std, whole.scale.std)


def test_state_of_another_training_is_refused(frames, tmp_path):
    trained(frames, 2, take=1).save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="another model or of other data"):
        trained(frames[:4], 2, take=0).restore(tmp_path / "state.safetensors")


def test_exported_folder_holds_the_averaged_weights_and_the_statistics(frames, tmp_path):
    training = trained(frames, 150)
    training.export(tmp_path / "checkpoint")
    config, state, mean, std = read_autoencoder(tmp_path / "checkpoint")
    assert config == SMALL
    module = Autoencoder(config, Decoder(config), Encoder(config))
    module.load_state_dict({key: value.float() for key, value in state.items()})
    pictures = frames[..., :3]
    x = pixels_to_network(pictures).contiguous()
    with torch.no_grad():
        z = module.encode(x)
        y = network_to_pixels(module.decode(z))
        moments = module.encoder.moments(x)
    normal = (z - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert normal.mean((0, 2, 3)).abs().max() < 0.02
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 0.02
    constant = pictures.float().mean((0, 1, 2)).byte().expand_as(pictures)
    assert psnr(y, pictures).mean() > psnr(constant, pictures).mean() + 1
    # the log-variance is that of noise of a tenth
    expected = 2 * (0.1 * torch.tensor(std)).log()
    assert torch.allclose(moments[:, 4:].mean((0, 2, 3)), expected, atol=5e-3)
    assert moments[:, 4:].std((0, 2, 3)).max() < 1e-4


def test_training_starts_from_an_exported_folder(frames, tmp_path):
    first = trained(frames, 10)
    first.export(tmp_path / "checkpoint")
    second = trained(frames, 10, take=0)
    assert second.warm_start(tmp_path / "checkpoint") == []
    weight = first.averaged["decoder"].conv_in.weight
    assert torch.allclose(second.networks["decoder"].conv_in.weight, weight, atol=1e-3)
    other = AutoencoderTraining(TrainingOptions(**OPTIONS), frame_pool_of(64), config=CONFIG)
    with pytest.raises(ValueError, match="holds another autoencoder"):
        other.warm_start(tmp_path / "checkpoint")


def test_kept_encoder_and_its_latents_stay_as_they_are(frames, tmp_path):
    trained(frames, 20).export(tmp_path / "first")
    options = TrainingOptions(steps=8, **OPTIONS)
    second = AutoencoderTraining(options, frames, config=SMALL, keep_encoder=True)
    second.warm_start(tmp_path / "first")
    for _ in range(4):
        second.step()
    second.save(tmp_path / "state.safetensors")
    resumed = AutoencoderTraining(options, frames, config=SMALL, keep_encoder=True)
    resumed.restore(tmp_path / "state.safetensors")
    for training in (second, resumed):
        for _ in range(4):
            training.step()
        training.export(tmp_path / "second")
        before, after = (read_autoencoder(tmp_path / name) for name in ("first", "second"))
        for theirs, ours in zip(before[2:], after[2:], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        changed = {key for key in before[1] if not torch.equal(before[1][key], after[1][key])}
        assert changed
        assert all(key.startswith("decoder.") for key in changed)
    ours, theirs = (t.averaged["decoder"].state_dict() for t in (resumed, second))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def frame_pool_of(size):
    return torch.zeros(1, size, size, 4, dtype=torch.uint8)


def test_errors_on_the_figure_weigh_more():
    y = torch.zeros(1, 3, 32, 32)
    figure = torch.zeros(1, 1, 32, 32)
    figure[..., 8:16, 8:16] = 1
    on, off = y.clone(), y.clone()
    on[..., 10:14, 10:14], off[..., 24:28, 24:28] = 1, 1
    assert torch.allclose(_error(on, y, figure), 4 * _error(off, y, figure))
    assert torch.allclose(_error(on, y, 0 * figure), _error(off, y, 0 * figure))


def test_samples_are_a_picture_of_frames_and_what_becomes_of_them(frames, tmp_path):
    from PIL import Image

    trained(frames, 2).write_samples(tmp_path / "samples.png")
    picture = np.asarray(Image.open(tmp_path / "samples.png"))
    assert picture.shape == (2 * 33 - 1, 8 * 33 - 1, 3)
    assert np.array_equal(picture[:32, :32], frames[0, ..., :3].numpy())


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(2, 32, 32, 4), torch.zeros(0, 32, 32, 4, dtype=torch.uint8)]
    + [torch.zeros(2, 40, 32, 4, dtype=torch.uint8)],
)
def test_frames_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=r"expected (uint8 )?frames"):
        AutoencoderTraining(TrainingOptions(), bad, config=SMALL)


# -- the pool of frames ----------------------------------------------------------------------------


def test_pool_is_kept_and_found_again(tmp_path):
    done = []
    arguments = {"num_scenes": 2, "seed": 1, "size": 16, "device": torch.device("cpu")}
    file = tmp_path / "cache" / "frames.npy"
    kept = frame_pool(**arguments, file=file, progress=done.append)
    assert kept.shape == (6, 16, 16, 4) and sum(done) == 2
    assert torch.equal(frame_pool(**arguments, file=file, progress=done.append), kept)
    assert sum(done) == 2
    assert torch.equal(frame_pool(**arguments), kept)


def test_damaged_or_foreign_pools_are_refused(tmp_path):
    arguments = {"num_scenes": 2, "seed": 1, "size": 16, "device": torch.device("cpu")}
    file = tmp_path / "frames.npy"
    np.save(file, np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected uint8 \(6, 16, 16, 4\): remove it"):
        frame_pool(**arguments, file=file)
    os.truncate(file, 50)
    with pytest.raises(ValueError, match=r"is no complete \.npy file"):
        frame_pool(**arguments, file=file)


def test_psnr_of_one_step_of_255():
    x = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    assert torch.allclose(psnr(x, x + 1), torch.full((2,), 48.1308), atol=1e-3)
