"""Shared fixtures: a model that samples in milliseconds, and files of benchmarks/."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.formats.checkpoint import (
    CheckpointConfig,
    DecomposedConfig,
    PlainConfig,
    build_network,
    save_checkpoint,
)
from vfengine.models import UNetConfig, vdm_config
from vfengine.native import vfengine_native

TESTS = Path(__file__).resolve().parent
BENCHMARKS = TESTS.parent / "benchmarks"
TINY_LABELS = ("cartwheel", "jump", "walk")

# For a pipeline whose pixels are compared: the choice of "auto" depends on the machine.
ON_CPU = {"device": "cpu", "dtype": torch.float32}


# The folders and files of tests/ that `pytest -m quick` runs.
QUICK = (
    *("cli/", "diffusion/", "media/", "pipelines/", "sampling/", "test_"),
    *("formats/test_checkpoint.py", "models/test_models.py", "models/test_vdm.py"),
    "plan/test_plan_snapshots.py",
)
NOT_QUICK = (
    *("sampling/test_capture.py", "cli/test_train.py", "cli/test_train_vdm.py"),
    "cli/test_train_distributed.py",
    *("cli/test_text_to_video_command.py", "pipelines/test_text_to_video.py"),
    *("cli/test_replay.py", "media/test_codecs.py"),
    *("pipelines/test_published_text_to_video.py", "pipelines/test_published_width.py"),
    "pipelines/test_published_base.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the quick tests by their folders, so that a new file needs no mark."""
    for item in items:
        file = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else ""
        if file.startswith(QUICK) and file not in NOT_QUICK:
            item.add_marker(pytest.mark.quick)


def benchmark_file(name: str) -> ModuleType:
    """A file of benchmarks/, which is a folder of scripts and no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def tiny_config(**changes) -> DecomposedConfig:
    """4 frames of 16 x 16, three labels; both UNets have two levels of 16 channels."""
    shape = {
        "block_out_channels": (16, 16),
        "layers_per_block": (1, 1),
        "patch_size": 2,
        "spatial_attention": (False, True),
        "temporal_conv": (False, False),
        "num_classes": len(TINY_LABELS),
        "head_dim": 8,
    }
    values = {
        "num_frames": 4,
        "height": 16,
        "width": 16,
        "channels": 3,
        "lam": 0.5,
        "labels": TINY_LABELS,
        "fps": 8.0,
        "schedule": NoiseSchedule.linear(1000, 1e-4, 2e-2).to_dict(),
        "base": UNetConfig(**shape, temporal_attention=(False, False), out_channels=4),
        "residual": UNetConfig(
            **shape,
            temporal_attention=(False, True),
            frame_embedding=True,
            in_channels=6,
            out_channels=6,
        ),
        "base_path": "stepwise",
    }
    return DecomposedConfig(**{**values, **changes})


def tiny_video_config(**changes) -> PlainConfig:
    """The VDM* of the tiny model's base network."""
    tiny = tiny_config()
    shared = ("num_frames", "height", "width", "channels", "labels", "fps", "schedule")
    values = {name: getattr(tiny, name) for name in shared}
    return PlainConfig(**{**values, "video": vdm_config(tiny.base), **changes})


def save_tiny(folder: Path, seed: int = 0, **changes) -> Path:
    """Writes an untrained tiny model; the seed decides every weight, the output layers' too."""
    return save_random(folder, tiny_config(**changes), seed)


def save_random(folder: Path, config: CheckpointConfig, seed: int = 0) -> Path:
    """Writes an untrained model of any configuration."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for network in config.networks:
        state = build_network(config, network).unet.state_dict()
        for name, weight in state.items():
            if weight.ndim > 1:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
            elif name.endswith("bias"):
                weight.zero_()
        states.append(state)
    save_checkpoint(folder, config, *states, dtype=torch.float32)
    return folder


@pytest.fixture
def isas():
    """Sets an instruction set of the CPU until the test ends."""
    former = vfengine_native.cpu_isa()
    yield vfengine_native.set_cpu_isa
    vfengine_native.set_cpu_isa(former)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """The folder of a tiny untrained decomposed model (`tiny_config`)."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_video_checkpoint(tmp_path_factory) -> Path:
    """The folder of a tiny untrained VDM* (`tiny_video_config`)."""
    return save_random(tmp_path_factory.mktemp("models") / "vdm", tiny_video_config())


@pytest.fixture(scope="session")
def clean_checkpoint(tmp_path_factory) -> Path:
    """The folder of a tiny decomposed model whose base path is clean unless one is named."""
    return save_tiny(tmp_path_factory.mktemp("models") / "clean", base_path="clean")


@pytest.fixture
def cli(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Runs a command line of vfengine.generate in an empty folder: (status, stdout, stderr)."""
    from vfengine.cli.generate import main

    monkeypatch.chdir(tmp_path)

    def run(*argv, model=tiny_checkpoint, steps="4"):
        fixed = ["--model", str(model), "--num-inference-steps", steps]
        fixed += ["--device", "cpu", "--dtype", "float32"]  # pixels that no machine changes
        status = main([*fixed, *map(str, argv)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def store(tmp_path):
    """A server's jobs, in a folder of their own."""
    from vfengine.serving.store import Store

    store = Store(tmp_path / "store", durable=False)
    yield store
    store.close()


@pytest.fixture
def picture(tmp_path):
    """A picture of the model's size, outside the folder that tests list; its file and pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = tmp_path.parent / f"{tmp_path.name}.png"
    Image.fromarray(pixels).save(file)
    return file, pixels
