"""training/trainer.py and vfengine/train.py: it learns, it repeats, it goes on where it was."""

import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ON_CPU, tiny_config
from PIL import Image
from safetensors.torch import load_file

from vfengine.cli import train
from vfengine.formats.checkpoint import load_base, read_config
from vfengine.media.video import write_video
from vfengine.pipelines.videofusion import VideoFusionPipeline
from vfengine.training import objectives
from vfengine.training.trainer import Trainer, TrainingOptions

FAST = {"steps": 100, "batch_size": 2, "extra_images": 2, "warmup": 2, "precision": "fp32"}


def random_clips(count: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise as clips that fit `tiny_config`, and labels."""
    rng = np.random.default_rng(seed)
    clips = rng.integers(0, 256, (count, 4, 16, 16, 3), dtype=np.uint8)
    return clips, np.arange(count, dtype=np.int64) % 3


def new_trainer(config=None, clips=None, **options) -> Trainer:
    options = TrainingOptions(**{**FAST, **options})
    return Trainer(config or tiny_config(), options, *(clips or random_clips()))


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


def test_learning_rate_rises_stays_and_falls():
    options = TrainingOptions(steps=100, warmup=10, decay=0.5, learning_rate=1e-3)
    rates = [options.learning_rate_at(step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 1e-4 * np.arange(1, 11))
    np.testing.assert_allclose(rates[9:51], 1e-3)
    np.testing.assert_allclose(rates[50:], 1e-3 * np.arange(50, 0, -1) / 50)
    level = TrainingOptions(steps=3, warmup=0, decay=0.0, learning_rate=1e-3)
    assert [level.learning_rate_at(step) for step in range(3)] == [1e-3] * 3


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
    assert len(seen) == 3
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

    record(objectives.Draw, "clips")
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
    noisy, b_hat = estimates[0]
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


# -- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop", [0, 2])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, precision, stop):
    whole, first = new_trainer(precision=precision), new_trainer(precision=precision)
    for _ in range(stop):
        whole.step()
        first.step()
    first.save(tmp_path / "state")
    resumed = new_trainer(precision=precision)
    resumed.restore(tmp_path / "state")
    assert resumed.steps_done == stop
    for _ in range(2):
        assert repr(resumed.step()) == repr(whole.step())
    assert_equal_states(state_of(resumed, tmp_path / "a"), state_of(whole, tmp_path / "b"))


def test_states_name_their_model_as_ever():
    """Without what configurations have gained since: an unfinished training still goes on."""
    trainer = new_trainer(clean_share=0.5)
    assert trainer.config.clean_share == 0.5
    assert trainer._identity() == "60ba0559c4e575b9"


def test_state_of_another_model_is_refused(tmp_path):
    new_trainer().save(tmp_path / "state")
    others = {
        "network": new_trainer(config=tiny_config(lam=0.3)),
        "data": new_trainer(clips=random_clips(5)),
        "seed": new_trainer(seed=1),
    }
    for trainer in others.values():
        before = [parameter.clone() for parameter in trainer.parameters]
        with pytest.raises(ValueError, match="state is the training state of another model"):
            trainer.restore(tmp_path / "state")
        assert trainer.steps_done == 0
        assert all(map(torch.equal, before, trainer.parameters))


def test_truncated_state_is_refused(tmp_path):
    trainer, file = new_trainer(), tmp_path / "state"
    trainer.save(file)
    for length in (file.stat().st_size - 1, 1000, 4, 0):
        os.truncate(file, length)
        with pytest.raises(ValueError, match="state is not a complete training state"):
            trainer.restore(file)
    with pytest.raises(FileNotFoundError):
        trainer.restore(tmp_path / "nowhere")


def test_interrupted_save_leaves_the_old_state(tmp_path, monkeypatch):
    trainer, file = new_trainer(), tmp_path / "state"
    trainer.save(file)
    before = file.read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_state_obeys_the_umask(tmp_path):
    trainer = new_trainer()
    umask = os.umask(0o027)
    try:
        trainer.save(tmp_path / "state")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o640


def test_export_writes_the_averaged_weights(tmp_path):
    trainer = new_trainer(ema=0.9)
    trainer.step()
    config = trainer.export(tmp_path / "model")
    exported = load_base(tmp_path / "model", config).unet.state_dict()
    for key, value in trainer.averaged["base"].unet.state_dict().items():
        assert torch.equal(exported[key], value.half().float()), key


def test_export_records_the_clean_share(tmp_path):
    for share in (0.0, 0.75):
        config = new_trainer(clean_share=share).export(tmp_path / "model")
        assert config == read_config(tmp_path / "model")
        assert (config.clean_share, config.animates_pictures) == (share, share > 0)


def test_warm_start_takes_the_weights_that_fit(tmp_path):
    source = new_trainer(ema=0.9)
    source.step()
    source.export(tmp_path / "model")
    same = new_trainer(seed=1)
    assert same.warm_start(tmp_path / "model") == []
    for averages in (same.averages, same.parameters):
        for ours, theirs in zip(averages, source.averages, strict=True):
            assert torch.equal(ours, theirs.half().float())
    config = tiny_config()
    deeper = replace(config.residual, layers_per_block=(1, 2))
    other = new_trainer(config=replace(config, residual=deeper), seed=1)
    fresh = other.warm_start(tmp_path / "model")
    assert fresh and all(name.startswith("residual.") for name in fresh)
    assert not any("conv_in" in name for name in fresh)
    assert torch.equal(
        other.networks["residual"].unet.conv_in.weight,
        source.averaged["residual"].unet.conv_in.weight.half().float(),
    )


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("extra_images", -1),
        ("warmup", -1),
        ("decay", 1.5),
        ("ema", -0.1),
        ("class_dropout", 1.01),
        ("clean_share", float("nan")),
        ("learning_rate", -1e-3),
        ("weight_decay", -0.1),
        ("gradient_clip", 0.0),
        ("base_jitter", -0.1),
        ("precision", "fp16"),
        ("seed", -1),
    ],
)
def test_option_out_of_range_is_refused(option, value):
    with pytest.raises(ValueError, match=option):
        TrainingOptions(**{option: value})


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


# -- the command -----------------------------------------------------------------------------------

SHAPE = [
    *("--num-frames", "4", "--size", "16", "--patch-size", "2", "--layers-per-block", "1,1"),
    *("--base-channels", "16,16", "--residual-channels", "16,16", "--precision", "fp32"),
]
SCHEDULE = [
    *("--steps", "4", "--batch-size", "2", "--extra-images", "2", "--warmup", "1"),
    *("--save-every", "2", "--log-every", "2", "--sample-every", "4"),
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder of two classes with two short videos each."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (folder / name).mkdir()
        for i in range(2):
            frames = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
            write_video(folder / name / f"{i}.webp", frames)
    return folder


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory) -> Path:
    """The output of a complete run."""
    output = tmp_path_factory.mktemp("runs") / "trained"
    assert train.main(["--data", str(videos), "--output", str(output), *SHAPE, *SCHEDULE]) == 0
    return output


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, hidden ones too, with what the files hold."""
    paths = folder.rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def weights_of(output: Path) -> dict[str, str]:
    return read_config(output / "checkpoint").sha256


def test_command_writes_checkpoint_state_log_and_samples(trained):
    assert sorted(contents(trained)) == [
        "checkpoint",
        "checkpoint/base.safetensors",
        "checkpoint/config.json",
        "checkpoint/residual.safetensors",
        "log.jsonl",
        "samples",
        "samples/step-0000004.png",
        "training.safetensors",
    ]
    config = read_config(trained / "checkpoint")
    assert config.labels == ("left", "right")
    assert (config.num_frames, config.height, config.width) == (4, 16, 16)
    sheet = Image.open(trained / "samples" / "step-0000004.png")
    assert sheet.size == (4 * 17 - 1, 2 * 17 - 1)  # a clip a row, a class a row


def test_command_logs_one_json_object_a_line(trained):
    lines = (trained / "log.jsonl").read_text().splitlines()
    start, *logged = map(json.loads, lines)
    assert start["start"] == 0
    assert (start["steps"], start["batch_size"], start["precision"]) == (4, 2, "fp32")
    assert [line["step"] for line in logged] == [2, 4]
    for line in logged:
        assert line["base"] > 0 and line["residual"] > 0 and line["clips_per_second"] > 0
        assert len(line["base_by_t"]) == len(line["residual_by_t"]) == 5


def test_trained_checkpoint_generates(trained):
    pipeline = VideoFusionPipeline.from_pretrained(trained / "checkpoint", **ON_CPU)
    frames = pipeline("left", num_inference_steps=2).frames
    assert frames.shape == (1, 4, 16, 16, 3)
    assert np.isfinite(frames).all()
    assert frames.std() > 0


def test_interrupted_command_resumes_to_the_same_weights(
    videos, trained, tmp_path, monkeypatch, capsys
):
    command = ["--data", str(videos), "--output", str(tmp_path), *SHAPE, *SCHEDULE]
    step = Trainer.step

    def interrupted(trainer):
        if trainer.steps_done == 3:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train.main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert weights_of(tmp_path) != weights_of(trained)
    assert train.main([*command, "--resume"]) == 0
    assert weights_of(tmp_path) == weights_of(trained)
    starts = [json.loads(line).get("start") for line in (tmp_path / "log.jsonl").open()]
    assert [start for start in starts if start is not None] == [0, 2]
    first, second = (load_file(run / "training.safetensors") for run in (trained, tmp_path))
    assert_equal_states(first, second)


def test_resume_goes_on_for_more_steps(videos, trained, tmp_path):
    output = shutil.copytree(trained, tmp_path / "run")
    command = ["--data", str(videos), "--output", str(output), *SHAPE, *SCHEDULE]
    assert train.main([*command, "--resume", "--steps", "6", "--sample-every", "0"]) == 0
    assert weights_of(output) != weights_of(trained)
    assert json.loads((output / "log.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert len(list((output / "samples").iterdir())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "trained"], "training.safetensors exists: pass --resume"),
        (["--output", "new", "--resume"], "nothing to resume"),
        (["--output", "trained", "--resume", "--seed", "5"], "of another model"),
        (["--output", "new", "--data", "nowhere"], "nowhere"),
        (["--output", "new", "--data", "empty"], "empty"),
        (["--output", "new", "--init-from", "nowhere"], "no checkpoint in nowhere"),
        (["--output", "new", "--device", "cuda"], "no CUDA device"),
        (["--output", "new", "--device", "abacus"], "abacus"),
        (["--output", "file"], "file"),
        (["--output", "new", "--steps", "0"], "steps must be at least 1"),
        (["--output", "new", "--steps", "many"], "--steps"),
        (["--output", "new", "--log-every", "0"], "--log-every must be at least 1"),
        (["--output", "new", "--sample-every", "-1"], "--sample-every"),
        (["--output", "new", "--num-frames", "0"], "--num-frames must be at least 1"),
        (["--output", "new", "--size", "18"], "--size must be a multiple of 4"),
        (["--output", "new", "--base-path", "clean", "--clean-share", "0"], "clean_share above 0"),
        (["--output", "new", "--objective", "gan"], "--objective"),
        (["--output", "new", "--lam", "1"], "--lam must be at least 0 and below 1"),
        (["--output", "new", "--fps", "0"], "--fps must be positive"),
        (["--output", "new", "--base-channels", "16"], "one per level"),
        (["--output", "new", "--residual-channels", "16,20"], "multiple of"),
        (["--output", "new", "--base-channels", "wide"], "--base-channels"),
        (["--output", "new", "--colour", "red"], "--colour"),
    ],
)
def test_wrong_usage_ends_in_one_line_and_changes_nothing(
    videos, trained, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(trained, "trained")
    Path("empty").mkdir()
    Path("file").write_text("not a folder")
    before = contents(tmp_path)
    assert train.main(["--data", str(videos), *SHAPE, *SCHEDULE, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vfengine.train: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert contents(tmp_path) == before


def test_missing_output_is_refused(capsys):
    assert train.main([]) == 2
    assert "--output" in capsys.readouterr().err


def test_diverging_training_ends_in_one_line(videos, tmp_path, capsys):
    command = ["--data", str(videos), "--output", str(tmp_path / "run"), *SHAPE, *SCHEDULE]
    assert train.main([*command, "--learning-rate", "1e30", "--gradient-clip", "1e30"]) == 1
    assert "error: the loss is not finite at step" in capsys.readouterr().err.splitlines()[-1]
