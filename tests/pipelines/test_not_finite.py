"""A model that makes NaN: an error and no file, in Python, on the command line and in a server."""

import hashlib
import json
import shutil

import pytest
import torch

import vfengine
from vfengine.files import open_tensors, write_tensors
from vfengine.sampling.finite import NotFinite
from vfengine.serving.making import explained

QUICK = {"num_inference_steps": 2, "offload_base": False}


@pytest.fixture(scope="module")
def broken(tiny_checkpoint, tmp_path_factory):
    """The tiny model, one of whose weights overflows; its files are otherwise in order."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    file, config = folder / "residual.safetensors", folder / "config.json"
    with open_tensors(file) as opened:
        tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
        notes = opened.metadata()
    tensors["conv_out.bias"][0] = torch.inf
    write_tensors(file, tensors, notes)
    values = json.loads(config.read_text())
    values["sha256"]["residual"] = hashlib.sha256(file.read_bytes()).hexdigest()
    config.write_text(json.dumps(values))
    return folder


def test_a_pipeline_names_phase_step_and_dtype(broken):
    pipe = vfengine.load_pipeline(broken, device="cpu", dtype=torch.float32)
    with pytest.raises(NotFinite, match=r"residual phase, step 1 of 2: .* in float32") as caught:
        pipe(label=pipe.labels[0], **QUICK)
    assert explained(caught.value) == ("server_error", str(caught.value))
    base = pipe.preview(label=pipe.labels[0], num_inference_steps=2)
    assert base.trajectory.states.isfinite().all()


def test_the_command_writes_nothing(broken, cli, tmp_path):
    status, _, err = cli("--label", "walk", "--output", "clip.mp4", model=broken)
    assert status == 1 and not list(tmp_path.glob("clip*"))
    assert err.splitlines()[-1].startswith("vfengine.generate: error: residual phase, step 1 of 4")


def test_a_base_path_that_is_not_finite(tiny_checkpoint):
    pipe = vfengine.load_pipeline(tiny_checkpoint, device="cpu", dtype=torch.float32)
    path = pipe.walk_base(num_inference_steps=2)
    path.states[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="trajectory must be finite"):
        pipe(trajectory=path, **QUICK)
