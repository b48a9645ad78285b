"""Calls from several threads, and calls that were stopped: the next clips have the same bits."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from latent_models import save_latent_model

import vfengine

QUICK = {"num_inference_steps": 3}


@pytest.fixture(scope="module", params=["pixels", "latents"])
def folder(request, tiny_checkpoint, tmp_path_factory):
    if request.param == "pixels":
        return tiny_checkpoint
    return save_latent_model(tmp_path_factory.mktemp("models") / "latent")


def load(folder):
    return vfengine.load_pipeline(folder, device="cpu", dtype=torch.float32)


def settings(number: int) -> dict:
    """Of a call: its own seed, and every second one has another number of frames."""
    return {**QUICK, "residual_seed": number, "num_frames": 3 + number % 2}


@pytest.mark.parametrize("pipelines", [1, 2])
def test_calls_of_several_threads(folder, pipelines):
    """On one pipeline and on two, whose networks are read and released meanwhile."""
    pipe = load(folder)
    labels = [pipe.labels[number % len(pipe.labels)] for number in range(4)]
    expected = [pipe(label=label, **settings(k)).frames for k, label in enumerate(labels)]
    pipes = [load(folder) for _ in range(pipelines)]

    def call(k: int) -> np.ndarray:
        return pipes[k % pipelines](label=labels[k], **settings(k)).frames

    with ThreadPoolExecutor(4) as pool:
        for made, one in zip(pool.map(call, range(4)), expected, strict=True):
            assert np.array_equal(made, one)


class StopCall(Exception):
    """Of a callback."""


@pytest.mark.parametrize(
    ("overlap_phases", "error"), [(False, KeyboardInterrupt), (True, StopCall)]
)
def test_a_stopped_call_changes_nothing(folder, error, overlap_phases):
    pipe = load(folder)
    how = {**QUICK, "overlap_phases": overlap_phases}
    expected = pipe(**how).frames
    work = pipe.work(pipe.request_type(**how))
    for stopped in [(phase, done) for phase in work for done in (0, 1)]:

        def callback(phase: str, done: int, total: int, stopped: tuple = stopped) -> None:
            if (phase, done) == stopped:
                raise error

        with contextlib.suppress(error):  # "text" is not reported where the texts are known
            pipe(**how, callback=callback)
    assert np.array_equal(pipe(**how).frames, expected)


def test_a_call_inside_a_callback(folder):
    pipe = load(folder)
    expected = pipe(**QUICK).frames
    inner = []

    def callback(phase: str, done: int, total: int) -> None:
        if done == 1 and not inner:
            inner.append(None)
            inner.append(pipe(**QUICK).frames)

    assert np.array_equal(pipe(**QUICK, callback=callback).frames, expected)
    assert np.array_equal(inner[1], expected)
