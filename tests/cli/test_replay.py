"""--config CLIP: every clip tells what made it, and is made again from that byte for byte."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import WALK, frames_of, refused
from conftest import ON_CPU, save_tiny
from PIL import Image
from published_folders import small_diffusers_folder
from test_base_unet import save_peer

import vfengine as vf
from vfengine.cli import replay
from vfengine.cli.generate import main
from vfengine.cli.settings import DEFAULTS, read_settings
from vfengine.media.metadata import read_metadata
from vfengine.media.video import SUFFIXES, write_video
from vfengine.pipelines import clip_settings as records
from vfengine.pipelines.clip_settings import settings_text


@pytest.fixture
def again(capsys, monkeypatch, tmp_path, tiny_checkpoint):
    """Runs a command line without any settings but the model's folder: (status, out, err)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, model=tiny_checkpoint):
        status = main([*map(str, argv), "--model", str(model), "--device", "cpu"])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def record_of(name):
    return json.loads(read_metadata(name))


def same(again, clip, *flags, model=None):
    """Asserts that a clip made again under another name, elsewhere, has the same bytes."""
    copy = Path("elsewhere", f"other{Path(clip).suffix}")
    copy.parent.mkdir(exist_ok=True)
    settings = {} if model is None else {"model": model}
    status, _, err = again("--config", clip, *flags, "--output", copy, "--quiet", **settings)
    assert (status, err) == (0, "")
    assert copy.read_bytes() == Path(clip).read_bytes()
    return True


# -- clips made again ------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_clips_of_every_format_are_made_again(cli, again, suffix):
    clip = f"a{suffix}"
    assert cli(*WALK, "--seed", 5, "--num-frames", 5, "--fps", 12, "--output", clip)[0] == 0
    assert same(again, clip)
    status, out, err = again("--config", clip)
    assert (status, err, out.split(":")[0]) == (0, "", f"a-again{suffix}")
    assert Path(f"a-again{suffix}").read_bytes() == Path(clip).read_bytes()


@pytest.mark.parametrize(
    ("flags", "suffix"),
    [
        (["--guidance-scale", "3.3", "--solver", "unipc", "--scale", "2"], ".mp4"),
        (["--solver", "ddim", "--eta", "0.7", "--base-path", "clean"], ".webm"),
        (["--num-frames", "7", "--window", "4", "--window-overlap", "3"], ".gif"),
        (["--num-frames", "7"], ".webp"),  # windows by default
        (["--num-frames", "7", "--loop"], ".webp"),
        (["--dtype", "bf16", "--scale", "3", "--scale-filter", "lanczos"], ".png"),
        (["--codec", "hevc", "--crf", "30", "--chroma", "444"], ".mp4"),
        (["--codec", "av1", "--crf", "40"], ".webm"),
        (["--codec", "h264", "--crf", "0"], ".mkv"),
        (["--overlap-phases"], ".mkv"),
        (["--preview"], ".webp"),
        (["--batch-size", "3", "--no-offload-base", "--base-cache", "cache"], ".webp"),
    ],
)
def test_clips_of_all_settings_are_made_again(cli, again, flags, suffix):
    assert cli(*WALK, "--base-seed", 3, *flags, "--output", f"a{suffix}")[0] == 0
    assert same(again, f"a{suffix}")


@pytest.mark.parametrize(
    "flags",
    [
        ["--num-residuals", "4"],
        ["--num-residuals", "4", "--batch-size", "3"],  # the last batch is of one clip
        ["--num-videos", "3", "--batch-size", "2"],
        ["--num-videos", "3", "--preview"],
        ["--num-videos", "2", "--sample-offset", "7"],
        ["--num-residuals", "3", "--sample-offset", "2", "--batch-size", "2"],
        ["--num-residuals", "2", "--base-offset", "5", "--batch-size", "1", "--eta", "0.5"],
        ["--num-videos", "2", "--base-offset", "1", "--eta", "0.5"],
    ],
)
def test_one_clip_of_several_is_made_again(cli, again, flags):
    assert cli(*WALK, *flags, "--output", "a.webp")[0] == 0
    names = sorted(Path().glob("a-*.webp"))
    assert len({name.read_bytes() for name in names}) == len(names) > 1
    assert all(same(again, name) for name in names)


def test_places_of_clips(cli):
    frames = {}
    for name, flags in {
        "videos": ["--num-videos", 4],
        "later": ["--num-videos", 2, "--sample-offset", 2],
        "motions": ["--num-residuals", 4],
        "motions-of-2": ["--num-residuals", 2, "--base-offset", 2, "--sample-offset", 2],
        "look-of-1": ["--base-offset", 1, "--sample-offset", 3],
    }.items():
        cli(*WALK, *flags, "--output", f"{name}.webp")
        found = sorted(Path().glob(f"{name}-00?.webp")) or [Path(f"{name}.webp")]
        frames[name] = [frames_of(file) for file in found]

    def equal(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    assert equal(frames["later"], frames["videos"][2:])
    assert equal(frames["motions-of-2"][:1], frames["videos"][2:3])
    for k, base in (("motions", 0), ("motions-of-2", 2), ("look-of-1", 1)):
        for clip in frames[k]:
            assert np.array_equal(clip[2], frames["videos"][base][2])
    assert np.array_equal(frames["motions"][0], frames["videos"][0])


def test_clips_of_prompts_are_made_again(cli, again, tmp_path):
    from latent_models import save_latent_model

    model = save_latent_model(tmp_path.parent / f"{tmp_path.name}-latent")
    prompt = ["--prompt", 'a "dog"\n jümps = -1', "--negative-prompt=-slow"]
    assert cli(*prompt, "--num-videos", 2, "--output", "a.mp4", model=model)[0] == 0
    record = record_of("a-001.mp4")
    assert record["settings"]["prompt"] == 'a "dog"\n jümps = -1'
    assert {"base", "residual", "autoencoder", "text_encoder"} <= record["model"]["networks"].keys()
    assert all(same(again, f"a-00{k}.mp4", model=model) for k in range(2))
    assert cli(*WALK, "--output", "b.mp4", model=model)[0] == 0
    assert same(again, "b.mp4", model=model)


def test_clips_of_a_plain_video_model_are_made_again(cli, again, tiny_video_checkpoint):
    model = {"model": tiny_video_checkpoint}
    assert cli(*WALK, "--num-videos", 2, "--output", "a.webp", **model)[0] == 0
    assert all(same(again, f"a-00{k}.webp", **model) for k in range(2))
    assert "base_seed" not in record_of("a-001.webp")["settings"]


def test_a_clip_is_made_again_in_another_process(cli, tiny_checkpoint):
    cli(*WALK, "--num-residuals", 2, "--output", "a.mp4")
    command = [sys.executable, "-m", "vfengine.generate", "--config", "a-001.mp4", "--quiet"]
    command += ["--model", str(tiny_checkpoint), "--device", "cpu", "--output", "b.mp4"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")
    assert Path("b.mp4").read_bytes() == Path("a-001.mp4").read_bytes()


# -- what a clip tells -----------------------------------------------------------------------------


def test_the_record(cli, tiny_checkpoint):
    cli(*WALK, "--seed", 3, "--num-residuals", 2, "--output", "a.mp4")
    model = record_of("a-001.mp4").pop("model")
    assert record_of("a-001.mp4") == {
        "vfengine": vf.__version__,
        "device": "cpu",
        "model": model,
        "settings": {
            "label": "walk",
            "num_frames": 4,
            "num_inference_steps": 4,
            "guidance_scale": 2.0,
            "solver": "ddim",
            "eta": 0.0,
            "base_seed": 3,
            "base_offset": 0,
            "window": 0,
            "base_path": "stepwise",
            "residual_seed": 4,
            "sample_offset": 1,
            "dtype": "float32",
            "fps": 8.0,
            "scale": 1,
            "codec": "h264",
            "crf": 17,
            "chroma": "420",
        },
    }
    pipe = vf.load_pipeline(tiny_checkpoint, **ON_CPU)
    assert (model["name"], model["fingerprint"]) == (tiny_checkpoint.name, pipe.fingerprint)
    assert model["networks"].keys() == {"base", "residual"}
    assert "base_offset" not in record_of("a-000.mp4")["settings"]  # its own


def test_texts_hold_no_place_and_no_name_of_the_output(cli, tmp_path):
    Path("folder").mkdir()
    cached = ["--base-cache", tmp_path / "cache"]
    texts = set()
    for flags in (["--output", "a.mp4"], ["--output", tmp_path / "folder" / "b.mp4", *cached]):
        cli(*WALK, *flags, "--batch-size", 2, "--json")
        texts.add(read_metadata(flags[1]))
    assert len(texts) == 1
    assert "/" not in texts.pop()


def test_without_metadata(cli, again):
    cli(*WALK, "--output", "a.mp4", "--no-metadata")
    assert read_metadata("a.mp4") is None
    assert refused(again("--config", "a.mp4"), "--config a.mp4: carries no settings of vfengine")
    cli(*WALK, "--output", "b.mp4")
    assert again("--config", "b.mp4", "--no-metadata", "--output", "c.mp4")[0] == 0
    assert Path("c.mp4").read_bytes() == Path("a.mp4").read_bytes()


def test_texts_that_are_too_long(cli, tmp_path):
    from latent_models import save_latent_model

    model = save_latent_model(tmp_path.parent / f"{tmp_path.name}-long")
    prompt = ["--prompt", "word " * 14_000, "--output", "a.mp4"]
    assert refused(cli(*prompt, model=model), "at most 65536 bytes", "--no-metadata leaves it out")
    assert os.listdir() == []
    assert cli(*prompt, "--no-metadata", model=model)[0] == 0


def test_every_setting_is_recorded_or_changes_no_clip():
    """A new setting belongs in one of the two."""
    no_clip = {"list_labels", "num_residuals", "batch_size", "output", "save_latents", "model"}
    no_clip |= {"base_cache", "overlap_phases", "offload_base", "device", "no_capture", "config"}
    no_clip |= {"base_device", "residual_device"}
    no_clip |= {"no_metadata", "quiet", "json", "prompts", "resume", "dry_run"}
    no_clip |= {"ray", "base_workers", "residual_workers"}
    assert not no_clip & set(records.RECORDED)
    assert DEFAULTS.keys() <= no_clip | set(records.RECORDED)
    assert set(replay.SUFFIXES) == set(SUFFIXES)


# -- flags over the clip's settings ----------------------------------------------------------------


def test_flags_take_the_place_of_a_clips_settings(cli, again):
    cli(*WALK, "--seed", 3, "--num-residuals", 2, "--codec", "hevc", "--output", "a.mp4")
    cli(*WALK, "--seed", 8, "--sample-offset", 1, "--base-offset", 0, "--output", "b.webm")
    assert again("--config", "a-001.mp4", "--seed", 8, "--output", "c.webm")[0] == 0  # as vp9
    assert Path("c.webm").read_bytes() == Path("b.webm").read_bytes()
    assert again("--config", "a-001.mp4", "--codec", "h264", "--output", "c.mp4")[0] == 0
    assert record_of("c.mp4")["settings"]["codec"] == "h264"
    assert again("--config", "a-001.mp4", "--label", "jump", "--num-videos", 2)[0] == 0
    assert record_of("a-001-again-001.mp4")["settings"]["label"] == "jump"


def test_flags_that_a_clips_settings_cannot_go_with(cli, again, clean_checkpoint, picture):
    cli(*WALK, "--num-frames", 5, "--base-path", "stepwise", "--output", "a.mp4")
    cli(*WALK, "--preview", "--output", "b.png")
    assert again("--config", "a.mp4", "--preview")[0] == 0
    assert np.array_equal(frames_of("a-again.png")[0], frames_of("b.png")[0])
    assert record_of("a-again.png")["settings"]["preview"] is True
    image = ["--image", picture[0], "--output", "b.webp"]
    cli(*WALK, "--output", "c.mp4", model=clean_checkpoint)
    assert again("--config", "c.mp4", *image, model=clean_checkpoint)[0] == 0
    assert np.array_equal(frames_of("b.webp")[2], picture[1])
    assert refused(again("--config", "a.mp4", "--preview", "--num-frames", 3), "cannot go with")


# -- files that a clip is made of ------------------------------------------------------------------


def test_a_clip_of_a_picture_needs_the_picture(cli, again, clean_checkpoint, picture):
    model = {"model": clean_checkpoint}
    Path("sub").mkdir()
    shutil.copy(picture[0], "sub/cat.png")
    cli(*WALK, "--image", "sub/cat.png", "--num-videos", 2, "--output", "sub/a.webp", **model)
    record = record_of("sub/a-001.webp")
    assert record["settings"]["image"] == "cat.png"
    assert record["files"]["image"].keys() == {"name", "sha256"}
    assert same(again, "sub/a-001.webp", **model)  # beside the clip
    shutil.move("sub/cat.png", "cat.png")
    assert same(again, "sub/a-001.webp", **model)  # here
    shutil.move("cat.png", "dog.png")
    config = ["--config", "sub/a-001.webp"]
    words = ["was made with --image 'cat.png'", "neither here nor beside it", "--image says where"]
    assert refused(again(*config, **model), *words)
    assert again(*config, "--image", "dog.png", "--output", "b.webp", **model)[0] == 0
    assert np.array_equal(frames_of("b.webp"), frames_of("sub/a-001.webp"))
    Image.fromarray(picture[1][::-1]).save("cat.png")
    sha256 = record["files"]["image"]["sha256"][:16]
    assert refused(again(*config, **model), sha256, "but cat.png is another file (")


def test_clips_of_a_base_trajectory_are_made_again(cli, again):
    file = ["--base-trajectory", "t.safetensors"]
    cli(*WALK, "--num-videos", 3, "--base-seed", 4, *file, "--output", "a.webp")  # writes it
    assert "files" not in record_of("a-001.webp")
    assert same(again, "a-001.webp")
    cli(*WALK, "--num-videos", 3, *file, "--batch-size", 2, "--output", "b.webp")  # reads it
    assert record_of("b-002.webp")["settings"]["base_offset"] == 2
    assert record_of("b-002.webp")["files"].keys() == {"base_trajectory"}
    assert all(same(again, f"b-00{k}.webp") for k in range(3))
    assert again("--config", "b-001.webp", "--base-offset", 2, "--output", "c.webp")[0] == 0
    assert np.array_equal(frames_of("c.webp")[2], frames_of("b-002.webp")[2])
    words = ["t.safetensors: holds 3 base paths, but --base-offset 3 and 1 clips ask for more"]
    assert refused(again("--config", "b-001.webp", "--base-offset", 3), *words)
    cli(*WALK, *file, "--base-offset", 1, "--num-residuals", 3, "--output", "d.webp")
    assert all(same(again, f"d-00{k}.webp") for k in range(3))
    os.unlink("t.safetensors")
    cli(*WALK, "--guidance-scale", 3, *file, "--output", "e.webp")
    cli(*WALK, *file, "--output", "e.webp")  # with guidance 2 along a path of 3
    assert same(again, "e.webp")


def test_clips_of_another_base_network_are_made_again(cli, again, tmp_path):
    base = tmp_path.parent / f"{tmp_path.name}-base"
    base.mkdir()
    save_peer(base)
    assert cli(*WALK, "--base-unet", base, "--output", "a.webp")[0] == 0
    assert record_of("a.webp")["settings"]["base_unet"] == base.name
    assert same(again, "a.webp", "--base-unet", base)
    assert refused(again("--config", "a.webp"), "--base-unet says where it is")
    shutil.copytree(base, base.name)
    assert same(again, "a.webp")


def test_clips_of_finished_latents_are_made_again(again, tmp_path):
    model = small_diffusers_folder(tmp_path.parent / f"{tmp_path.name}-published")
    small = ["--num-frames", 3, "--num-inference-steps", 2, "--dtype", "fp32", "--prompt", "a dog"]
    flags = [*small, "--seed", 5, "--num-videos", 3, "--save-latents", "l.safetensors"]
    assert again(*flags, "--output", "a.webp", model=model)[0] == 0
    record = record_of("a-001.webp")
    assert (record["settings"]["seed"], record["settings"]["sample_offset"]) == (5, 1)
    assert record["model"] == {"name": model.name, "fingerprint": None}
    assert all(same(again, f"a-00{k}.webp", model=model) for k in range(3))
    latents = ["--latents", "l.safetensors", "--dtype", "fp32", "--output", "b.webp"]
    assert again(*latents, model=model)[0] == 0
    assert record_of("b-002.webp")["files"].keys() == {"latents"}
    assert all(same(again, f"b-00{k}.webp", model=model) for k in range(3))
    words = ["l.safetensors: holds 3 clips, but --sample-offset is 3"]
    assert refused(again(*latents, "--sample-offset", 3, model=model), *words)


# -- other models, versions and authors ------------------------------------------------------------


def test_clips_of_another_model_that_a_flag_names(cli, again, tmp_path):
    other = save_tiny(tmp_path.parent / f"{tmp_path.name}-other", seed=1)
    cli(*WALK, "--output", "a.webp")
    status, _, err = again("--config", "a.webp", "--output", "b.webp", model=other)
    assert (status, err.count("\n")) == (0, 1)
    assert err.startswith("vfengine.generate: warning: a.webp was made by model 'tiny' (base ")
    assert not np.array_equal(frames_of("a.webp"), frames_of("b.webp"))


def test_another_residual_network_is_another_model(cli, again, tmp_path, tiny_checkpoint):
    other = shutil.copytree(tiny_checkpoint, tmp_path.parent / f"{tmp_path.name}-other")
    config = json.loads((other / "config.json").read_text())
    config["sha256"]["residual"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    cli(*WALK, "--preview", "--output", "a.webp")
    _, _, err = again("--config", "a.webp", model=other)
    assert "residual 0000000000000000) is in use" in err


def test_other_models_are_refused_by_name(cli, capsys):
    cli(*WALK, "--output", "a.webp")
    capsys.readouterr()
    assert main(["--config", "a.webp", "--device", "cpu"]) == 2  # by the shipped model
    err = capsys.readouterr().err
    assert "a.webp was made by model 'tiny' (base " in err
    assert "but 'default' (" in err
    assert "--model names the folder of another" in err
    assert not Path("a-again.webp").exists()


def test_another_version_and_device_are_warned_of(cli, again):
    cli(*WALK, "--output", "a.webp")
    record = {**record_of("a.webp"), "vfengine": "0.0.\x1b", "device": "cuda"}
    write_video("b.webp", frames_of("a.webp"), 8, metadata=settings_text(record))
    status, _, err = again("--config", "b.webp")
    assert (status, err.count("\n")) == (0, 2)
    assert "b.webp was made by vfengine '0.0.\\x1b', this is " in err
    assert "b.webp was made on 'cuda', this is cpu" in err
    assert Path("b-again.webp").read_bytes() == Path("a.webp").read_bytes()
    assert again("--config", "b.webp", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["carries no settings of vfengine"]),
        ("a comment", ["carries no settings of vfengine"]),
        ("[1, 2]", ["carries no settings of vfengine"]),
        ("[" * 60_000, ["carries no settings of vfengine"]),
        ('{"vfengine": 1, "settings": {"label": "walk"}}', ["carries no settings"]),
        ('{"vfengine": "1", "settings": {}}', ["carries no settings"]),
        ('{"vfengine": "1", "settings": {"label": "walk"}, "files": [1]}', ["carries no"]),
        ('{"vfengine": "1", "settings": {"label": "walk"}, "files": {"image": 1}}', ["carries no"]),
        ('{"vfengine": "1", "settings": {"output": "/x.mp4"}}', ["unknown: 'output'"]),
        ('{"vfengine": "1", "settings": {"model": "/x"}}', ["unknown: 'model'"]),
        ('{"vfengine": "1", "settings": {"base_cache": "/x"}}', ["unknown: 'base_cache'"]),
        ('{"vfengine": "1", "settings": {"save_latents": "x"}}', ["unknown: 'save_latents'"]),
        ('{"vfengine": "1", "settings": {"label": ["walk"]}}', ["unknown: 'label'"]),
        ('{"vfengine": "1", "settings": {"label": true}}', ["label must be one value"]),
        ('{"vfengine": "1", "settings": {"num_frames": 0}}', ["expected a whole number"]),
        ('{"vfengine": "1", "settings": {"image": "../cat.png"}}', ["which is no name of a file"]),
        ('{"vfengine": "1", "settings": {"image": "/etc/passwd"}}', ["no name of a file"]),
        ('{"vfengine": "1", "settings": {"image": 5}}', ["no name of a file"]),
        ('{"vfengine": "1", "settings": {"label": "walk"}, "beyond": {"lam": 0.3}}', ["'lam'"]),
    ],
)
def test_clips_of_strangers(cli, again, text, words):
    write_video("a.gif", np.zeros((2, 16, 16, 3), np.uint8), 8, metadata=text)
    assert refused(again("--config", "a.gif"), "--config a.gif: ", *words)
    assert os.listdir() == ["a.gif"]


def test_clips_that_cannot_be_read(cli, again):
    assert refused(again("--config", "a.mp4"), "--config a.mp4: no such file")
    Path("a.mp4").write_bytes(b"no clip")
    assert refused(again("--config", "a.mp4"), "--config a.mp4: not a readable video")


def test_clips_without_torch(tmp_path):
    record = {"vfengine": "1", "settings": {"label": "walk", "dtype": "bfloat16", "crf": 9}}
    write_video(
        tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8, metadata=json.dumps(record)
    )
    settings = read_settings(["--config", str(tmp_path / "a.mp4"), "--label", "jump"])
    assert (settings.label, settings.dtype, settings.crf) == ("jump", "bfloat16", 9)
    assert settings.output == "a-again.mp4"
    code = "import sys; import vfengine.pipelines.clip_settings; "
    code += "from vfengine.cli.settings import read_settings; "
    code += f"read_settings(['--config', {str(tmp_path / 'a.mp4')!r}]); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
