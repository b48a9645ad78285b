"""Arguments of another kind are refused by name, by every op and on every backend."""

import random

import fuzz_ops
import numpy as np
import pytest
import torch

from vfengine import ops

NAMES = sorted(fuzz_ops.OPS.keys() - {"attend"})
BACKENDS = {name: fuzz_ops.OPS[name][2] for name in NAMES}
COUNTS = ("num_groups", "num_heads", "num_frames", "base_frame")
SWITCHES = ("silu", "gated", "conditioned")


def arguments(name: str) -> dict:
    return fuzz_ops.OPS[name][0](fuzz_ops.Draw(random.Random(3)))


def stand_ins(value: object) -> list:
    """What numpy and torch have for an int or a float without loss."""
    if type(value) is float:
        return [np.float64(value), np.array(value), torch.tensor(value, dtype=torch.float64)]
    if type(value) is int:
        short = [np.int64(value), torch.tensor(value)] if value < 2**63 else []
        return [*short, np.uint64(value), np.array(value)]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_arguments(name):
    op = getattr(ops, name)
    for backend in BACKENDS[name]:
        assert fuzz_ops.tensors_of(op(**arguments(name), backend=backend))
        for argument, value in arguments(name).items():
            others = [(object(), (TypeError, ValueError), argument)]
            if isinstance(value, torch.Tensor):
                others += [(value.tolist(), TypeError, argument)]
                others += [(value.to_sparse(), ValueError, f"{argument} must be strided")]
            elif argument in COUNTS:
                others += [(str(value), TypeError, f"{argument} must be an int")]
                others += [(2**64, ValueError, f"{argument} must be an int64")]
            elif argument == "eps":
                others += [(2**64, ValueError, f"{argument} must be an int64")]
            elif argument in SWITCHES:
                others += [("yes", TypeError, f"{argument} must be True or False")]
            for other, error, words in others:
                with pytest.raises(error, match=words):
                    op(**{**arguments(name), argument: other}, backend=backend)
    first = next(iter(arguments(name)))
    with pytest.raises(TypeError, match=f"{first} must be a tensor, got NoneType"):
        op(**{key: None if key in (first, "out") else v for key, v in arguments(name).items()})
    for backend in (None, 3, ["cpu"]):
        with pytest.raises(TypeError, match=f"{name}: backend must be a str"):
            op(**arguments(name), backend=backend)
    with pytest.raises(ValueError, match="backend='fast' is unknown"):
        op(**arguments(name), backend="fast")


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_numpy_and_torch_are_numbers(name):
    """An op's result is the same to the bit with what stands for Python's ints and floats."""
    op = getattr(ops, name)
    for backend in BACKENDS[name]:
        expected = fuzz_ops.tensors_of(op(**arguments(name), backend=backend))
        for argument, value in arguments(name).items():
            for stand_in in stand_ins(value):
                given = {**arguments(name), argument: stand_in}
                results = fuzz_ops.tensors_of(op(**given, backend=backend))
                assert all(map(torch.equal, results, expected)), (argument, stand_in)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("name", ["base_step", "path_step"])
def test_steps_along_a_path_check_it_on_a_cpu(name, backend):
    op, given = getattr(ops, name), arguments(name)
    clip = given["z" if name == "base_step" else "u"]
    steps = len(given["clock"].timesteps)
    batch = clip.shape[0]
    good = torch.zeros(steps + 1, batch, *clip.shape[-3:])
    assert op(**{**given, "states": good}, backend=backend) is clip
    given = arguments(name)
    for states in (good[1:], good[0], good.half(), good.transpose(-1, -2)[..., :0], good[:, :, :0]):
        with pytest.raises((TypeError, ValueError), match=f"{name}: states must be"):
            op(**{**given, "states": states}, backend=backend)
    other = given["clock"]._replace(t=torch.zeros(batch + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"{name}: t must be"):
        op(**{**given, "clock": other}, backend=backend)
