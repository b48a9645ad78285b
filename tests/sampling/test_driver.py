"""Specs of loops, when a kept loop is used again, and the reports of a run."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from torch import nn

from vfengine.diffusion.noise import NoisePlace
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import solver_table
from vfengine.ops import residual_step, residual_step_reference
from vfengine.ops._dispatch import step_op
from vfengine.sampling.driver import Driver
from vfengine.sampling.guidance import Condition, ModelSpec, guided
from vfengine.sampling.reuse import KeptLoops
from vfengine.sampling.run import Run
from vfengine.sampling.two_phase import BaseSpec, Motion, PathSpec, ResidualSpec

SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
CPU = torch.device("cpu")
NULL = 9


def table(solver="ddim", steps=3, eta=0.0):
    return solver_table(solver, SCHEDULE, steps, eta)


def residual_spec(states=None, **changes):
    """The spec of a loop along these states, or along others like them."""
    states = torch.zeros(4, 1, 1, 2, 2) if states is None else states
    spec = ResidualSpec.of(
        torch.zeros(2, 3, 1, 2, 2),
        table(),
        NoisePlace(1),
        motion=Motion(0.5),
        path=PathSpec.of(states, shared=False),
    )
    return replace(spec, **changes)


class Scaled(nn.Module):
    """ε̂ = weight · (1 + label) · λ_0 · z, and how often it was called."""

    takes_labels = True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1), requires_grad=False)
        self.calls = 0

    def forward(self, z, t, class_labels=None, lam=None):
        self.calls += 1
        share = 1.0 if lam is None else lam[0]
        labels = torch.zeros(len(z)) if class_labels is None else class_labels
        return z * (self.weight * share * (1.0 + labels)).view(-1, *[1] * (z.ndim - 1))


# -- specs -----------------------------------------------------------------------------------------


def test_tables_are_equal_if_they_hold_the_same():
    assert table() == table()
    assert hash(table()) == hash(table())
    others = [table("ddpm"), table("unipc"), table(steps=4), table(eta=0.5)]
    assert len({table().fingerprint(), *(t.fingerprint() for t in others)}) == 5
    assert table() != "ddim"


def test_specs_of_equal_parts_are_equal():
    assert residual_spec() == residual_spec()
    assert Motion([0.5, 1.0]) == Motion(torch.tensor([0.5, 1.0]))
    with pytest.raises(FrozenInstanceError):
        residual_spec().table = table("unipc")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", torch.Size((2, 4, 1, 2, 2))),
        ("dtype", torch.bfloat16),
        ("device", torch.device("meta")),
        ("table", table("unipc")),
        ("place", NoisePlace(1)),
        ("backend", "reference"),
        ("motion", Motion(0.25)),
        ("motion", Motion(0.5, (3, 2))),
        ("motion", Motion(0.5, clean=True)),
        ("path", None),
        ("path", PathSpec(torch.Size((4, 2, 1, 2, 2)), torch.float32)),
        ("path", PathSpec(torch.Size((4, 1, 1, 2, 2)), torch.float64)),
        ("path", PathSpec.of(torch.zeros(4, 1, 1, 2, 2), shared=True)),
    ],
)
def test_every_field_tells_specs_apart(field, value):
    assert field in {f.name for f in fields(ResidualSpec)}
    assert residual_spec(**{field: value}) != residual_spec()


def test_seeds_tell_specs_apart_only_where_noise_is_added():
    noise = torch.zeros(1, 1, 2, 2)
    for eta, equal in ((0.0, True), (1.0, False)):
        specs = [BaseSpec.of(noise, table(eta=eta), NoisePlace(seed)) for seed in (0, 1)]
        assert (specs[0] == specs[1]) is equal


def test_shared_states_are_told_apart_by_where_they_lie():
    one, other = torch.zeros(4, 1, 1, 2, 2), torch.zeros(4, 1, 1, 2, 2)
    assert PathSpec.of(one, shared=True) == PathSpec.of(one, shared=True)
    assert PathSpec.of(one, shared=True) != PathSpec.of(other, shared=True)
    assert PathSpec.of(one, shared=False) == PathSpec.of(other, shared=False)
    assert PathSpec.of(one, shared=True).memory(CPU) is one


def test_models_are_told_apart_by_all_but_the_labels_values():
    network = Scaled()
    spec = ModelSpec(network, torch.tensor([1, NULL]), 2.0, (0.5, 1.0))
    assert spec == ModelSpec(network, torch.tensor([2, NULL]), 2.0, (0.5, 1.0))
    for other in (
        ModelSpec(Scaled(), torch.tensor([1, NULL]), 2.0, (0.5, 1.0)),
        ModelSpec(network, torch.tensor([1, 2, NULL, NULL]), 2.0, (0.5, 1.0)),
        ModelSpec(network, None, 2.0, (0.5, 1.0)),
        ModelSpec(network, torch.tensor([1, NULL]), 3.0, (0.5, 1.0)),
        ModelSpec(network, torch.tensor([1, NULL]), 2.0, (0.25, 1.0)),
    ):
        assert other != spec
    network.weight.mul_(2)
    assert spec != ModelSpec(network, torch.tensor([1, NULL]), 2.0, (0.5, 1.0))


# -- guidance --------------------------------------------------------------------------------------


def test_guidance_is_its_formula_in_one_call():
    network, z = Scaled(), torch.randn(2, 3, 1, 4, 4)
    classes = torch.tensor([1, 3])
    model = guided(network, Condition(classes, 4.0), NULL, lam=(0.5, 1.0)).build(CPU)
    t = torch.zeros(2, dtype=torch.int64)
    for labels in (classes, torch.tensor([2, 0])):
        model.set_labels(torch.cat([labels, torch.full_like(labels, NULL)]))
        network.calls = 0
        out = model(z, t)
        assert network.calls == 1
        lam = torch.tensor([0.5, 1.0])
        with_label = network(z, t, labels, lam)
        without = network(z, t, torch.full_like(labels, NULL), lam)
        torch.testing.assert_close(out, without + 4.0 * (with_label - without))


@pytest.mark.parametrize(("classes", "scale"), [([1, 3], 1.0), ([NULL, NULL], 4.0)])
def test_nothing_is_guided_where_it_makes_no_difference(classes, scale):
    spec = guided(Scaled(), Condition(torch.tensor(classes), scale), NULL)
    assert spec.scale == 1.0
    assert spec.labels.tolist() == classes


def test_any_callable_is_a_network():
    def network(z, t):
        return 2 * z

    z = torch.ones(1, 1, 2, 2)
    assert torch.equal(ModelSpec(network).build(CPU)(z, torch.zeros(1)), 2 * z)


# -- the driver ------------------------------------------------------------------------------------


def test_kept_loops_give_the_results_of_new_ones():
    """Runs have other noise and labels, and do not overwrite earlier results."""
    network, loops = Scaled(), KeptLoops()
    results, made = [], []
    for seed, label in ((0, 1), (1, 2), (0, 1)):
        noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        spec = guided(network, Condition(torch.tensor([label, label]), 2.0), NULL)
        kept = Driver(loops=loops).base(spec, noise, table("unipc"), NoisePlace(seed), Run())
        new = Driver().base(spec.build(CPU), noise, table("unipc"), NoisePlace(seed), Run())
        assert torch.equal(kept, new)
        results.append(kept)
        made.append(loops.kept["base"].loop)
    assert made[0] is made[1] is made[2]
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    loops.release("base")
    assert loops.kept == {}


def test_a_plain_video_model_keeps_every_frame_and_the_sign_of_zero():
    """Frame m is its own, as the others are, and u starts as the noise itself."""
    noise = torch.full((1, 3, 1, 2, 2), -0.0)
    loop = ResidualSpec.of(noise, table(), NoisePlace(0)).build(lambda z, t: z)
    loop.start(noise)
    assert loop.u.signbit().all()
    noise = torch.randn(1, 1, 1, 2, 2).expand(1, 3, 1, 2, 2).contiguous()
    out = Driver().video(lambda z, t: 0.5 * z, noise, table(), NoisePlace(0), Run())
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, 0], out[:, 2])


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_reports_steps_and_adds_up_seconds():
    calls = []
    run = Run(lambda *call: calls.append(call))
    for name in ("base", "residual"):
        with run.phase(name, CPU):
            run.report(name, 0, 1)
            run.report(name, 1, 1)
    assert calls == [("base", 0, 1), ("base", 1, 1), ("residual", 0, 1), ("residual", 1, 1)]
    former = dict(run.timings)
    assert former["load"] == 0.0 < min(former["base"], former["residual"])
    with run.phase("video", CPU):
        pass
    assert run.timings["residual"] > former["residual"]


def test_a_run_may_go_untimed_and_leave_out_the_start():
    calls = []
    run = Run(lambda *call: calls.append(call), timings=None, from_zero=False)
    with run.phase("base", CPU):
        run.report("base", 0, 1)
        run.report("base", 1, 1)
    assert calls == [("base", 1, 1)]
    Run().report("base", 1, 1)  # no callback, no report


# -- ops of a step ---------------------------------------------------------------------------------


def test_float64_steps_run_the_reference_alone():
    step_ops = (residual_step, residual_step_reference)
    for backend in ("auto", "reference"):
        u, r = torch.randn(1, 2, 1, 2, 2, dtype=torch.float64), torch.randn(1, 2, 1, 2, 2).double()
        g, lam = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.tensor([0.5, 1.0])
        coeffs, step = torch.tensor([[0.9, 0.1, 0.0]]), torch.zeros(1, dtype=torch.int32)
        expected = residual_step_reference(u, r, g, lam, coeffs, step)
        step_op(*step_ops, torch.float64, backend)(u, r, g, lam, coeffs, step, out=u)
        assert torch.equal(u, expected)
    with pytest.raises(ValueError, match="float64 clips run backend='reference', got 'cpu'"):
        step_op(*step_ops, torch.float64, "cpu")
