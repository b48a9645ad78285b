"""Files of LoRA: their keys, alphas and scales; what is refused, by name.

What published models make of them is compared with PEFT's in test_lora_peers.py.
"""

import json

import pytest
import torch
from conftest import tiny_config
from seeded import normal

from vfengine.files import write_tensors
from vfengine.formats.checkpoint import load_network
from vfengine.formats.lora import merged
from vfengine.formats.lora_files import LoraFile, lora_files, parse_lora
from vfengine.formats.lora_targets import checkpoint_targets
from vfengine.pipelines.loras import open_loras

CONFIG = tiny_config()
TARGETS = checkpoint_targets(CONFIG)
LINEAR, KERNEL = "down.1.0.spatial.attn1.to_q", "down.0.0.resnet.conv1"
UP, DOWN = normal(16, 2, seed=1), normal(2, 16, seed=2)


def write(file, *, network="base", parts=("lora_B.weight", "lora_A.weight"), **entries):
    """A LoRA of rank 2 of one linear layer of the tiny model; entries: further ones."""
    state = {f"{network}.{LINEAR}.{part}": v for part, v in zip(parts, (UP, DOWN), strict=True)}
    state |= entries
    write_tensors(file, state)
    return file


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.safetensors"


def changes(given) -> dict:
    """What is added to each weight of the base network."""
    updates = open_loras(given, TARGETS).updates["base"]
    return {
        name: merged(torch.zeros(TARGETS["base"].shapes[name.removesuffix(".weight")]), found)
        for name, found in updates.items()
    }


def close(ours, expected) -> bool:
    return torch.allclose(ours, expected, rtol=0, atol=1e-6)


# -- what is added ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        ("lora_B.weight", "lora_A.weight"),
        ("lora_B.default.weight", "lora_A.default.weight"),
        ("lora_up.weight", "lora_down.weight"),
        ("lora.up.weight", "lora.down.weight"),
        ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_of_matrices(parts, prefix, file):
    write(file, parts=parts, network=f"{prefix}base")
    assert close(changes(file)[f"{LINEAR}.weight"], UP @ DOWN)


def test_scale_times_alpha_by_rank(file):
    write(file, **{f"base.{LINEAR}.alpha": torch.tensor(5)})
    expected = -0.5 * 5 / 2 * UP @ DOWN
    assert close(changes((file, -0.5))[f"{LINEAR}.weight"], expected)


def test_kernels_are_composed(file):
    down, up = normal(3, 16, 3, 3, seed=3), normal(16, 3, 1, 1, seed=4)
    write(file, **{f"base.{KERNEL}.lora_A.weight": down, f"base.{KERNEL}.lora_B.weight": up})
    x, weight = normal(1, 16, 5, 5), changes(file)[f"{KERNEL}.weight"]
    conv = torch.nn.functional.conv2d
    assert torch.allclose(conv(x, weight), conv(conv(x, down), up), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"lora_alpha": 3}, 3 / 2),
        ({"lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
        ({"lora_alpha": 3, "alpha_pattern": {"to_q": 8}}, 4),
        ({"lora_alpha": 3, "alpha_pattern": {r"down.*attn2\.to_q": 8, "o_q": 9}}, 3 / 2),
    ],
)
def test_settings_of_peft_beside_the_file(settings, share, tmp_path):
    file = write(tmp_path / "adapter_model.safetensors", network="base_model.model.base")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    for place in (file, tmp_path):
        assert close(changes(place)[f"{LINEAR}.weight"], share * UP @ DOWN)


def test_several_add_up_and_the_networks_read_them(file, tmp_path, tiny_checkpoint):
    other = write(tmp_path / "b.safetensors", network="residual")
    loras = open_loras([file_of(file), (file, 2), other], TARGETS)
    assert [changed for _, changed in loras.loras] == [("base",), ("base",), ("residual",)]
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    digests = loras.digests(config["sha256"])
    assert digests["base"] != config["sha256"]["base"]
    plain, changed = (
        load_network(tiny_checkpoint, CONFIG, "base", updates=updates).unet.state_dict()
        for updates in (None, loras.updates["base"])
    )
    for name, weight in plain.items():
        added = 3 * UP @ DOWN if name == f"{LINEAR}.weight" else torch.zeros_like(weight)
        assert torch.allclose(changed[name], weight + added, rtol=0, atol=1e-5)


def file_of(file):
    return str(write(file))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"base.down.7.to_q.lora_A.weight": DOWN}, "down.7.to_q misses its up matrix"),
        (
            {"base.x.lora_A.weight": DOWN, "base.x.lora_B.weight": UP},
            "changes layers that this model does not have: base.x$",
        ),
        ({"base.x.lora_magnitude_vector": UP}, "lora_magnitude_vector is of DoRA"),
        ({"base_x.dora_scale": UP}, "DoRA"),
        ({"base_x.hada_w1_a": UP}, "LoHa"),
        ({"base_x.lokr_w2": UP}, "LoKr"),
        ({"base_x.lora_mid.weight": UP}, "three matrices"),
        ({"base_x.diff": UP}, "whole weights"),
        ({"base.conv_in.weight": UP}, "base.conv_in.weight is no part of a LoRA"),
        ({f"base.{LINEAR}.lora_B.bias": UP[:, 0]}, "lora_B.bias is no part of a LoRA"),
        ({"base.x.alpha": torch.tensor(1.0)}, "alpha without matrices: base.x"),
        ({f"base.{LINEAR}.alpha": torch.ones(2)}, "must be one number"),
        ({f"base.{LINEAR}.alpha": torch.tensor(float("nan"))}, "alpha is not finite"),
        ({f"base.{LINEAR}.lora_A.weight": DOWN * torch.inf}, "lora_A.weight is not finite"),
        ({f"base.{LINEAR}.lora_A.weight": DOWN[0]}, "is no matrix"),
        ({f"base.{LINEAR}.lora_A.weight": DOWN.int()}, "is no matrix: torch.int32"),
        ({f"base.{LINEAR}.lora_A.weight": DOWN[:1]}, r"\[16, 2\] and down \[1, 16\] do not fit"),
        ({f"base.{LINEAR}.lora_A.weight": DOWN[:, 1:]}, r"changes a weight \[16, 15\].*\[16, 16\]"),
        ({f"base.{LINEAR}.lora_down.weight": DOWN}, "is there twice"),
    ],
)
def test_refuses_by_name(entries, message, file):
    write(file, **entries)
    with pytest.raises(ValueError, match=message) as refused:
        changes(file)
    assert str(file) in str(refused.value)


def test_refuses_what_is_no_file_of_lora(file, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(file)):
        changes(file)
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        changes(tmp_path)
    write_tensors(file, {})
    with pytest.raises(ValueError, match="holds no LoRA"):
        changes(file)
    file.write_bytes(write(file).read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        changes(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save"),
        ({"lora_alpha": "much"}, "alpha of base.* must be a number, got 'much'"),
        ({"lora_alpha": float("nan")}, "is not finite"),
        ({"lora_alpha": 10**400}, "too large for a float"),
        ({"alpha_pattern": ["to_q"]}, "alpha_pattern must be names and numbers"),
        ({"alpha_pattern": {"(": 1}}, "adapter: missing"),
    ],
)
def test_refuses_other_adapters_of_peft(settings, message, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        changes(folder)


# -- arguments -------------------------------------------------------------------------------------


def test_lora_in_words():
    for words, path, scale in (
        ("a.safetensors", "a.safetensors", 1),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a:b:-2", "a:b", -2),
        ("a:b", "a:b", 1),
    ):
        found = parse_lora(words)
        assert (str(found.path), found.scale) == (path, scale)
        assert parse_lora(str(found)) == found
    for words in ("", ":1", "a:nan", "a:inf"):
        with pytest.raises(ValueError, match="expected FILE"):
            parse_lora(words)


def test_lora_in_python(tmp_path):
    one = LoraFile(tmp_path, 1.0)
    assert lora_files(None) == lora_files([]) == ()
    assert (
        lora_files(tmp_path) == lora_files(str(tmp_path)) == lora_files([(tmp_path, 1)]) == (one,)
    )
    for wrong in (3, [(tmp_path, "1")], (tmp_path, 1, 2), [None]):
        with pytest.raises(TypeError, match="lora must be a path"):
            lora_files(wrong)
    with pytest.raises(ValueError, match="must be finite"):
        lora_files((tmp_path, float("nan")))
