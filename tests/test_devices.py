"""The device and dtype that "auto" stands for, and where they are reported."""

import json

import pytest
import torch
from conftest import ON_CPU

from vfengine import VideoFusionPipeline, devices
from vfengine.models import PlannedUNet, UNet
from vfengine.native import vfengine_native

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
from_pretrained = VideoFusionPipeline.from_pretrained


@pytest.fixture
def machine(monkeypatch):
    """Makes torch and vfengine_native see a machine of this kind."""

    def make(capability=None, isa="avx2", gain=2.0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        has_bf16 = isa in ("avx512_bf16", "amx")
        monkeypatch.setattr(vfengine_native, "cpu_has_bf16", lambda: has_bf16)
        monkeypatch.setattr(vfengine_native, "bf16_gain", lambda: gain)

    return make


@pytest.mark.parametrize(
    ("kind", "device", "dtype"),
    [
        ({"capability": (9, 0)}, "cuda", torch.bfloat16),
        ({"capability": (8, 0)}, "cuda", torch.bfloat16),
        ({"capability": (7, 5), "isa": "avx512_bf16"}, "cuda", torch.float32),
        ({"isa": "avx512_bf16"}, "cpu", torch.bfloat16),
        ({"isa": "avx512_bf16", "gain": 1.0}, "cpu", torch.float32),
        ({"isa": "amx", "gain": 10.0}, "cpu", torch.bfloat16),
        ({"isa": "avx512"}, "cpu", torch.float32),
        ({"isa": "baseline"}, "cpu", torch.float32),
    ],
)
def test_auto(machine, tiny_checkpoint, kind, device, dtype):
    machine(**kind)
    pipe = from_pretrained(tiny_checkpoint)
    assert (pipe.device, pipe.dtype) == (torch.device(device), dtype)


def test_what_is_asked_for_by_name_is_not_chosen(machine, tiny_checkpoint):
    machine(capability=(9, 0), isa="avx512_bf16")
    pipe = from_pretrained(tiny_checkpoint, **ON_CPU)
    assert (pipe.device, pipe.dtype) == (CPU, torch.float32)
    machine()
    with pytest.raises(ValueError, match="device 'cuda' asked for, but torch finds no CUDA device"):
        from_pretrained(tiny_checkpoint, device="cuda")


def test_auto_dtype_is_that_of_the_device_asked_for(machine):
    machine(capability=(9, 0), isa="avx2")
    assert devices.chosen_dtype("auto", CPU) == torch.float32
    assert devices.chosen_dtype("auto", CUDA) == torch.bfloat16
    assert devices.chosen_dtype(torch.float16, CPU) == torch.float16


@pytest.mark.parametrize("dtype", [torch.int8, "float32", "bf16", None])
def test_rejects_dtype(dtype):
    with pytest.raises(ValueError, match=r"dtype must be 'auto' or one of \(torch.float32"):
        devices.chosen_dtype(dtype, CPU)


@pytest.mark.parametrize("planned", [False, True])
def test_auto_follows_a_base_unet_in_memory(machine, tiny_checkpoint, planned):
    machine(capability=(9, 0))
    config = from_pretrained(tiny_checkpoint, **ON_CPU).config.base
    unet = UNet(type(config)(num_classes=None))
    base = PlannedUNet(unet, torch.float32) if planned else unet
    pipe = from_pretrained(tiny_checkpoint, base_unet=base)
    assert (pipe.device, pipe.dtype) == (CPU, torch.float32)


# -- the command -----------------------------------------------------------------------------------


def test_the_command_says_what_was_chosen(cli, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dtype = "bfloat16" if devices.bfloat16_is_faster(CPU) else "float32"
    auto = ["--label", "walk", "--device", "auto", "--dtype", "auto"]
    status, out, _ = cli(*auto)
    assert status == 0
    assert f"4 steps, {dtype} on cpu, " in out
    settings = json.loads(cli(*auto, "--json")[1])["settings"]
    assert (settings["device"], settings["dtype"]) == ("cpu", dtype)


def test_the_command_says_what_was_asked_for(cli):
    status, out, _ = cli("--label", "walk", "--dtype", "fp16")
    assert status == 0
    assert "4 steps, float16 on cpu, " in out


def test_dependent_launches_can_be_switched_off(monkeypatch):
    monkeypatch.delenv("VFENGINE_PDL", raising=False)
    assert devices.dependent_launches()
    for value, depend in (("", True), ("on", True), ("off", False)):
        monkeypatch.setenv("VFENGINE_PDL", value)
        assert devices.dependent_launches() is depend
    monkeypatch.setenv("VFENGINE_PDL", "never")
    with pytest.raises(ValueError, match="VFENGINE_PDL must be on or off, got 'never'"):
        devices.dependent_launches()
