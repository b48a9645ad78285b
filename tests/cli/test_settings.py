"""The settings of python -m vfengine.generate: flags, files of settings, documentation."""

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
from command_line import refused

import vfengine as vf
from vfengine.cli import settings as generate_settings
from vfengine.cli.settings import DEFAULTS, read_settings
from vfengine.cli.settings_page import settings_page
from vfengine.diffusion import solvers
from vfengine.names import SOLVERS
from vfengine.pipelines.conflicts import CONFLICTS
from vfengine.pipelines.request import SamplingRequest, field_names


def test_defaults_are_the_pipelines():
    """tests/pipelines/test_request.py compares the defaults of a call with the request's."""
    for field in fields(SamplingRequest):
        assert DEFAULTS.get(field.name, field.default) == field.default, field.name
    opened = vf.VideoFusionPipeline.from_pretrained.__kwdefaults__
    for name in ("device", "dtype", "base_unet"):
        assert DEFAULTS[name] == opened[name], name
    assert tuple(solvers.NUM_HISTORY) == SOLVERS


def test_every_flag_takes_underscores():
    for option in generate_settings.generate_parser()._option_string_actions:
        if "-" not in option[2:]:
            continue
        action = generate_settings.generate_parser()._option_string_actions[option]
        if action.nargs == 0:
            hyphens, underscores = [option], ["--" + option[2:].replace("-", "_")]
        else:
            value = "clean" if "path" in option else "lanczos" if "filter" in option else "7"
            hyphens = [option, value]
            underscores = ["--" + option[2:].replace("-", "_") + "=" + value]
        more = ["--prompts", "lines", "--ray"] if "workers" in option else []
        assert read_settings([*more, *hyphens]) == read_settings([*more, *underscores])
        assert read_settings([*more, *hyphens]) != read_settings(more)


def test_values_keep_their_underscores():
    assert read_settings(["--output", "my_file.mp4"]).output == "my_file.mp4"
    assert read_settings(["--base_trajectory=a_b.safetensors"]).base_trajectory == "a_b.safetensors"


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_config_file_and_flags_over_it(tmp_path, suffix):
    file = tmp_path / f"c.{suffix}"
    values = {
        "label": "walk",
        "num-frames": 8,
        "guidance_scale": 3,
        "json": True,
        "quiet": False,
        "seed": 5,
        "fps": None,
        "dtype": "bf16",
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    file.write_text(json.dumps(values) if suffix == "json" else "\n".join(lines))
    settings = read_settings(["--config", str(file), "--num-frames", "2"])
    assert (settings.label, settings.num_frames, settings.guidance_scale) == ("walk", 2, 3.0)
    assert (settings.json, settings.quiet, settings.fps) == (True, False, None)
    assert (settings.base_seed, settings.residual_seed) == (5, 6)
    assert settings.dtype == "bfloat16"
    assert read_settings(["--config", str(file), "--seed", "9"]).residual_seed == 10
    assert read_settings(["--config", str(file), "--base-seed", "9"]).residual_seed == 6


def test_seed_flags():
    for argv, expected in (
        ([], (0, 1)),
        (["--seed", "0"], (0, 1)),
        (["--seed", "7"], (7, 8)),
        (["--seed", "7", "--residual-seed", "3"], (7, 3)),
        (["--base-seed", "4"], (4, 1)),
        (["--base-seed", str(2**64 - 1)], (2**64 - 1, 1)),
    ):
        settings = read_settings(argv)
        assert (settings.base_seed, settings.residual_seed) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("labels: walk", ["unknown entry 'labels'", "guidance_scale", "num_videos"]),
        ("list_labels: true", ["unknown entry 'list_labels'"]),
        ("config: other.yaml", ["unknown entry 'config'"]),
        ("num_frames: many", ["--num-frames", "expected a whole number from 1 to 4096", "'many'"]),
        ("num_frames: [4]", ["num_frames must be one value"]),
        ("label: yes", ["label must be one value, got True"]),
        ("quiet: 1", ["quiet must be true or false, got 1"]),
        ("seed: 1\nnum_frames: 4\nnum-frames: 4", ["num_frames is there twice"]),
        ("- walk", ["expected names and values"]),
        ("a: b: c", ["cannot be read"]),
        ("[" * 5000, ["nested too deeply"]),
    ],
)
def test_bad_config_files(cli, tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert refused(cli("--label", "walk", "--config", "c.yaml"), "--config c.yaml: ", *words)
    assert os.listdir() == ["c.yaml"]


def test_unreadable_config_files(cli, tmp_path):
    assert refused(cli("--config", "c.yaml"), "--config c.yaml: No such file")
    (tmp_path / "c.json").write_text('{"label": "walk"')
    assert refused(cli("--config", "c.json"), "--config c.json: cannot be read")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xff")
    assert refused(cli("--config", "c.yaml"), "--config c.yaml: cannot be read")


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_config_file_takes_switches_either_way(tmp_path, suffix):
    file = tmp_path / f"c.{suffix}"
    for text, value in (("true", True), ("false", False), ("null", None)):
        file.write_text(f'{{"offload_base": {text}, "no-capture": true, "json": false}}')
        settings = read_settings(["--config", str(file)])
        assert settings.offload_base is value
        assert (settings.no_capture, settings.json) == (True, False)
        assert ("offload_base" in settings.given) == (value is not None)
        assert read_settings(["--config", str(file), "--no-offload-base"]).offload_base is False
    file.write_text('{"offload_base": "no"}')
    with pytest.raises(ValueError, match="offload_base must be true or false, got no"):
        read_settings(["--config", str(file)])
    file.write_text('{"preview": null}')
    with pytest.raises(ValueError, match="preview must be true or false, got None"):
        read_settings(["--config", str(file)])


def test_seed_is_not_a_seed_by_name(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"residual_seed": 4, "base-seed": 3}')
    with_file = ["--config", str(file)]
    assert read_settings(with_file).given == {"base_seed", "residual_seed"}
    assert read_settings([*with_file, "--seed", "5"]).given == set()
    assert read_settings(["--preview", "--seed", "5"]).residual_seed == 6
    with pytest.raises(ValueError, match="--preview cannot go with --residual-seed"):
        read_settings([*with_file, "--preview"])


def test_names_in_the_conflicts_are_flags():
    named = {name for conflict in CONFLICTS for name in (conflict.setting, conflict.other)}
    assert named <= DEFAULTS.keys() | {"trajectory", "lam"}  # which calls from Python have


def test_fields_of_requests_are_flags():
    from_python = {"trajectory", "lam", "sample_offset", "output_type"}
    assert field_names(SamplingRequest) - from_python <= DEFAULTS.keys()


def test_documentation_is_written_from_the_tables():
    """`make settings` writes it."""
    page = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_page()
