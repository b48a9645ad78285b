"""training/trainer.py, objectives.py and batch.py: it learns, it repeats, it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file

from vfengine.files import open_tensors
from vfengine.training.batch import BatchSampler
from vfengine.training.options import TrainingOptions
from vfengine.training.trainer import Trainer

FAST = {"steps": 100, "batch_size": 2, "extra_images": 2, "warmup": 2, "precision": "fp32"}


def random_clips(count: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise as clips that fit `tiny_config`, and labels."""
    rng = np.random.default_rng(seed)
    clips = rng.integers(0, 256, (count, 4, 16, 16, 3), dtype=np.uint8)
    return clips, np.arange(count, dtype=np.int64) % 3


def new_trainer(config=None, clips=None, **options) -> Trainer:
    options = TrainingOptions(**{**FAST, **options})
    return Trainer(config or tiny_config(), options, *(clips or random_clips()))


def model_named_by(trainer: Trainer, file: Path) -> str:
    """As the state's file names the model that it is of."""
    trainer.save(file)
    with open_tensors(file) as state:
        return state.metadata()["model"]


def state_of(trainer: Trainer, file: Path) -> dict[str, torch.Tensor]:
    """Everything the trainer goes on from: weights, averages and what Adam keeps."""
    trainer.save(file)
    return load_file(file)


def assert_equal_states(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    kinds = {key.split(".")[0] for key in first}
    assert kinds == {"parameter", "average", "exp_avg", "exp_avg_sq", "step"}
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


# -- a step ----------------------------------------------------------------------------------------


def test_loss_falls_when_overfitting_one_clip():
    clip = np.full((1, 4, 16, 16, 3), 40, np.uint8)
    for i in range(4):
        clip[0, i, 4:10, 2 * i + 1 : 2 * i + 7] = (220, 120, 60)  # a square that moves
    options = {"steps": 50, "batch_size": 4, "extra_images": 4, "learning_rate": 5e-3}
    trainer = new_trainer(clips=(clip, np.zeros(1, np.int64)), **options)
    reports = [trainer.step() for _ in range(50)]
    for name in ("base", "residual"):
        losses = [report.losses[name] for report in reports]
        assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:10]), name


def test_same_seed_gives_bitwise_equal_trainers(tmp_path):
    first, second, other = new_trainer(seed=3), new_trainer(seed=3), new_trainer(seed=4)
    torch.manual_seed(99)  # the trainers' randomness is their own
    for _ in range(3):
        report = first.step()
        assert repr(second.step()) == repr(report)
        assert repr(other.step()) != repr(report)
    states = [state_of(trainer, tmp_path / "state") for trainer in (first, second, other)]
    assert_equal_states(states[0], states[1])
    assert not torch.equal(states[0]["parameter.0"], states[2]["parameter.0"])


def test_average_follows_its_formula():
    trainer = new_trainer(ema=0.25)
    for k in range(3):
        before = [average.clone() for average in trainer.averages]
        trainer.step()
        decay = min(0.25, (k + 1) / (k + 10))  # 0.1, 0.18, 0.25
        for old, new, weight in zip(before, trainer.averages, trainer.parameters, strict=True):
            expected = decay * old.double() + (1 - decay) * weight.detach().double()
            torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-7)


def test_optimizer_takes_the_learning_rate_of_its_step():
    trainer = new_trainer(warmup=4, learning_rate=1e-3)
    seen = []
    for _ in range(3):
        trainer.step()
        seen.append(trainer.optimizer.param_groups[0]["lr"])
    np.testing.assert_allclose(seen, [2.5e-4, 5e-4, 7.5e-4])


def test_losses_are_reported_by_fifths_of_the_schedule():
    trainer = new_trainer(batch_size=1, extra_images=0)
    losses = trainer.losses(0)
    report = trainer.step()
    assert list(losses) == ["base", "residual"]
    assert int(losses["base"][1]) == int(losses["residual"][1])
    for name, (loss, t) in losses.items():
        fifth, by_t = int(t) // 200, report.by_t[name]
        assert report.losses[name] == by_t[fifth] == float(loss.detach())
        assert [i for i in range(5) if not np.isnan(by_t[i])] == [fifth]


def test_extra_images_are_for_the_base_network_alone():
    trainer = new_trainer(batch_size=2, extra_images=3)
    counts = {"base": 5, "residual": 2}
    for name, (loss, t) in trainer.losses(0).items():
        assert len(loss) == len(t) == counts[name]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_class_dropout_gives_the_null_class(share):
    trainer = new_trainer(batch_size=4, class_dropout=share)
    seen = []
    for network in trainer.networks.values():
        network.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
        )
    trainer.losses(0)
    assert sorted(map(len, seen)) == [4, 6]  # of clips; and of them and further base frames
    for labels in seen:
        assert ((labels == trainer.config.null_class) == bool(share)).all()


def losses_with_residual_input(trainer: Trainer, monkeypatch):
    """Clips x, jitter, t, z' as the residual network sees it, and the residual loss, of step 0."""
    seen = {}

    def record(owner, name):
        function = getattr(owner, name)

        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.setdefault(name, result)  # of the first call
            return result

        monkeypatch.setattr(owner, name, recorded)

    record(BatchSampler, "clips")
    record(trainer.objective, "_jitter")
    residual = trainer.networks["residual"]
    residual.register_forward_pre_hook(lambda _, args: seen.update(z=args[0], t=args[1]))
    loss, _ = trainer.losses(0)["residual"]
    return seen["clips"][0], seen["_jitter"], seen["t"], seen["z"], loss


@pytest.mark.parametrize("base_jitter", [0.0, 0.1])
def test_exact_clips_show_the_jittered_base_frame(base_jitter, monkeypatch):
    trainer = new_trainer(batch_size=4, clean_share=1.0, base_jitter=base_jitter)
    x, jitter, t, z, loss = losses_with_residual_input(trainer, monkeypatch)
    signal = trainer.objective.schedule.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(z[:, 2].double(), signal * (x[:, 2] + jitter), rtol=1e-5, atol=1e-5)
    std = jitter.flatten(1).std(1)
    assert bool((std <= 1.1 * base_jitter).all())
    assert bool((std > 0).all()) == (base_jitter > 0)
    loss.mean().backward()
    assert all(parameter.grad is None for parameter in trainer.networks["base"].parameters())
    assert any(parameter.grad.any() for parameter in trainer.networks["residual"].parameters())


def test_other_clips_show_the_estimate_of_the_base_network(monkeypatch):
    trainer = new_trainer(batch_size=4, clean_share=0.0, base_jitter=0.1)
    estimates = []
    trainer.networks["base"].register_forward_hook(
        lambda _, args, out: estimates.append((args[0], out))
    )
    _, jitter, t, z, loss = losses_with_residual_input(trainer, monkeypatch)
    noisy, b_hat = (of_all[:4] for of_all in estimates[0])  # further base frames come after
    assert not jitter.any()
    noise = (1 - trainer.objective.schedule.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(
        z[:, 2].double(), noisy - noise * b_hat.detach(), rtol=1e-5, atol=1e-5
    )
    loss.mean().backward()  # sg[b̂]
    assert all(parameter.grad is None for parameter in trainer.networks["base"].parameters())


def test_clean_share_is_the_share_of_exact_clips(monkeypatch):
    trainer = new_trainer(batch_size=64, extra_images=0, clean_share=0.75)
    _, jitter, _, _, _ = losses_with_residual_input(trainer, monkeypatch)
    exact = jitter.flatten(1).any(1).float().mean()
    assert 0.6 < float(exact) < 0.9


# -- what is refused -------------------------------------------------------------------------------


def test_trainer_refuses_clips_that_do_not_fit():
    clips, labels = random_clips()
    with pytest.raises(ValueError, match="expected uint8 clips"):
        new_trainer(clips=(clips[:, :3], labels))
    with pytest.raises(ValueError, match="expected uint8 clips"):
        new_trainer(clips=(clips.astype(np.float32), labels))
    with pytest.raises(ValueError, match="at least one clip"):
        new_trainer(clips=(clips[:0], labels[:0]))
    for wrong in (labels[:-1], labels + 1, labels - 1):
        with pytest.raises(ValueError, match=r"expected 6 labels in 0\.\.2"):
            new_trainer(clips=(clips, wrong))


def test_loss_that_is_not_finite_stops_the_training():
    trainer = new_trainer()
    with torch.no_grad():
        trainer.parameters[0].fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        trainer.step()


def test_a_residual_network_alone_is_shown_on_frames_that_its_base_network_draws(tmp_path):
    trainer = new_trainer(train="residual", clean_share=1.0)
    trainer.write_samples(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0
