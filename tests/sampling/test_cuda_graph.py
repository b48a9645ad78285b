"""The calls of torch.cuda by vfengine/sampling/cuda_graph.py; a stub records them."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from held import loops_of
from stub_cuda import (
    CUDA,
    WAIT,
    OnTheCpu,
    StubCuda,
    WatchedLock,
    pretended,
    stub_with_loops,
)

from vfengine.sampling import cuda_graph as capture


def test_captured_warms_up_on_the_side_and_replays(monkeypatch):
    cuda = StubCuda(monkeypatch)
    replay = capture.captured(
        lambda: cuda.calls.append(f"step on {cuda.here()}"),
        CUDA,
        lambda: cuda.calls.append("rewind"),
    )
    warm_up = ["rewind", "step on side"] * 2 + ["rewind"]
    recording = ["synchronize", "empty_cache", "capture thread_local", "step on side", "captured"]
    begin = ["synchronize", "side waits for main"]
    assert cuda.calls == [*begin, *warm_up, *recording, "main waits for side"]
    assert cuda.here() == "main"
    replay()
    assert cuda.calls[-2:] == ["replay", "step on main"]
    assert (replay.count, replay.stream.name) == (1, "side")
    assert not cuda.problems


def test_several_steps_are_captured_and_one_warms_up(monkeypatch):
    cuda, steps = StubCuda(monkeypatch), []
    replay = capture.captured(lambda: steps.append(cuda.capturing), CUDA, lambda: None, count=3)
    here = threading.current_thread()
    assert steps == [None] * 2 + [here] * 3
    assert replay.count == 3
    replay()
    assert len(steps) == 8


@pytest.mark.parametrize("switch", ["deterministic", "benchmark", None])
def test_cudnn_searches_while_a_step_warms_up_and_not_in_the_capture(monkeypatch, switch):
    StubCuda(monkeypatch)
    cudnn, seen = torch.backends.cudnn, []
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(cudnn, name, name == switch)
    capture.captured(lambda: seen.append(cudnn.benchmark), CUDA, lambda: None)
    former = switch == "benchmark"
    assert seen == [switch != "deterministic"] * 2 + [former]
    assert cudnn.benchmark is former

    def fails():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        capture.captured(fails, CUDA, lambda: None)
    assert cudnn.benchmark is former


def test_a_second_graph_has_the_memory_and_the_stream_of_the_first(monkeypatch):
    """And it leaves the stream to the first one."""
    cuda, calls = StubCuda(monkeypatch), []
    first = capture.captured(lambda: None, CUDA, lambda: None, count=2)
    second = capture.captured_after(first, CUDA, lambda: calls.append(cuda.here()))
    assert calls == ["side"]  # no warm-up
    assert (second.count, second.stream) == (2, first.stream)
    assert second.graph.memory == first.graph.memory
    del second
    other = capture.captured(lambda: None, CUDA, lambda: None)
    assert other.stream.name == "side 2"


@pytest.mark.parametrize("when", ["warm-up", "capture"])
def test_step_that_cannot_be_captured_raises(monkeypatch, when):
    cuda, calls = StubCuda(monkeypatch, capture_fails=True), []

    def step():
        calls.append("")
        if when == "warm-up" or len(calls) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    message = "cannot be captured.*not permitted.*capture=False" if when == "capture" else "^operat"
    with pytest.raises(RuntimeError, match=message):
        capture.captured(step, CUDA, lambda: None)
    assert cuda.here() == "main"
    assert cuda.calls[-1] == "main waits for side"
    assert not capture.exclusive._is_owned()


@pytest.mark.parametrize("outside", [True, False])
def test_capture_begins_outside_inference_mode(monkeypatch, outside):
    """Where its step runs: what torch makes for the graph alone must not be inference tensors."""
    cuda, inside = StubCuda(monkeypatch), []
    with torch.inference_mode(outside):
        capture.captured(
            lambda: inside.append(torch.is_inference_mode_enabled()), CUDA, lambda: None
        )
    assert cuda.modes == [False]
    assert inside == [True] * 3


def test_graphs_share_no_stream_and_leave_theirs_behind(monkeypatch):
    cuda = StubCuda(monkeypatch)

    def replay():
        return capture.captured(lambda: None, CUDA, lambda: None)

    graphs = [replay(), replay()]
    assert len({graph.stream.name for graph in graphs}) == 2
    with capture.side_stream(CUDA) as stream:
        assert stream.name not in {graph.stream.name for graph in graphs}
    for _ in range(5):  # as of an engine whose shapes change
        graphs = graphs[1:]
        graphs.append(replay())
        assert len({graph.stream.name for graph in graphs}) == 2
    assert cuda.streams == 3
    graphs.append(replay())
    assert len({graph.stream.name for graph in graphs}) == 3


# -- threads ---------------------------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    return stub_with_loops(monkeypatch)


def test_two_threads_never_capture_at_once(stub, tiny_checkpoint):
    """The first capture goes on until the other thread wants to begin its own, or has done so."""
    settings = {"num_inference_steps": 3, "base_path": "stepwise"}
    labels = ("walk", "jump")
    pipes, plain = zip(
        *(pretended(stub, tiny_checkpoint, x, **settings) for x in labels), strict=True
    )
    met, graph, threads, clips = [], stub.graph, [], [None, None]

    @contextlib.contextmanager
    def long_capture(*arguments, **options):
        with graph(*arguments, **options):
            if not threads:
                stub.entered.clear()
                threads.append(threading.current_thread())
                other = starts[threading.current_thread() is workers[0]]
                other.set()
                met.append(stub.entered.wait(WAIT))
            threads.append(threading.current_thread())
            yield

    torch.cuda.graph = long_capture
    starts = [threading.Event(), threading.Event()]
    starts[0].set()

    def work(k):
        assert starts[k].wait(WAIT)
        with OnTheCpu():
            clips[k] = pipes[k](labels[k], offload_base=False, **settings).frames

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT)
    assert met == [True]
    assert stub.problems == []
    assert sorted(threads[1:].count(worker) for worker in workers) == [2, 2]  # graphs of each
    assert stub.modes == [False] * 4
    for clip, expected in zip(clips, plain, strict=True):
        assert np.array_equal(clip, expected)


def test_memory_is_given_back_between_captures(stub):
    """torch.cuda.empty_cache in one thread while another captures: it waits."""
    other = threading.Thread(target=capture.empty_cache)

    def step():
        if stub.capturing is not None:
            stub.entered.clear()
            other.start()
            assert stub.entered.wait(WAIT)

    capture.captured(step, CUDA, lambda: None)
    other.join(WAIT)
    assert stub.problems == []
    assert stub.calls[-1] == "empty_cache"


def test_settings_are_not_read_while_cudnn_searches(monkeypatch):
    """Another thread's key would tell of a search that its own loop does not make."""
    stub = StubCuda(monkeypatch)
    lock = WatchedLock(capture.exclusive, stub)
    monkeypatch.setattr(capture, "exclusive", lock)
    before, keys = capture.process_settings_key(CUDA), []
    other = threading.Thread(target=lambda: keys.append(capture.process_settings_key(CUDA)))

    def step():
        if other.ident is None:
            stub.capturing = threading.current_thread()
            stub.entered.clear()
            other.start()
            assert stub.entered.wait(WAIT)
            stub.capturing = None

    capture.captured(step, CUDA, lambda: None)
    other.join(WAIT)
    assert keys == [before]


def test_overlapped_phases_are_branches_of_one_graph(stub, tiny_checkpoint):
    """The base phase's steps run on the stream of its own graph, which brings its workspaces."""
    settings = {"num_inference_steps": 8, "base_path": "stepwise", "overlap_phases": True}
    pipe, plain = pretended(stub, tiny_checkpoint, "walk", **settings)
    with OnTheCpu():
        assert np.array_equal(pipe("walk", **settings).frames, plain)
    loops = loops_of(pipe)
    assert [loops[phase].stepper(True).stream.name for phase in ("base", "residual")] == [
        "side",
        "side 2",
    ]
    assert stub.calls.count("capture thread_local") == 3  # of either phase, and of both
    fork = stub.calls.index("side waits for side 2")
    branch = ["side waits for side 2", "side 2 waits for an event of side", "side 2 waits for side"]
    assert stub.calls[fork : fork + 3] == branch
    assert stub.calls[fork + 3] == "captured"
    (both,) = loops["residual"].beside.values()
    assert both.graph.memory == loops["residual"].stepper(True).graph.memory
    assert not stub.problems


# -- what a graph is good for ----------------------------------------------------------------------

SETTINGS = [
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    (torch.backends.cuda.matmul, "allow_tf32", True),
    (torch.backends.cudnn, "benchmark", True),
    (torch.backends.cudnn, "deterministic", True),
    (torch.backends.cudnn, "enabled", False),
]
SWITCHES = ["flash", "mem_efficient", "math", "cudnn"]


def test_keys_are_equal_where_nothing_changed():
    assert capture.process_settings_key(CUDA) == capture.process_settings_key(CUDA)


@pytest.mark.parametrize(("where", "name", "value"), SETTINGS, ids=[s[1] for s in SETTINGS])
def test_key_sees_settings(where, name, value):
    before, former = capture.process_settings_key(CUDA), getattr(where, name)
    setattr(where, name, value)
    try:
        assert capture.process_settings_key(CUDA) != before
    finally:
        setattr(where, name, former)
    assert capture.process_settings_key(CUDA) == before


@pytest.mark.parametrize("name", SWITCHES)
def test_key_sees_which_attention_torch_may_take(name):
    before = capture.process_settings_key(CUDA)
    switch = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    switch(False)
    try:
        assert capture.process_settings_key(CUDA) != before
    finally:
        switch(True)
    assert capture.process_settings_key(CUDA) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VFENGINE_KERNEL_BACKEND", "triton"),
        ("VFENGINE_ATTENTION_BACKEND", "sdpa"),
        ("VFENGINE_PDL", "off"),
    ],
)
def test_key_sees_the_environment(monkeypatch, name, value):
    before = capture.process_settings_key(CUDA)
    monkeypatch.setenv(name, value)
    assert capture.process_settings_key(CUDA) != before


def test_key_sees_precision_deterministic_algorithms_and_autocast():
    before = capture.process_settings_key(CUDA)
    torch.set_float32_matmul_precision("high")
    high = capture.process_settings_key(CUDA)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    deterministic = capture.process_settings_key(CUDA)
    torch.use_deterministic_algorithms(False)
    torch.set_autocast_enabled("cuda", True)
    autocast = capture.process_settings_key(CUDA)
    torch.set_autocast_enabled("cuda", False)
    assert len({before, high, deterministic, autocast}) == 4
    assert capture.process_settings_key(CUDA) == before


def test_key_can_be_read_however_precision_was_set():
    """Torch 2.9 has a second interface, after whose use reading the first one raises."""
    products = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        return
    before, former = capture.process_settings_key(CUDA), products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        assert capture.process_settings_key(CUDA) != before
    finally:
        products.fp32_precision = former


def test_weights_key_sees_replaced_and_rewritten_weights():
    layer = torch.nn.Linear(2, 2)
    first = capture.weights_key(layer)
    assert capture.weights_key(layer) == first
    with torch.no_grad():
        layer.weight.mul_(2)
    second = capture.weights_key(layer)
    assert second != first
    layer.bias = torch.nn.Parameter(torch.zeros(2))
    assert capture.weights_key(layer) != second
