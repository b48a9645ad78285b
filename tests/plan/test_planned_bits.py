"""PlannedUNet gives the same bits: on any threads, in any batch, in tiles or not, at any call."""

import threading

import pytest
import torch
from seeded import normal
from test_planned import BF16_ISAS, FORMS, distance, inputs, network, plan, some_cases

from vfengine.plan import network as planned


@pytest.fixture
def threads():
    former = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(former)


@pytest.fixture(params=["fp32", *BF16_ISAS])
def dtype(request, isas):
    """Of networks: float32, and bfloat16 on every instruction set that has it."""
    if request.param == "fp32":
        return torch.float32
    isas(request.param)
    return torch.bfloat16


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """How transformers run."""
    monkeypatch.setattr(planned, "_TILED", FORMS[request.param])


@pytest.mark.parametrize("case", ["image, context", "video"])
def test_results_do_not_depend_on_the_number_of_threads(case, dtype, threads, form):
    unet, values = plan(network(case), dtype), inputs(case)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(unet(**values))
    for other in results[1:]:
        assert torch.equal(other, results[0])


@some_cases
@pytest.mark.parametrize("count", [1, 2])
def test_results_do_not_depend_on_the_batch(case, dtype, count, threads, form):
    """Even if a batch has enough rows for tiles and a sample of it has not."""
    threads(count)
    unet, values = plan(network(case), dtype), inputs(case)
    whole = unet(**values)
    for i in range(2):
        single = unet(**{name: value[i : i + 1] for name, value in values.items()})
        assert torch.equal(single[0], whole[i])


@some_cases
def test_tiles_do_not_change_results(case, dtype, monkeypatch):
    unet, values, results = network(case), inputs(case), []
    for limit in (1, 1 << 40):
        monkeypatch.setattr(planned, "_TILED", limit)
        results.append(plan(unet, dtype)(**values))
    assert torch.equal(*results)


def test_programs_of_several_shapes_do_not_disturb_each_other():
    """There are more shapes than programs that are kept."""
    unet = plan(network("video"))
    calls = [
        {"x": normal(batch, frames, 3, *size), "t": torch.tensor([3, 400])[:batch]}
        for batch, frames, size in (
            *((2, 3, (4, 4)), (1, 5, (8, 4)), (1, 5, (4, 8)), (2, 1, (6, 2))),
            *((1, 2, (8, 8)), (2, 5, (2, 2))),
        )
    ]
    assert len(calls) > planned._PROGRAMS
    expected = [plan(network("video"))(**values) for values in calls]
    for index in (0, 1, 2, 3, 0, 4, 5, 1, 0, 3, 5):
        assert torch.equal(unet(**calls[index]), expected[index])
        assert len(unet._programs) <= planned._PROGRAMS


def test_contexts_of_several_lengths_do_not_disturb_each_other():
    unet, values = network("image, context"), inputs("image, context")
    made = plan(unet)
    for length in (77, 3, None, 77, 1, 3):
        values["context"] = None if length is None else normal(2, length, 12, seed=length)
        with torch.no_grad():
            expected = unet(**values)
        assert distance(made(**values), expected) < 1e-5


@pytest.mark.parametrize("case", ["image", "image, patches of 2", "video", "video, patches of 2"])
def test_results_keep_their_values_when_the_next_are_computed(case, dtype):
    unet, values = plan(network(case), dtype), inputs(case)
    first = unet(**values)
    kept, given = first.clone(), {name: value.clone() for name, value in values.items()}
    second = unet(**inputs(case, seed=11))
    assert torch.equal(first, kept) and not torch.equal(first, second)
    first.fill_(float("nan"))
    assert torch.equal(unet(**values), kept)
    for name, value in values.items():
        assert torch.equal(value, given[name]), "arguments stay as they are"


def test_two_threads_may_call_one_network():
    unet = plan(network("video"))
    calls = [inputs("video", seed=seed) for seed in range(4)]
    calls[3]["x"] = calls[3]["x"][:, :2]
    expected = [unet(**values) for values in calls]
    wrong, start = [], threading.Barrier(2)

    def work(own: tuple[int, ...]) -> None:
        start.wait()
        for index in own * 5:
            if not torch.equal(unet(**calls[index]), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=work, args=(own,)) for own in ((0, 1, 3), (2, 3, 0))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
