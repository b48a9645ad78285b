"""Names by which files of earlier releases are recognised: none may change.

Base paths, caches, training states and weights were written under these names and in this order.
"""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from conftest import ON_CPU, save_tiny, tiny_config, tiny_video_config
from pixel_model import pixel_config
from safetensors import safe_open
from test_training import model_named_by, new_trainer

from vfengine.diffusion.base_path import BaseTrajectory
from vfengine.diffusion.schedule import NoiseSchedule
from vfengine.diffusion.solvers import solver_table
from vfengine.formats.load import fingerprint
from vfengine.models import PlannedUNet, UNet, UNetConfig, vdm_config
from vfengine.models.unet import empty_unet
from vfengine.native import vfengine_native
from vfengine.pipelines.videofusion import VideoFusionPipeline

PIXELS = pixel_config()
SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 2e-2)
LATER = UNetConfig(  # with an entry that configurations have gained
    block_out_channels=(16,),
    layers_per_block=(1,),
    spatial_attention=(True,),
    temporal_attention=(True,),
    temporal_conv=(True,),
    context_dim=12,
    head_dim=8,
    norm_over_frames=True,
)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- configurations --------------------------------------------------------------------------------


def test_text_of_a_configuration_is_as_ever():
    """Its class's name is a part: training states are named by a hash of it."""
    assert repr(LATER) == (
        "UNetConfig(in_channels=3, out_channels=3, block_out_channels=(16,), layers_per_block=(1,),"
        " patch_size=1, spatial_attention=(True,), temporal_attention=(True,),"
        " temporal_conv=(True,), temporal_conv_depth=1, frame_embedding=False, num_classes=None,"
        " context_dim=12, position_buckets=32, head_dim=8, norm_groups=8, feed_forward_mult=2,"
        " scale_shift=True)"
    )


@pytest.mark.parametrize(
    ("config", "text", "identity"),
    [
        (UNetConfig(), "0e9494467c117f45", "60e83cbb7d5c9407"),
        (LATER, "124a1ab48af907ce", "45c3bd9b5adda518"),
        (PIXELS.base, "86b6193a87e2872a", "b7f6112f668eb140"),
        (PIXELS.residual, "7e5931194dd97b66", "72e6467475e5da5d"),
        (vdm_config(PIXELS.base), "064ee4b171e05456", "25f3d2a68fb87a47"),
    ],
    ids=["default", "later", "base", "residual", "vdm"],
)
def test_identity_of_a_configuration_is_as_ever(config, text, identity):
    """In its order, too: fingerprints of networks hash the text of it."""
    assert digest(repr(config)) == text
    assert digest(repr(config.identity())) == identity


def test_checkpoint_is_named_as_ever():
    """By the start of its base network's hash: that of the first model that the package carried."""
    base = "26aa7a9eab5b1542dccba2d17043a98bc1c1d26acf8ea09574b2ca2082362cbc"
    assert replace(PIXELS, sha256={"base": base}).fingerprint() == "26aa7a9eab5b1542"


# -- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PIXELS.base, "070e6266c2050359"),
        (PIXELS.residual, "dabf5bd0a551fa5d"),
        (vdm_config(PIXELS.base), "197a7038120b656a"),
        (LATER, "100a3c10569737f7"),
    ],
    ids=["base", "residual", "vdm", "later"],
)
def test_weights_have_the_names_shapes_and_order_that_they_had(config, expected):
    state = empty_unet(config).state_dict()
    assert digest(json.dumps([[name, *value.shape] for name, value in state.items()])) == expected


@pytest.mark.parametrize(
    ("notes", "expected"), [([], "fa0a91c1f0934694"), (["epsilon"], "30091a6012878ca5")]
)
def test_fingerprint_of_a_network_in_memory_is_as_ever(notes, expected):
    """Of a UNet; a PlannedUNet's also names the instruction set that its weights are packed for."""
    unet = UNet(LATER)
    with torch.no_grad():
        for index, tensor in enumerate(unet.state_dict().values()):
            tensor.fill_(index / 8)
    assert fingerprint(unet, *notes) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LATER, "a2e0bdf4ec27e921"),
        (UNetConfig(spatial_attention=(False, True, True), context_dim=12), "9584fdae81bcee82"),
        (PIXELS.residual, "57ba743883d2551e"),
    ],
    ids=["later", "image", "residual"],
)
def test_fingerprint_of_a_planned_network_is_as_ever(config, expected):
    """Planned networks made the paths; weights are packed as on any machine."""
    unet = UNet(config)
    with torch.no_grad():
        for index, tensor in enumerate(unet.state_dict().values()):
            tensor.fill_(index / 8)
    isa = vfengine_native.cpu_isa()
    vfengine_native.set_cpu_isa("baseline")
    try:
        assert fingerprint(PlannedUNet(unet, torch.float32)) == expected
    finally:
        vfengine_native.set_cpu_isa(isa)


def test_fingerprint_of_a_networks_files_is_as_ever(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    assert fingerprint(tmp_path) == "5887059fb6d13b23"
    assert fingerprint(tmp_path, "v_prediction") == "395c33fb1790f669"


# -- training --------------------------------------------------------------------------------------


def test_state_of_a_plain_video_model_is_named_as_ever(tmp_path):
    """For a decomposed model see test_training_state.py."""
    trainer = new_trainer(config=tiny_video_config())
    assert model_named_by(trainer, tmp_path / "state") == "2098ca3d37b981fd"


@pytest.mark.parametrize(
    ("config", "expected"),
    [(tiny_config(), "0c2e911b263ffc2a"), (tiny_video_config(), "1a582a1bef31535b")],
    ids=["decomposed", "vdm"],
)
def test_training_state_numbers_its_tensors_as_ever(config, expected, tmp_path):
    """parameter.0 is the first weight of the first network, as it was when the state was written"""
    trainer = new_trainer(config=config)
    names = [
        [name, key, *value.shape]
        for name, network in trainer.networks.items()
        for key, value in network.named_parameters()
    ]
    assert digest(json.dumps(names)) == expected
    trainer.save(tmp_path / "state")
    with safe_open(tmp_path / "state", "pt") as stored:
        assert set(stored.metadata()) == {"model", "options", "steps_done"}
        shapes = [stored.get_slice(f"parameter.{i}").get_shape() for i in range(len(names))]
    assert shapes == [shape for _, _, *shape in names]


# -- schedules and solvers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (NoiseSchedule.linear(), "cceb166efe4a39c4"),
        (NoiseSchedule.scaled_linear(), "feaa14fe1393b7ed"),
        (NoiseSchedule.cosine(), "7ec53a3f730e4d10"),
        (PIXELS.noise_schedule(), "cceb166efe4a39c4"),
    ],
    ids=["linear", "scaled_linear", "cosine", "model"],
)
def test_fingerprint_of_a_schedule_is_as_ever(schedule, expected):
    assert schedule.fingerprint() == expected


@pytest.mark.parametrize(
    ("solver", "eta", "spacing", "expected"),
    [
        ("ddim", 0.0, "leading", "0d4224c13ae8deec"),
        ("ddim", 0.5, "trailing", "2a351655b5c45db8"),
        ("ddpm", 0.0, "leading", "f90351ea7c90b385"),
        ("dpmsolver", 0.0, "linspace", "824666e09981172b"),
        ("dpmsolver++", 0.0, "leading", "3f192a89eb6ab992"),
        ("unipc", 0.0, "leading", "b18ab6277a8afb4a"),
    ],
)
def test_table_of_a_solver_is_as_ever(solver, eta, spacing, expected):
    """To ten decimals: the last bits of logarithms and of the quadrature are the machine's."""
    table = solver_table(solver, SCHEDULE, 20, eta, spacing)
    numbers = [
        [round(value, 10) + 0.0 for value in part.flatten().tolist()]  # -0.0 is 0.0
        for part in (table.alphas_cumprod, table.coeffs, table.mixing)
    ]
    text = json.dumps([table.solver, table.eta, table.timesteps.tolist(), *numbers])
    assert digest(text) == expected


# -- base paths ------------------------------------------------------------------------------------


def test_base_path_is_kept_under_the_name_that_it_had(tmp_path):
    """Under another name it would be sampled again, although the cache has it."""
    pipe = VideoFusionPipeline.from_pretrained(save_tiny(tmp_path / "model"), **ON_CPU)
    pipe.walk_base("cartwheel", base_seed=7, num_inference_steps=2, base_cache=tmp_path / "x")
    assert [file.name for file in (tmp_path / "x").iterdir()] == [
        "22d0bf2ce794639cc996d2063c7b5b84.safetensors"
    ]


def test_file_of_a_base_path_is_written_as_ever(tmp_path):
    image = torch.arange(6.0).view(1, 1, 2, 3)
    path = BaseTrajectory.from_image(
        image, schedule=SCHEDULE, num_inference_steps=3, solver="unipc", metadata={"model": "x"}
    )
    path.save(tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {
            "format": "vfengine.base_trajectory.2",
            "solver": "unipc",
            "eta": "0.0",
            "schedule_id": "cceb166efe4a39c4",
            "base_path": "clean",
            "metadata": '{"model": "x"}',
        }
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: (part.get_dtype(), part.get_shape()) for name, part in tensors.items()} == {
            "alphas_cumprod": ("F64", [4]),
            "coeffs": ("F64", [3, 3]),
            "mixing": ("F64", [3, 3, 3]),
            "states": ("F32", [4, 1, 1, 2, 3]),
            "timesteps": ("I64", [3]),
        }
    assert torch.equal(BaseTrajectory.load(tmp_path / "x", schedule=SCHEDULE).states, path.states)
