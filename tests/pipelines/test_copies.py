"""Copies, pickles and child processes of a pipeline that has run make the same clips."""

import copy
import io
import multiprocessing
import pickle
import threading

import numpy as np
import pytest
import torch
from latent_models import save_latent_model
from torch import nn

import vfengine
from vfengine.forks import Lock
from vfengine.pipelines.videofusion import VideoFusionPipeline
from vfengine.sampling.captured_call import CapturedCall

WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe)),
}


def frames(pipe: VideoFusionPipeline) -> np.ndarray:
    return pipe(num_inference_steps=2, offload_base=False).frames


@pytest.fixture(scope="module", params=["pixels", "latents"])
def used(request, tiny_checkpoint, tmp_path_factory):
    """A pipeline that has run, with all its networks in memory, and its frames."""
    folder = tiny_checkpoint
    if request.param == "latents":
        folder = save_latent_model(tmp_path_factory.mktemp("models") / "latent")
    pipe = vfengine.load_pipeline(folder, device="cpu", dtype=torch.float32)
    pipe.keep_parts()
    return pipe, frames(pipe)


@pytest.mark.parametrize("way", WAYS)
def test_copies_make_the_same_bits(used, way):
    pipe, expected = used
    other = WAYS[way](pipe)
    assert set(other._session.networks) == set(pipe._session.networks)
    assert np.array_equal(frames(other), expected)
    assert np.array_equal(frames(pipe), expected)


def test_a_deep_copy_shares_no_memory(used):
    pipe, _ = used
    network = pipe._session.networks["residual"].unet
    other = copy.deepcopy(network)
    assert not other._programs and other._lock is not network._lock
    for one, two in zip(network.buffers(), other.buffers(), strict=True):
        assert one.data_ptr() != two.data_ptr() or not one.numel()


@pytest.mark.parametrize("used", ["pixels"], indirect=True)
def test_torch_saves_whole_networks_and_their_state(used):
    """Whole ones hold code, so that torch reads them with weights_only=False alone."""
    network = used[0]._session.networks["base"].unet
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file, weights_only=True)
    file.seek(0)
    x, t = torch.linspace(-1, 1, 768).view(1, 3, 16, 16), torch.tensor([5])
    labels = torch.tensor([0])
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(x, t, class_labels=labels), network(x, t, class_labels=labels))
    network.load_state_dict(network.state_dict())


def test_a_captured_call_is_copied_without_its_graph():
    call = CapturedCall(nn.Identity())
    call._kept = object()
    for way in (copy.copy, copy.deepcopy):
        assert way(call)._kept is None and isinstance(way(call).network, nn.Identity)


def _work(pipe: VideoFusionPipeline, threads: int, results) -> None:
    torch.set_num_threads(threads)
    results.put(frames(pipe))


def in_child(start: str, pipe: VideoFusionPipeline, threads: int) -> np.ndarray:
    context = multiprocessing.get_context(start)
    results = context.Queue()
    child = context.Process(target=_work, args=(pipe, threads, results), daemon=True)
    child.start()
    try:
        return results.get(timeout=300)  # of a child that waits forever
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_children_of_a_process_whose_threads_have_run(tiny_checkpoint, start):
    """Under "fork" the child has none of OpenMP's threads, and the other thread's lock is taken.

    Under "spawn" sending the weights moves them to shared memory, in this process too.
    """
    former = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pipe = vfengine.load_pipeline(tiny_checkpoint, device="cpu", dtype=torch.float32)
        expected = frames(pipe)
        held, let_go = threading.Event(), threading.Event()

        def hold() -> None:
            with pipe._session.networks["base"].unet._lock:
                held.set()
                let_go.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait()
        try:
            made = in_child(start, pipe, threads=2)
        finally:
            let_go.set()
            holder.join()
        assert np.array_equal(made, expected)
        assert np.array_equal(frames(pipe), expected)
    finally:
        torch.set_num_threads(former)


def test_locks_lock():
    lock = Lock()
    with lock:
        assert lock._lock.locked()
        assert not copy.deepcopy(lock)._lock.locked()
    assert not lock._lock.locked()
