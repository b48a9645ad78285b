"""A stub of torch.cuda, and pipelines that take the CPU for a GPU.

Nothing runs on a device: "captured" and replayed steps run on the CPU, so that clips can be
compared with plain ones.
"""

import contextlib
import threading

import torch
from torch.overrides import TorchFunctionMode

from vfengine import VideoFusionPipeline
from vfengine.pipelines import session
from vfengine.sampling import cuda_graph as capture
from vfengine.sampling.two_phase import BaseSpec, ResidualSpec

CUDA = torch.device("cuda", 0)
WAIT = 60.0  # seconds after which a thread that never comes fails the test


class StubCuda:
    """In place of torch.cuda: who captures, what breaks that, which streams are used.

    calls:    in order; warm-up and captured steps are included if they record themselves
    problems: calls that the driver or torch would or could have refused
    captures_run: whether what is captured runs meanwhile, as on a GPU it does not
    """

    def __init__(self, monkeypatch, capture_fails=False, captures_run=True):
        self.calls, self.problems, self.fails = [], [], capture_fails
        self.captures_run = captures_run
        self.pretending = False  # whether loops that are built take their device for CUDA
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
        monkeypatch.setattr(capture, "_capture", self._recording(capture._capture))

    class Stream:
        def __init__(self, stub, name):
            self.stub, self.name = stub, name

        def wait_stream(self, other):
            self.stub.calls.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            self.stub.calls.append(f"{self.name} waits for an event of {event.name}")

        def record_event(self):
            return self

        def synchronize(self):
            if self.stub.capturing is threading.current_thread():
                self.stub.problems.append("waits for a stream in capture")

    class Graph:
        def __init__(self, stub):
            self.stub, self.call, self.memory = stub, None, None

        def pool(self):
            return self.memory

        def replay(self):
            if capture.exclusive._is_owned():
                self.stub.problems.append("replayed with the lock held")
            self.stub.calls.append("replay")
            self.call()

    def _recording(self, record):
        """`_capture`, whose graphs run what they hold once more at every replay."""

        def call(graph, stream, steps, pool=None, **how):
            graph.call, graph.memory = steps, pool or (id(graph), 0)
            record(graph, stream, steps if self.captures_run else lambda: None, pool, **how)

        return call

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
    def graph(self, graph, pool, stream, capture_error_mode):
        torch.cuda.synchronize()  # as torch does
        torch.cuda.empty_cache()
        self._check("a capture")
        self.modes.append(torch.is_inference_mode_enabled())
        self.capturing = threading.current_thread()
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


def stub_with_loops(monkeypatch):
    """The stub, with loops that capture although they are on the CPU, and a watched lock."""
    cuda = StubCuda(monkeypatch)
    monkeypatch.setattr(capture, "exclusive", WatchedLock(capture.exclusive, cuda))
    for spec in (BaseSpec, ResidualSpec):
        monkeypatch.setattr(spec, "build", _on_cuda(spec.build, cuda))
    cpu, form = torch.device("cpu"), session.for_inference  # of networks that are read again
    monkeypatch.setattr(session, "for_inference", lambda *given: form(*given[:2], cpu))
    return cuda


def _on_cuda(build, stub):
    def call(spec, model):
        loop = build(spec, model)
        loop.device = CUDA if stub.pretending else loop.device
        return loop

    return call


def pretended(stub, checkpoint, label, **settings):
    """A pipeline with its networks in memory, that from then on takes the CPU for a GPU."""
    stub.pretending = False
    pipe = VideoFusionPipeline.from_pretrained(checkpoint, device="cpu", dtype=torch.float32)
    clip = pipe(label, offload_base=False, **settings).frames
    for phase in ("base", "residual"):
        pipe._session.loops.release(phase)
    pipe._session.device, pipe._session.driver.capture = CUDA, True
    stub.pretending = True
    return pipe, clip
