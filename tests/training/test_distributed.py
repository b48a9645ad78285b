"""training/team.py and distributed.py: the steps are the same, by however many processes."""

import json

import numpy as np
import pytest
import torch
import train_together
from conftest import save_tiny, tiny_config, tiny_video_config
from safetensors.torch import load_file
from test_training import random_clips
from torchrun import end, start
from train_together import CASES, COUNTS, STEPS, losses, trainer

from vfengine.formats.checkpoint import read_config, read_weights
from vfengine.training.batch import BatchSampler, Latents, Pixels
from vfengine.training.options import TrainingOptions
from vfengine.training.team import Execution, Team, rows_of
from vfengine.training.trainer import Trainer


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder with what two processes did, and what they said of it."""
    folder = tmp_path_factory.mktemp("together")
    save_tiny(folder / "teacher", base_path="clean")
    one = trainer("pixels", folder)
    losses(one, 10)
    one.save(folder / "one.safetensors")
    status, _, err = end(start(train_together.__file__, folder))
    assert status == 0, err
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(together):
    """Losses and states of the same steps by one process; made when they are asked for."""
    folder, _ = together
    made = {}

    def steps(case):
        if case not in made:
            training = trainer(case, folder)
            told = losses(training, COUNTS[case])
            training.save(folder / f"{case}-alone.safetensors")
            made[case] = told, load_file(folder / f"{case}-alone.safetensors")
        return made[case]

    return steps


def assert_same_losses(found, expected):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-5, err_msg=name)


def assert_close_states(found, expected):
    """Adam's steps are of 8e-4: weights whose gradients are rounding errors differ by some 1e-5."""
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(together, alone, case):
    folder, results = together
    told, state = alone(case)
    assert_same_losses(results[case], told)
    assert_close_states(load_file(folder / f"{case}.safetensors"), state)


@pytest.mark.parametrize("case", ["pixels", "shard"])
def test_two_processes_go_on_from_the_state_of_one(together, alone, case):
    folder, results = together
    assert_same_losses(results[f"{case}_resumed"], alone("pixels")[0][10:STEPS])
    config = read_config(folder / f"{case}_checkpoint")
    state = alone("pixels")[1]
    averages = [value for key, value in state.items() if key.startswith("average")]
    weights = [  # whole, and compared with their SHA-256
        weight
        for network in config.networks
        for weight in read_weights(folder / f"{case}_checkpoint", network, config).values()
    ]
    for average in averages:
        assert any(w.shape == average.shape and (w - average).abs().max() < 2e-3 for w in weights)
    assert (folder / f"{case}.png").stat().st_size > 0


@pytest.mark.parametrize("case", ["pixels", "shard"])
def test_one_process_goes_on_from_the_state_of_two(together, case):
    folder, _ = together
    expected, found = trainer(case, folder), trainer(case, folder)
    losses(expected, STEPS)
    found.restore(folder / f"{case}.safetensors")
    assert found.steps_done == STEPS
    assert_same_losses(losses(found, 3), losses(expected, 3))


def test_words_of_a_team(together):
    assert together[1]["words"] == {
        "largest": 10,
        "of_first": "of 0",
        "in_turn": 0,
        "elsewhere": 2,
    }


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 41])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_have_each_row_once(count, parts):
    rows = [list(range(count))[rows_of(count, (k, parts))] for k in range(parts)]
    assert [row for own in rows for row in own] == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def drawn(sampler):
    """All that a step may draw, by name."""
    clips, frames = sampler.clips(5), sampler.clips(7, only_base=True)
    return {
        "clips": clips.x,
        "conditions": clips.condition,
        "frames": frames.x,
        "labels": frames.condition,
        "timesteps": sampler.timesteps(5),
        "normal": sampler.normal((7, 3, 2)),
        "uniform": sampler.uniform(5, 1),
    }


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_parts_draw_the_batch_between_them(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "pixels":
        data = Pixels(*random_clips(), 3)
    else:
        shapes = (6, 4, 2, 3, 3), (6, 2, 5, 8), (5, 8), (9, 1, 2, 3, 3), (9, 2, 5, 8)
        clips, told, null, images, of_images = (
            torch.randn(shape, generator=generator).half() for shape in shapes
        )
        data = Latents(clips, told, null, images=Latents(images, of_images, null))
    how = {"dropout": 0.3, "num_timesteps": 1000, "timestep_shift": 2.0}
    device = torch.device("cpu")
    whole = drawn(BatchSampler(data, (1, 2), **how, device=device))
    parts = [drawn(BatchSampler(data, (1, 2), **how, device=device, part=(k, 3))) for k in range(3)]
    assert whole["clips"].shape[0] == 5 and whole["labels"].shape[0] == 7
    for name, values in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), values), name


# -- other executions ------------------------------------------------------------------------------


def executed(**how):
    options = TrainingOptions(batch_size=5, extra_images=6, **train_together.FAST)
    return Trainer(tiny_config(), options, *random_clips(), execution=Execution(**how))


@pytest.mark.parametrize("how", [{"accumulate": 4}, {"checkpoint_activations": True}])
def test_executions_take_the_same_steps(how):
    plain, other = executed(), executed(**how)
    assert_same_losses(losses(other, 5), losses(plain, 5))
    for one, two in zip(other.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def bytes_for_the_gradient(training):
    """Of all tensors that a step's forward pass keeps for its backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in training.parameters}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = training.losses(0)
    sum(loss.sum() for loss, _ in found.values()).backward()
    return sum(count for pointer, count in kept.items() if pointer not in weights)


def test_checkpointed_activations_and_parts_of_a_batch_save_memory():
    plain = bytes_for_the_gradient(executed())
    assert bytes_for_the_gradient(executed(checkpoint_activations=True)) < 0.3 * plain
    assert bytes_for_the_gradient(executed(accumulate=5)) < 0.3 * plain


def on_clips(**how):
    """A plain video model's training."""
    options = TrainingOptions(**{**train_together.FAST, "batch_size": 3, "clean_share": 0})
    return Trainer(tiny_video_config(), options, *random_clips(), execution=Execution(**how))


def test_compiled_networks_take_the_same_steps(tmp_path, monkeypatch):
    """The graphs that torch.compile captures, without the code that inductor makes of them."""
    compiled = []

    def compile(network):
        compiled.append(network)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    plain, other = on_clips(), on_clips(compile=True)
    assert compiled == [other.networks["video"]]
    assert_same_losses(losses(other, 2), losses(plain, 2))
    other.save(tmp_path / "state")  # in the names of any other
    on_clips().restore(tmp_path / "state")


@pytest.mark.slow  # minutes of a C++ compiler
def test_compiled_code_takes_steps_as_close_as_rounding():
    assert_same_losses(losses(on_clips(compile=True), 3), losses(on_clips(), 3))


def test_compilers_that_do_not_work_are_refused(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(torch, "compile", _no_compiler)
    with pytest.raises(
        ValueError, match="compile needs a compiler that works: no C\\+\\+ compiler"
    ):
        executed(compile=True)


def _no_compiler(function):
    def call(*_):
        raise RuntimeError("no C++ compiler\nlong advice")

    return call


@pytest.mark.parametrize(
    ("how", "options", "problem"),
    [
        ({"accumulate": 0}, {}, "accumulate must be at least 1, got 0"),
        ({"accumulate": 6}, {}, "batch_size must be at least 6, a clip for each of 6 parts"),
        ({"shard": True}, {}, "shard needs several processes: torchrun"),
        ({"shard": True, "compile": True, "team": 2}, {}, "shard cannot go with compile"),
        (
            {"shard": True, "team": 2, "accumulate": 2},
            {"extra_images": 3},
            "extra_images must be 0 or at least 4 with shard",
        ),
        (
            {"team": 6},
            {},
            "batch_size must be at least 6, .* \\(6 processes, accumulate 1\\), got 5",
        ),
    ],
)
def test_executions_that_cannot_be_are_refused(how, options, problem):
    team, how = Team(), dict(how)
    team.size = how.pop("team", 1)
    options = TrainingOptions(**{"batch_size": 5, **options})
    with pytest.raises(ValueError, match=problem):
        Execution(team, **how).check(options)
    with pytest.raises(ValueError, match=problem):
        Trainer(tiny_config(), options, *random_clips(), execution=Execution(team, **how))
