"""base_device and residual_device: pipelines in two memories, what they refuse and tell."""

import functools
import json

import pytest
import torch
from command_line import done, refused
from conftest import ON_CPU
from held import loops_of, networks_of
from latent_models import save_latent_model
from published_folders import small_diffusers_folder
from two_memories import Crossing, memories

from vfengine import VideoFusionPipeline, devices
from vfengine.cli import serve, serve_settings
from vfengine.media.metadata import read_metadata
from vfengine.models import UNet
from vfengine.pipelines.load import load_pipeline
from vfengine.pipelines.request import SamplingRequest
from vfengine.pipelines.together import sample_together
from vfengine.serving import engine

__all__ = ["memories"]
CPU, FP32 = torch.device("cpu"), torch.float32
PAIRS = [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")]
WAYS = {
    "one after the other": {},
    "at once": {"overlap_phases": True, "base_path": "stepwise"},
    "clean": {"base_path": "clean"},
    "reused": {"reuse_every": 2},
    "reused at once": {"reuse_every": 2, "overlap_phases": True, "base_path": "stepwise"},
    "motions": {"num_residuals": 2},
    "preview": {"preview": True},
}


@pytest.fixture(scope="module")
def latent_model_folder(tmp_path_factory):
    return save_latent_model(tmp_path_factory.mktemp("models") / "latent")


def opened(folder, base, residual, **options) -> VideoFusionPipeline:
    places = {"device": "cpu", "base_device": base, "residual_device": residual}
    return VideoFusionPipeline.from_pretrained(folder, dtype=FP32, **places, **options)


def made(pipe, **settings):
    request = SamplingRequest(label="walk", num_inference_steps=4, output_type="pt", **settings)
    return pipe.sample(request)


@functools.cache
def on_the_cpu(folder, way):
    return made(VideoFusionPipeline.from_pretrained(folder, **ON_CPU), **WAYS[way])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("way", "capture"),
    [*((way, True) for way in WAYS), ("one after the other", False), ("at once", False)],
)
@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_a_pipeline_in_two_memories(
    kind, way, capture, pair, tiny_checkpoint, latent_model_folder, request
):
    """Its clips and base paths are those of the CPU, bit for bit, in every call."""
    folder = {"pixels": tiny_checkpoint, "latents": latent_model_folder}[kind]
    alone = on_the_cpu(folder, way)
    request.getfixturevalue("memories")
    pipe = opened(folder, *pair, capture=capture)
    for _ in range(2):  # the second by the loops, and the graphs, of the first
        out = made(pipe, **WAYS[way])
        assert out.frames.device == out.trajectory.states.device == torch.device(pair[1])
        assert torch.equal(out.frames.cpu(), alone.frames)
        assert torch.equal(out.trajectory.states.cpu(), alone.trajectory.states)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_walked_path_is_handed_over_once(pair, tiny_checkpoint, memories):
    """Wherever it is for: a clip, a preview, the path alone, a batch of requests, a cache."""
    pipe = opened(tiny_checkpoint, *pair)
    size = (5, 1, 3, 16, 16)
    asked = {"label": "walk", "num_inference_steps": 4}
    for call in (
        lambda: pipe(**asked),
        lambda: pipe.preview(**asked),
        lambda: pipe.walk_base(**asked),
        lambda: sample_together(pipe, [SamplingRequest(**asked)]),
    ):
        memories.crossed.clear()
        call()
        paths = [one for one in memories.crossed if len(one.shape) == 5 and one.shape[0] == 5]
        assert paths == [Crossing(*pair, size)]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_cache_serves_any_device(pair, tiny_checkpoint, tmp_path, request):
    """A path of one device is found by a pipeline of others, and follows to the same clip."""
    cache = {"base_cache": tmp_path / "paths"}
    alone = made(VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU), **cache)
    request.getfixturevalue("memories")
    out = made(opened(tiny_checkpoint, *pair), **cache)
    assert out.timings["base"] == 0.0
    assert torch.equal(out.frames.cpu(), alone.frames)


def test_the_base_network_stays_on_a_device_of_its_own(tiny_checkpoint, memories):
    """Nothing else needs its room; offload_base frees it all the same."""
    pipe = opened(tiny_checkpoint, "cpu", "cuda")
    made(pipe)
    assert networks_of(pipe).keys() == {"base", "residual"}
    made(pipe, offload_base=True)
    assert networks_of(pipe).keys() == loops_of(pipe).keys() == {"residual"}


def test_a_request_names_devices_by_phase(tiny_checkpoint, memories):
    for given, base, residual in (
        ({"device": "cuda:1"}, "cuda:1", "cuda:1"),
        ({"device": "cuda:1", "base_device": "cpu"}, "cpu", "cuda:1"),
        ({"device": "cuda:1", "residual_device": "cpu"}, "cuda:1", "cpu"),
        ({"device": "cpu", "base_device": "cuda", "residual_device": "cuda:0"}, "cuda:0", "cuda:0"),
        ({"device": "cpu", "base_device": "cuda:0", "residual_device": "auto"}, "cuda", "cuda"),
    ):
        pipe = VideoFusionPipeline.from_pretrained(tiny_checkpoint, dtype=FP32, **given)
        phases = {"text": base, "base": base, "residual": residual, "decode": residual}
        assert {name: str(pipe.place(name)) for name in phases} == phases
        assert pipe.device == torch.device(residual)


def test_auto_dtype_is_fast_on_both_devices(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(devices, "bfloat16_is_faster", lambda device: device == cuda)
    assert devices.chosen_dtype("auto", cuda) == torch.bfloat16
    assert devices.chosen_dtype("auto", CPU, cuda) == torch.float32


# -- refusals --------------------------------------------------------------------------------------

FLAGS = ("--base-device", "--residual-device")


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("toaster", "unknown device 'toaster', expected cpu, cuda or cuda:<index>"),
        ("mps", "device 'mps' is not supported, expected cpu or cuda"),
        ("cuda", "device 'cuda' asked for, but torch finds no CUDA device here"),
    ],
)
def test_a_phase_refuses_devices(cli, flag, name, words):
    setting = flag[2:].replace("-", "_")
    assert refused(cli("--label", "walk", flag, name), f"{setting}: {words}")


def test_a_device_that_no_phase_uses_is_refused(tiny_checkpoint):
    both = {"base_device": "cpu", "residual_device": "cpu"}
    with pytest.raises(ValueError, match=r"^unknown device 'toaster'"):
        VideoFusionPipeline.from_pretrained(tiny_checkpoint, device="toaster", **both)


def test_a_phase_refuses_a_gpu_too_many(tiny_checkpoint, memories):
    with pytest.raises(
        ValueError, match="base_device: device 'cuda:2' asked for, but torch finds 2"
    ):
        VideoFusionPipeline.from_pretrained(tiny_checkpoint, device="cuda", base_device="cuda:2")


@pytest.mark.parametrize("flag", FLAGS)
def test_models_without_phases_refuse_their_devices(cli, flag, tiny_video_checkpoint, tmp_path):
    setting = flag[2:].replace("-", "_")
    result = cli("--label", "walk", flag, "cpu", model=tiny_video_checkpoint)
    assert refused(result, "a plain video model has no base path", f"so it takes no {setting}")
    folder = small_diffusers_folder(tmp_path / "published")
    result = cli("--prompt", "a dog", flag, "cpu", model=folder)
    assert refused(result, "neither labels nor a base path", f"so it takes no {setting}")


def test_a_unet_in_memory_is_where_the_base_phase_is(tiny_checkpoint, memories):
    config = VideoFusionPipeline.from_pretrained(tiny_checkpoint, **ON_CPU).config.base
    unet = UNet(type(config)(num_classes=None))
    pipe = opened(tiny_checkpoint, None, "cuda:1", base_unet=unet)
    assert (pipe.place("base"), str(pipe.device)) == (CPU, "cuda:1")
    with pytest.raises(ValueError, match=r"base_unet: is torch.float32 on cpu, the pipeline"):
        opened(tiny_checkpoint, "cuda:1", "cpu", base_unet=unet)


def test_a_line_has_no_device_of_its_own(cli, tmp_path):
    (tmp_path / "lines").write_text('{"label": "walk", "base_device": "cpu"}\n')
    status, _, err = cli("--prompts", "lines", "--output", "{index}.mp4")
    assert status == 1
    assert "base_device is the same for all lines: --base-device of the command" in err


# -- what is told ----------------------------------------------------------------------------------


def test_a_given_path_leaves_the_base_device_idle(cli, memories, tmp_path):
    words = ["--label", "walk", "--base-trajectory", "path.safetensors", "--json", "--no-metadata"]
    first = done(cli(*words, "--output", "a.png"))
    again = done(cli(*words, "--output", "b.png", "--base-device", "cuda:1"))
    assert again["base_trajectory_read"] and not first["base_trajectory_read"]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_memory_is_foretold_by_device(cli, memories):
    words = ["--label", "walk", "--dry-run"]
    alone = done(cli(*words, "--json"))
    told = done(cli(*words, "--json", "--base-device", "cuda:1"))
    assert (told["device"], told["base_device"]) == ("cpu", "cuda:1")
    assert alone["base_device"] is None
    one, two = alone["memory_estimate"], told["memory_estimate"]
    assert list(one["devices"]) == ["cpu"] and sorted(two["devices"]) == ["cpu", "cuda:1"]
    for memory in (one, two):
        assert memory["peak"] - memory["process"] == sum(memory["devices"].values())
    assert two["devices"]["cuda:1"] >= two["weights"]["base"] + two["activations"]["base"]
    assert two["devices"]["cpu"] >= two["weights"]["residual"] + two["clips"]
    lines = cli(*words, "--base-device", "cuda:1")[1].splitlines()
    assert any(line.endswith("on cuda:1 (base) and cpu") for line in lines)
    assert any(line.startswith("  devices   without the process: cpu ") for line in lines)


def test_a_clip_tells_of_the_base_device(cli, memories, tmp_path, capsys):
    words = ["--label", "walk"]
    status, out, _ = cli(*words, "--output", "two.png", "--base-device", "cuda:1")
    assert status == 0 and "float32 on cuda:1 (base) and cpu," in out
    assert cli(*words, "--output", "one.png")[0] == 0
    record = json.loads(read_metadata(tmp_path / "two.png"))
    assert (record["device"], record["base_device"]) == ("cpu", "cuda")
    assert "base_device" not in json.loads(read_metadata(tmp_path / "one.png"))
    status, _, err = cli("--config", "two.png", "--output", "again.png")
    assert status == 0
    assert "was made on 'cpu' with the base on 'cuda', this is cpu: the new clip may differ" in err
    status, _, err = cli("--config", "two.png", "--output", "again.png", "--base-device", "cuda")
    assert (status, err) == (0, "")


def test_a_server_hands_devices_to_its_engines():
    settings = serve_settings.read_settings(["--base-device", "cuda:1", "--residual-device", "cpu"])
    options = engine._parser().parse_args(["--store", "jobs", *serve._engine_flags(settings)])
    assert (options.base_device, options.residual_device) == ("cuda:1", "cpu")


def test_load_pipeline_takes_devices_of_phases(tiny_checkpoint, memories):
    pipe = load_pipeline(tiny_checkpoint, device="cpu", dtype=FP32, base_device="cuda:1")
    assert (str(pipe.place("base")), str(pipe.place("decode"))) == ("cuda:1", "cpu")
