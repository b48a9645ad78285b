"""--lora: on the command line, in files of settings, and in a clip's record."""

import json
from pathlib import Path

import pytest
import torch
from command_line import WALK, refused
from conftest import ON_CPU
from seeded import normal
from test_base_unet import save_peer

import vfengine as vf
from vfengine.cli import serve_settings
from vfengine.cli.bench import _model_settings, bench_parser
from vfengine.cli.serve import _engine_flags
from vfengine.cli.settings import read_settings
from vfengine.files import write_tensors
from vfengine.formats.lora_files import parse_lora
from vfengine.media.metadata import read_metadata

LAYER = "down.1.0.spatial.attn1.to_q"


def save_lora(file, layer=f"base.{LAYER}", seed=0, out=16, inputs=16) -> Path:
    """A LoRA of rank 2 of one layer."""
    up, down = normal(out, 2, seed=seed + 1), normal(2, inputs, seed=seed + 2)
    write_tensors(file, {f"{layer}.lora_B.weight": up, f"{layer}.lora_A.weight": down})
    return Path(file)


def record_of(name) -> dict:
    return json.loads(read_metadata(name))


def test_a_clip_with_lora_is_recorded_and_made_again(cli):
    save_lora("a.safetensors")
    save_lora("b.safetensors", layer=f"residual.{LAYER}")
    flags = ["--lora", "a.safetensors", "--lora", "b.safetensors:-0.5"]
    assert cli(*WALK, "--output", "plain.webp")[0] == 0
    assert cli(*WALK, *flags, "--output", "c.webp")[0] == 0
    record, plain = record_of("c.webp"), record_of("plain.webp")
    assert record["settings"]["lora"] == ["a.safetensors:1.0", "b.safetensors:-0.5"]
    assert [found["name"] for found in record["files"]["lora"]] == [
        "a.safetensors",
        "b.safetensors",
    ]
    for network in ("base", "residual"):
        assert record["model"]["networks"][network] != plain["model"]["networks"][network]
    again = ["--config", "c.webp", "--output", "again.webp"]
    assert cli(*again)[0] == 0
    assert Path("again.webp").read_bytes() == Path("c.webp").read_bytes()
    assert Path("again.webp").read_bytes() != Path("plain.webp").read_bytes()
    assert cli(*again, "--lora", "a.safetensors")[0] == 0  # a flag takes the list's place
    save_lora("b.safetensors", seed=3)
    refused(cli(*again), "b.safetensors", "is another file")
    Path("b.safetensors").unlink()
    refused(cli(*again), "--lora 'b.safetensors', which is neither here nor beside it")


def test_base_paths_know_the_lora_of_their_network(cli, tiny_checkpoint):
    save_lora("a.safetensors")
    save_lora("b.safetensors", layer=f"residual.{LAYER}")
    common = [*WALK, "--base-cache", "cache", "--json"]
    for flags, hit in (
        ([], False),
        (["--lora=a.safetensors"], False),
        (["--lora=a.safetensors:2"], False),
        (["--lora=a.safetensors"], True),
        (["--lora=b.safetensors"], True),  # its base network is the model's
    ):
        status, out, _ = cli(*common, *flags, "--output", "c.webp")
        assert (status, json.loads(out)["base_cache_hit"]) == (0, hit), flags
    assert json.loads(out)["settings"]["lora"] == ["b.safetensors:1.0"]
    assert cli(*WALK, "--base-trajectory=p.safetensors", "--output=c.webp")[0] == 0
    refused(cli(*WALK, "--base-trajectory=p.safetensors", "--lora=a.safetensors"), "another model")


def test_files_of_settings_have_lists_and_lines_have_none(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lora: [a.safetensors, 'b.safetensors:0.5']\n")
    assert list(map(str, read_settings(["--config", str(file)]).lora)) == [
        "a.safetensors:1.0",
        "b.safetensors:0.5",
    ]
    file.write_text("lora: a.safetensors\n")
    assert list(map(str, read_settings(["--config", str(file)]).lora)) == ["a.safetensors:1.0"]
    assert [str(one) for one in read_settings(["--config", str(file), "--lora=x:2"]).lora] == [
        "x:2.0"
    ]
    for wrong in ("lora: {a: 1}\n", "lora: [[a]]\n", "fps: [1, 2]\n", "lora: a:nan\n"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"must be|expected FILE"):
            read_settings(["--config", str(file)])


def test_servers_and_benches_take_it():
    settings = serve_settings.read_settings(["--lora", "a.safetensors:2", "--lora=b"])
    assert [word for word in _engine_flags(settings) if "lora" in word] == [
        "--lora=a.safetensors:2.0",
        "--lora=b:1.0",
    ]
    assert _model_settings(bench_parser().parse_args(["--lora=b"]))["lora"] == [parse_lora("b")]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("base.nowhere", "changes layers that this model does not have: base.nowhere"),
        (LAYER, f"does not have: {LAYER}"),  # of which network, nothing says
        ("base.conv_out", "is of another architecture"),
    ],
)
def test_refuses_a_lora_of_another_model(layer, message, cli):
    save_lora("a.safetensors", layer)
    refused(cli(*WALK, "--lora=a.safetensors", "--output=c.webp"), "a.safetensors", message)
    assert not list(Path().glob("*.webp"))


def test_refuses_files_before_sampling(cli):
    refused(cli(*WALK, "--lora=none.safetensors"), "none.safetensors", "no such file")
    Path("a.safetensors").write_bytes(b"LoRA")
    refused(cli(*WALK, "--lora=a.safetensors:2"), "a.safetensors", "not a complete")
    refused(cli(*WALK, "--lora="), "expected FILE or FILE:SCALE")


def test_a_published_base_network_takes_lora(tiny_checkpoint, tmp_path):
    base = save_peer(tmp_path)
    lora = save_lora(
        tmp_path / "l.safetensors", "unet.down_blocks.0.resnets.0.time_emb_proj", 0, 16, 64
    )
    plain, changed = (
        vf.VideoFusionPipeline.from_pretrained(
            tiny_checkpoint, base_unet=base, lora=given, **ON_CPU
        )
        for given in (None, [(lora, 2.0)])
    )
    assert plain.fingerprint != changed.fingerprint
    walks = [pipe.walk_base("jump", num_inference_steps=2).final for pipe in (plain, changed)]
    assert not torch.equal(*walks)
    with pytest.raises(ValueError, match="does not have: unet"):
        vf.load_pipeline(tiny_checkpoint, lora=lora)
