"""training/captured.py without a GPU: the steps of a graph are the plain ones, and could be its.

Three stand-ins: a stub of torch.cuda, whose graphs run on the CPU; a watch over the ops of whole
steps on the CPU, gradients and all; and fake CUDA tensors, which tell host from device, for the
losses and for the update (autograd's engine refuses them).
"""

from dataclasses import replace
from functools import partial

import fake_cuda
import numpy as np
import pytest
import torch
from conftest import save_tiny, tiny_config, tiny_video_config
from fake_training import adamw_on_cuda, on_fake_cuda
from few_step_models import GUIDANCE
from latent_models import latent_config
from published_images import SIDE, WIDTH, image_networks, save_images
from seeded import normal
from stub_cuda import StubCuda
from test_latent_training import SHAPE
from test_training import FAST, assert_equal_states, random_clips, state_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from vfengine.cli.flags import UsageError
from vfengine.cli.train_settings import read_settings
from vfengine.cli.train_team import execution_of
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.training.batch import Latents
from vfengine.training.captured import ScheduleOnDevice, StaticBatch
from vfengine.training.distillation import Distillation, Teacher, distilled_config
from vfengine.training.lora import LoraTrainer
from vfengine.training.options import TrainingOptions
from vfengine.training.published import PublishedParts
from vfengine.training.recipes import latent_model
from vfengine.training.team import Execution, Team
from vfengine.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 5
# fp32 holds each rate exactly, so that a tensor of it is the same number
EXACT = {**FAST, "learning_rate": 2.0**-9, "warmup": 1}
KINDS = ("decomposed", "vdm", "latents", "residual", "lora", "two parts", "checkpoints")
KINDS += ("published",)


def some_latents() -> Latents:
    """Six clips of `latent_config`, with captions, figures and further base frames."""
    null, figure = normal(8, 16, seed=3).half(), normal(6, 4, 1, 8, 8, seed=4).sigmoid().half()
    clips, captions = normal(6, 4, 4, 8, 8).half(), normal(6, 2, 8, 16, seed=2).half()
    images = Latents(clips[:, 2:3], captions, null, figure[:, 2:3])
    return Latents(clips, captions, null, figure, images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose weights are all random."""
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", base_path="clean")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A tiny published text-to-image model."""
    return save_images(tmp_path_factory.mktemp("images"), image_networks())


def on_published(folder, options: TrainingOptions) -> Trainer:
    """A residual network, that follows a published base network on some clips."""
    options = replace(options, train="residual", clean_share=0.5, extra_images=0)
    clips, captions = normal(6, 4, 4, SIDE, SIDE).half(), normal(6, 2, 7, WIDTH, seed=2).half()
    latents = Latents(clips, captions, normal(7, WIDTH, seed=3).half())
    shape = replace(SHAPE, size=2 * SIDE, num_frames=4, base_channels=None)
    parts = PublishedParts.read(folder, False)
    config = latent_model(shape, parts, {"walk": "a walk"}, 0.6)
    return Trainer(config, options, latents, parts=parts)


@pytest.fixture
def new_trainer(folder, images):
    def make(kind: str = "decomposed", **options) -> Trainer:
        execution = Execution()
        if kind == "residual":
            options = {"train": "residual", "clean_share": 1.0, **options}
        if kind == "latents":
            options = {"cell_weight": 3.0, "timestep_shift": 0.6, **options}
        options = TrainingOptions(**{**EXACT, "class_dropout": 0.3, **options})
        if kind == "lora":
            config = tiny_config(base_path="clean")
            return LoraTrainer(folder, config, 2, options, *random_clips())
        if kind == "published":
            return on_published(images, options)
        if kind == "latents":
            return Trainer(latent_config(), options, some_latents())
        if kind == "two parts":
            execution = Execution(accumulate=2)
        if kind == "checkpoints":
            execution = Execution(checkpoint_activations=True)
        config = tiny_video_config() if kind == "vdm" else tiny_config()
        return Trainer(config, options, *random_clips(), execution=execution)

    return make


@pytest.fixture
def stub(monkeypatch):
    return StubCuda(monkeypatch, captures_run=False)


def captured(trainer: Trainer) -> Trainer:
    """The trainer, which takes its CPU for a GPU from now on."""
    trainer._captured = trainer._capture()
    return trainer


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "fp32") for kind in KINDS), ("decomposed", "bf16")]
)
def test_captured_steps_are_the_plain_ones(kind, precision, new_trainer, stub, tmp_path):
    """Bit for bit, where fp32 holds the learning rate: losses, weights, averages and moments."""
    plain, ours = (new_trainer(kind, precision=precision) for _ in range(2))
    ours = captured(ours)
    for _ in range(STEPS):
        assert repr(ours.step()) == repr(plain.step())
    assert stub.calls.count("captured") == 1
    assert stub.calls.count("replay") == STEPS - 2  # the first two are plain
    assert not stub.problems
    ours.save(tmp_path / "ours"), plain.save(tmp_path / "plain")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "plain").read_bytes()


def test_captured_rates_are_rounded_to_fp32(new_trainer, stub):
    """At the usual rates: losses are as near as that lets them be."""
    rates = {"learning_rate": 8e-4, "warmup": 3, "steps": 8}
    plain, ours = new_trainer(**rates), captured(new_trainer(**rates))
    for _ in range(8):
        expected, found = plain.step().losses, ours.step().losses
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-6)


def test_captured_steps_resume_and_are_resumed(new_trainer, stub, tmp_path):
    whole, first = captured(new_trainer()), captured(new_trainer())
    for _ in range(4):
        whole.step(), first.step()
    first.save(tmp_path / "state")
    plain, again = new_trainer(), captured(new_trainer())
    for trainer in (plain, again):
        trainer.restore(tmp_path / "state")
    for _ in range(4):
        report = repr(whole.step())
        assert repr(plain.step()) == repr(again.step()) == report
    states = [state_of(t, tmp_path / "all") for t in (whole, plain, again)]
    assert_equal_states(states[0], states[1])
    assert_equal_states(states[0], states[2])


def test_a_state_restored_under_a_graph_is_gone_on_from(new_trainer, stub, tmp_path):
    """It holds the memory that the graph reads; a batch that was drawn ahead is left."""
    trainer = captured(new_trainer())
    trainer.save(tmp_path / "state")
    reports = [repr(trainer.step()) for _ in range(STEPS)]
    trainer.restore(tmp_path / "state")
    assert [repr(trainer.step()) for _ in range(STEPS)] == reports
    assert stub.calls.count("captured") == 1


def test_what_a_captured_step_tells_is_the_callers(new_trainer, stub):
    trainer = captured(new_trainer())
    told = []
    for step in range(STEPS):
        trainer.updates.set_rates(step)
        told.append(trainer._captured(step))
    kept = [values.clone() for values in told]
    trainer.updates.set_rates(STEPS)
    trainer._captured(STEPS)
    assert all(map(torch.equal, told, kept))


def test_a_batch_is_drawn_while_the_step_before_runs(new_trainer, stub, monkeypatch):
    """Once each, on a stream of its own, up to the last step."""
    trainer, order = new_trainer(steps=STEPS), []
    draw = trainer.batch_sampler

    def watched(step, number=0):
        order.append((step, stub.here()))
        return draw(step, number)

    trainer.batch_sampler = watched
    trainer = captured(trainer)
    for _ in range(STEPS):
        trainer.step()
        order.append("stepped")
    steps = [entry for entry in order if entry != "stepped"]
    assert [step for step, _ in steps] == list(range(STEPS))
    assert len({stream for _, stream in steps[1:]}) == 1
    assert steps[1][1] != steps[0][1] == "main"
    assert order[0] == steps[0] and order[1] == steps[1] and order[-1] == "stepped"


def test_a_step_that_cannot_be_captured_raises(new_trainer, monkeypatch):
    stub = StubCuda(monkeypatch, capture_fails=True, captures_run=False)
    trainer = captured(new_trainer())
    for _ in range(2):
        trainer.step()
    with pytest.raises(RuntimeError, match="cannot be captured"):
        trainer.step()
    assert "replay" not in stub.calls


def test_draws_must_be_those_of_the_first_step(new_trainer):
    trainer = new_trainer()
    batch = StaticBatch((0, 1), CPU)
    batch.record(trainer.batch_sampler(0))
    first = batch.timesteps(3), batch.normal((3, 2))
    batch.rewind()
    batch.load(batch.draw(trainer.batch_sampler(1)))
    again = batch.timesteps(3), batch.normal((3, 2))
    plain = trainer.batch_sampler(1)
    for buffer, later in zip(first, again, strict=True):
        assert later is buffer
    assert torch.equal(again[0], plain.timesteps(3)) and torch.equal(again[1], plain.normal((3, 2)))
    with pytest.raises(RuntimeError, match=r"a later step draws uniform\(2,\)"):
        batch.uniform(2)
    batch.rewind()
    with pytest.raises(RuntimeError, match=r"a later step draws timesteps\(4,\)"):
        batch.timesteps(4)


def test_schedule_on_a_device_has_the_bits_of_the_schedule():
    schedule = NoiseSchedule.cosine()
    ours, t = ScheduleOnDevice(schedule, CPU), torch.arange(1000)
    assert ours == schedule and ours.to_dict() == schedule.to_dict()
    for like in (torch.zeros(1000, 2, 3), torch.zeros(1000, dtype=torch.float64)):
        for found, expected in zip(
            ours.signal_and_noise(t, like), schedule.signal_and_noise(t, like), strict=True
        ):
            assert torch.equal(found, expected) and found.dtype == expected.dtype


# -- what a graph would replay ---------------------------------------------------------------------


class Reads(fake_cuda.Audit):
    """Also finds tensors that a step reads and has neither made nor been given.

    given: those that stay where they are
    """

    def __init__(self, given):
        super().__init__()
        self.kept = list(given)  # so that no memory is used twice
        self.known = set(fake_cuda.storages(self.kept))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if unknown := set(fake_cuda.storages(leaves)) - self.known:
            self.problems.append(f"{op}: reads {len(unknown)} tensors from outside")
        out = super().__torch_dispatch__(op, types, args, kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.kept += made
        self.known |= set(fake_cuda.storages(made))
        return out


def statics(trainer: Trainer) -> list[torch.Tensor]:
    """All that lives across steps and stays where it is."""
    updates, objective = trainer.updates, trainer.objective
    held = [*updates.parameters, *updates.averages, updates._rate, updates._share]
    held += [x for state in updates.optimizer.state.values() for x in state.values()]
    held += [x for net in trainer.networks.values() for x in (*net.parameters(), *net.buffers())]
    held += [x for batch in trainer._captured._batches for x in batch.buffers]
    return [*held, objective.schedule._table]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "residual"])
def test_every_step_runs_the_same_ops_on_what_stays(kind, new_trainer, stub):
    """Losses, gradients, clipping, AdamW and averages; no number of the host differs."""
    trainer = captured(new_trainer(kind, learning_rate=8e-4, warmup=50, precision="bf16"))
    for _ in range(2):
        trainer.step()
    given, runs = statics(trainer), []
    for step in (2, 3):
        trainer.updates.set_rates(step)
        trainer._captured._load(step)
        before = [x.clone() for batch in trainer._captured._batches for x in batch.buffers]
        with Reads(given) as run:
            trainer._captured._run()
        runs.append(run)
        after = [x for batch in trainer._captured._batches for x in batch.buffers]
        assert all(map(torch.equal, before, after))  # a step leaves its batch as it was
    for run in runs:
        # on a CPU AdamW reads its rate, where CUDA's kernel is given its address
        rates = [op for op in run.ops if op == "aten._local_scalar_dense.default"]
        problems = [p for p in run.problems if "_local_scalar_dense" not in p]
        assert not problems and len(rates) <= 1, problems
        assert run.ops == runs[0].ops and len(run.ops) > 300
        assert run.constants == runs[0].constants
    assert "aten._fused_adamw_.tensor_lr" in runs[0].ops


def test_rates_as_numbers_would_be_found(new_trainer, stub):
    trainer = captured(new_trainer(learning_rate=8e-4, warmup=50))
    for _ in range(2):
        trainer.step()
    given, runs = statics(trainer), []
    trainer.updates._rate = None
    for step in (2, 3):
        trainer.updates.set_rates(step)
        trainer._captured._load(step)
        with Reads(given) as run:
            trainer._captured._run()
        runs.append(run)
    assert runs[0].ops == runs[1].ops and runs[0].constants != runs[1].constants


def test_a_tensor_from_outside_would_be_found(new_trainer, stub):
    trainer = captured(new_trainer())
    trainer.step()
    with Reads(statics(trainer)[:-1]) as run:  # all but the schedule's table
        trainer._captured._load(1)
        trainer._captured._run()
    assert any("from outside" in problem for problem in run.problems)


@pytest.fixture(scope="module")
def cuda_guard(tmp_path_factory):
    remove = fake_cuda.install(tmp_path_factory.mktemp("fake_cuda"))
    yield
    remove()


@pytest.mark.parametrize("kind", ["decomposed", "vdm", "latents", "lora"])
def test_losses_and_update_neither_wait_nor_copy(kind, new_trainer, stub, cuda_guard, monkeypatch):
    trainer = captured(new_trainer(kind, precision="fp32"))
    trainer.step()
    on_fake_cuda(trainer, FakeTensorMode())
    monkeypatch.setattr(torch, "_fused_adamw_", adamw_on_cuda)
    updates = trainer.updates

    def step() -> None:
        for batch in trainer._captured._batches:
            losses = trainer._losses(batch)
            trainer._told(losses)
            batch.rewind()
        for weight in updates.parameters:
            weight.grad = torch.zeros_like(weight)
        updates.descend()

    named = {f"weight {i}": weight for i, weight in enumerate(updates.parameters)}
    named |= {f"average {i}": average for i, average in enumerate(updates.averages)}
    report = fake_cuda.audit(step, {**named, "rate": updates._rate, "share": updates._share})
    assert report.clean, report.problems
    assert len(report.ops[0]) > 300


def test_timesteps_of_the_host_would_be_found(new_trainer, stub, cuda_guard):
    trainer = captured(new_trainer(precision="fp32"))
    trainer.step()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_fake_cuda(trainer, mode)
    (batch,) = trainer._captured._batches
    number = [name for name, _ in batch._calls].index("timesteps")
    batch._buffers[number] = (torch.zeros(2, dtype=torch.int64),)

    def losses() -> None:
        batch.rewind()
        trainer._losses(batch)

    report = fake_cuda.audit(losses, {"rate": trainer.updates._rate})
    assert any("aten._local_scalar_dense" in problem for problem in report.problems), report


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--capture needs --device cuda, got cpu"),
        (["--device", "cpu"], "--capture needs --device cuda, got cpu"),
        (["--objective", "autoencoder"], "--capture has no meaning for --objective autoencoder"),
        (["--objective", "text"], "--capture has no meaning for --objective text"),
        (["--objective", "distill", "--from", "x"], "--capture has no meaning for .* distill"),
    ],
)
def test_capture_is_refused_beside_other_flags(flags, words):
    with pytest.raises(UsageError, match=words):
        read_settings(["--output", "x", "--capture", *flags])


@pytest.mark.parametrize("flags", [[], ["--objective", "vdm"], ["--accumulate", "2"]])
def test_capture_is_an_execution(flags):
    settings = read_settings(["--output", "x", "--capture", "--device", "cuda:1", *flags])
    assert execution_of(settings, Team()).capture
    assert not execution_of(read_settings(["--output", "x"]), Team()).capture


def test_capture_is_refused_where_it_cannot_be(folder, monkeypatch):
    options, capture = TrainingOptions(**FAST), Execution(capture=True)
    with pytest.raises(ValueError, match="capture needs a CUDA device, got cpu"):
        Trainer(tiny_config(), options, *random_clips(), execution=capture)
    team = Team()
    team.size = 2
    with pytest.raises(ValueError, match="capture is of one process, got 2"):
        Execution(team, capture=True).check(options)
    with pytest.raises(ValueError, match="capture cannot go with compile"):
        Execution(capture=True, compile=True).check(options)
    options = TrainingOptions(**FAST, teacher_steps=8, clean_share=1.0)
    teacher = Teacher(folder, 8)
    config = distilled_config(teacher.config, ("base", "residual"), 4, GUIDANCE)
    student = Trainer(
        config, options, *random_clips(), objective=partial(Distillation, teacher=teacher)
    )
    student.device = torch.device("cuda", 0)
    with pytest.raises(ValueError, match="a step of Distillation cannot be captured"):
        student._check_capture()
