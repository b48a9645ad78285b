"""Damaged files of ours: checkpoints, base paths, caches of them, latents, --config files."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
from conftest import TINY_LABELS, save_random, save_tiny, tiny_config, tiny_video_config
from damage import damaged_bytes, damaged_safetensors, damaged_text
from latent_models import save_latent_model

from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.names import SOLVERS
from vfengine.pipelines.base_cache import find_path, path_file
from vfengine.pipelines.latents import LatentsFile, read_latents
from vfengine.pipelines.load import load_pipeline
from vfengine.sampling.finite import NotFinite

Files = dict[str, bytes]
CPU = {"device": "cpu", "dtype": torch.float32}
MOST_ELEMENTS = 2**14  # of a sampled clip


def contents(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def written(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@functools.cache
def models() -> dict[str, Files]:
    """Tiny models of each kind; the same ones for every seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {
            "decomposed": save_tiny(folder / "tiny"),
            "plain": save_random(folder / "vdm", tiny_video_config()),
            "latent": save_latent_model(folder / "latent"),
        }
        return {kind: contents(path) for kind, path in made.items()}


def damaged_file(chance: random.Random, name: str, content: bytes) -> bytes:
    if name.endswith(".safetensors"):
        return damaged_safetensors(chance, content)
    if name.endswith(".json"):
        return damaged_text(chance, json.loads(content))
    return damaged_bytes(chance, content)


def damaged_folder(chance: random.Random, files: Files) -> Files:
    """One file damaged, missing, or exchanged for another."""
    files, name = dict(files), chance.choice(sorted(files))
    way = chance.random()
    if way < 0.03:
        del files[name]
    elif way < 0.06:
        files[name] = files[chance.choice(sorted(files))]
    else:
        files[name] = damaged_file(chance, name, files[name])
    return files


# -- checkpoints -----------------------------------------------------------------------------------


def checkpoint_case(chance: random.Random, folder: Path) -> str:
    """A damaged checkpoint is refused when it is opened or used, or makes frames."""
    kind = chance.choice(("decomposed", "decomposed", "plain", "latent"))
    files = damaged_folder(chance, models()[kind]) if chance.random() < 0.97 else models()[kind]
    if chance.random() < 0.7:
        files = _signed(files)
    model = written(folder / "model", files)
    try:
        pipe = load_pipeline(model, **CPU)
        config = pipe.config
        if config.channels * config.height * config.width > MOST_ELEMENTS:
            return "large"
        label = chance.choice([*config.labels[:1], None])
        out = pipe(label=label, num_inference_steps=1, num_frames=2, output_type="np")
    except (ValueError, OSError) as error:
        assert str(error).strip(), repr(error)
        return "refused"
    except NotFinite:  # of finite numbers, which nothing tells from others
        return "not finite"
    frames = out.frames
    height, width = config.picture_size
    assert frames.shape == (1, 2, height, width, config.picture_channels), frames.shape
    return "done"


def _signed(files: Files) -> Files:
    """With the SHA-256 of the files as they now are, so that damage is met further in."""
    try:
        config = json.loads(files["config.json"])
        for name in config["sha256"]:
            found = next(f for f in files if f.partition(".")[0] == name)
            config["sha256"][name] = hashlib.sha256(files[found]).hexdigest()
        text = json.dumps(config).encode("utf-8", "surrogatepass")
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RecursionError):
        return files
    return {**files, "config.json": text}


# -- base paths, caches, latents -------------------------------------------------------------------


@functools.cache
def pipeline():
    """Of the tiny decomposed model, whose folder stays until the process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return load_pipeline(save_tiny(Path(folder) / "tiny"), **CPU)


def prepare() -> None:
    """Makes what cases share."""
    models(), trajectories(), latents()


@functools.cache
def trajectories() -> dict[str, bytes]:
    schedule = tiny_config().noise_schedule()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    files = {}
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "path.safetensors"
        for solver in SOLVERS:
            for frames in (1, 2):
                path = BaseTrajectory.from_image(
                    image.repeat(frames, 1, 1, 1),
                    schedule=schedule,
                    num_inference_steps=3,
                    solver=solver,
                    metadata={"seed": "7"},
                )
                path.save(file)
                files[f"{solver} {frames}"] = file.read_bytes()
        made = pipeline()(label=TINY_LABELS[0], num_inference_steps=2, num_frames=2)
        made.trajectory.save(file)
        files["stepwise 1"] = file.read_bytes()
    return files


@functools.cache
def latents() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        file = LatentsFile(Path(name) / "a.safetensors")
        file.add(torch.ones(1, 2, 3, 4, 4), {"prompt": "a fox", "seeds": [1]})
        return file.path.read_bytes()


def trajectory_case(chance: random.Random, folder: Path) -> str:
    """What is read is as it was, or usable; everything else is refused."""
    kind = chance.choice(("path", "path", "path", "cache", "latents"))
    whole = latents() if kind == "latents" else trajectories()[chance.choice([*trajectories()])]
    data = damaged_safetensors(chance, whole) if chance.random() < 0.97 else whole
    file = folder / "a.safetensors"
    try:
        if kind == "latents":
            file.write_bytes(data)
            clips, notes = read_latents(file)
            assert clips.dtype is torch.float32 and clips.ndim == 5 and isinstance(notes, dict)
            return "done"
        if kind == "cache":
            key = {"label": "walk", "seed": chance.randrange(9)}
            path_file(folder, key).write_bytes(data)
            find_path(folder, key)
            return "done"
        file.write_bytes(data)
        path = BaseTrajectory.load(file)
        path.save(folder / "b.safetensors")
        again = BaseTrajectory.load(folder / "b.safetensors")
        assert torch.equal(path.states, again.states) and path.metadata == again.metadata
        schedule = tiny_config().noise_schedule()
        if path.states.numel() > MOST_ELEMENTS or path.schedule_id != schedule.fingerprint():
            return "other"
        steps = {"num_inference_steps": path.num_inference_steps, "solver": path.table.solver}
        out = pipeline()(
            trajectory=path,
            num_videos=path.states.shape[1],
            num_frames=2,
            output_type="pt",
            **steps,
        )
    except (ValueError, TypeError, OSError) as error:
        assert str(error).strip(), repr(error)
        return "refused"
    except NotFinite:  # of finite numbers, which nothing tells from others
        return "not finite"
    assert out.frames.shape[:2] == (path.states.shape[1], 2), out.frames.shape
    assert out.frames.isfinite().all(), "frames are not finite"
    return "done"
