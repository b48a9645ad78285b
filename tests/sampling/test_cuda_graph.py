"""The calls of torch.cuda by vfengine/sampling/cuda_graph.py; a stub records them.

Nothing runs on a device: "captured" and replayed steps run on the CPU, so that clips can be
compared with plain ones.
"""

import contextlib
import threading

import numpy as np
import pytest
import torch
from held import loops_of
from torch.overrides import TorchFunctionMode

from vfengine import VideoFusionPipeline
from vfengine.sampling import cuda_graph as capture
from vfengine.sampling import overlap
from vfengine.sampling.loop import Loop

CUDA = torch.device("cuda", 0)
WAIT = 60.0  # seconds after which a thread that never comes fails the test


class StubCuda:
    """In place of torch.cuda: who captures, what breaks that, which streams are used.

    calls:    in order; warm-up and captured steps are included if they record themselves
    problems: calls that the driver or torch would or could have refused
    """

    def __init__(self, monkeypatch, capture_fails=False):
        self.calls, self.problems, self.fails = [], [], capture_fails
        self.local = threading.local()
        self.capturing = None  # thread
        self.entered = threading.Event()  # another thread came while one was capturing
        self.modes, self.streams = [], 0
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, self._whole_device(name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.Stream(self, self.here()))
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: self.Stream(self, self._new_name()))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda s: self._go(s.name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self.Graph(self))
        monkeypatch.setattr(capture, "_idle_streams", {})

    class Stream:
        def __init__(self, stub, name):
            self.stub, self.name = stub, name

        def wait_stream(self, other):
            self.stub.calls.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            return self

        def synchronize(self):
            if self.stub.capturing is threading.current_thread():
                self.stub.problems.append("waits for a stream in capture")

    class Graph:
        def __init__(self, stub):
            self.stub, self.step, self.stream = stub, getattr(stub.local, "step", None), None

        def replay(self):
            if capture.exclusive._is_owned():
                self.stub.problems.append("replayed with the lock held")
            self.stub.calls.append("replay")
            if self.step is not None:
                self.step()

    def here(self):
        return getattr(self.local, "stream", "main")

    def _go(self, name):
        self.local.stream = name

    def _new_name(self):
        self.streams += 1
        return "side" if self.streams == 1 else f"side {self.streams}"

    def _whole_device(self, name):
        def call(*_):
            self._check(name)
            self.calls.append(name)

        return call

    def _check(self, what):
        self.entered.set()
        if self.capturing is not None:
            self.problems.append(f"{what} during a capture")

    @contextlib.contextmanager
    def device(self, device):
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.here()
        self._go(stream.name)
        yield
        self._go(before)

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        torch.cuda.synchronize()  # as torch does
        torch.cuda.empty_cache()
        self._check("a capture")
        self.modes.append(torch.is_inference_mode_enabled())
        self.capturing, graph.stream = threading.current_thread(), stream.name
        self._go(stream.name)
        self.calls.append(f"capture {capture_error_mode}")
        try:
            yield
        finally:
            self.capturing = None
        if self.fails:  # as capture_end does, before it goes back to the stream it came from
            raise RuntimeError("ended")
        self.calls.append("captured")
        self._go("main")


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
    assert cuda.calls[-1] == "replay"
    assert not cuda.problems


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
    assert len({graph.__self__.stream for graph in graphs}) == 2
    with capture.side_stream(CUDA) as stream:
        assert stream.name not in {graph.__self__.stream for graph in graphs}
    for _ in range(5):  # as of an engine whose shapes change
        graphs = graphs[1:]
        graphs.append(replay())
        assert len({graph.__self__.stream for graph in graphs}) == 2
    assert cuda.streams == 3
    graphs.append(replay())
    assert len({graph.__self__.stream for graph in graphs}) == 3


# -- threads ---------------------------------------------------------------------------------------


class OnTheCpu(TorchFunctionMode):
    """Tensors that are sent to CUDA stay on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and CUDA in args:
            return args[0]
        return func(*args, **(kwargs or {}))


class WatchedLock:
    """A lock that says so before a thread waits for it."""

    def __init__(self, lock, stub):
        self.lock, self.stub, self._is_owned = lock, stub, lock._is_owned

    def __enter__(self):
        if self.stub.capturing not in (None, threading.current_thread()):
            self.stub.entered.set()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


@pytest.fixture
def stub(monkeypatch):
    """The stub, with loops that capture although they are on the CPU, and a watched lock."""
    cuda = StubCuda(monkeypatch)
    monkeypatch.setattr(capture, "exclusive", WatchedLock(capture.exclusive, cuda))

    def stepper(loop, capturing):
        if loop._replay is None:
            cuda.local.step = loop.step
            loop._replay = capture.captured(loop.step, CUDA, loop._rewind)
        return loop._replay

    monkeypatch.setattr(Loop, "stepper", stepper)
    return cuda


def pretended(checkpoint, label, **settings):
    """A pipeline with its networks in memory, that from then on takes the CPU for a GPU."""
    pipe = VideoFusionPipeline.from_pretrained(checkpoint, device="cpu", dtype=torch.float32)
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr(Loop, "stepper", lambda loop, capturing: loop.step)
        clip = pipe(label, offload_base=False, **settings).frames
    pipe._session.device = CUDA
    return pipe, clip


def test_two_threads_never_capture_at_once(stub, tiny_checkpoint):
    """The first capture goes on until the other thread wants to begin its own, or has done so."""
    settings = {"num_inference_steps": 3, "base_path": "stepwise"}
    labels = ("walk", "jump")
    pipes, plain = zip(*(pretended(tiny_checkpoint, x, **settings) for x in labels), strict=True)
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


def test_overlapped_phases_have_streams_of_their_own(stub, tiny_checkpoint, monkeypatch):
    settings = {"num_inference_steps": 3, "base_path": "stepwise", "overlap_phases": True}
    pipe, plain = pretended(tiny_checkpoint, "walk", **settings)
    monkeypatch.setattr(overlap, "_in_thread", overlap._on_stream)  # as for loops on CUDA
    with OnTheCpu():
        assert np.array_equal(pipe("walk", **settings).frames, plain)
    loops = loops_of(pipe)
    graphs = {loops[phase]._replay.__self__.stream for phase in ("base", "residual")}
    assert graphs == {"side", "side 2"}
    assert stub.calls.count("side 3 waits for main") == 1  # where the base phase ran ahead
    assert stub.calls[-1] == "main waits for side 3"
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


@pytest.mark.parametrize("name", ["VFENGINE_KERNEL_BACKEND", "VFENGINE_ATTENTION_BACKEND"])
def test_key_sees_the_environment(monkeypatch, name):
    before = capture.process_settings_key(CUDA)
    monkeypatch.setenv(name, "triton")
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
