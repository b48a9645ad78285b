"""Text-to-video folders that are damaged or of another kind: one line each, and nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import refused
from published_folders import CLIP, UNET, VAE, save_diffusers, save_modelscope, small_networks
from safetensors.torch import load_file, save_file

PARTS = {  # of a diffusers folder: the file of weights, and that of a pickle in its place
    "text_encoder": ("model.safetensors", "pytorch_model.bin"),
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
}
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder, networks = tmp_path_factory.mktemp("published"), small_networks()
    return {
        "diffusers": save_diffusers(folder / "diffusers", networks),
        "modelscope": save_modelscope(folder / "modelscope", networks),
    }


@pytest.fixture
def outcome(cli, folders, tmp_path):
    """What the command line says of a changed copy of a folder; it may not write a thing."""

    def run(form: str, change: Change):
        model = tmp_path.parent / f"{tmp_path.name}-model"
        shutil.copytree(folders[form], model, copy_function=os.link)
        change(model)
        result = cli("--prompt", "a fox", "--output", "a.webp", "--num-frames", 1, model=model)
        assert os.listdir() == []
        assert str(model) in result[2]
        return result

    return run


# -- changes ---------------------------------------------------------------------------------------


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            place = folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()

    return change


def wrote(name: str, content: bytes) -> Change:
    """A file anew: its other links keep what they had."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return change


def truncated(name: str) -> Change:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        wrote(name, content[: len(content) // 2])(folder)

    return change


def entries(name: str, *path: str, **values: object) -> Change:
    """A JSON file with other values below a path of keys."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / name).read_text())
        place = whole
        for key in path:
            place = place[key]
        place.update(values)
        wrote(name, json.dumps(whole).encode())(folder)

    return change


class Code:
    """What a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("written",)


def code(name: str, instead_of: str | None = None) -> Change:
    """A pickle that makes a folder when it is read with its code."""

    def change(folder: Path) -> None:
        (folder / (instead_of or name)).unlink()
        torch.save({"weight": Code()}, folder / name)

    return change


def weights(part: str, **changed: torch.Tensor) -> Change:
    def change(folder: Path) -> None:
        file = folder / part / PARTS[part][0]
        state = load_file(file) | changed
        file.unlink()
        save_file(state, file)

    return change


# -- diffusers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["scheduler", "tokenizer", *PARTS])
def test_missing_parts(outcome, part):
    assert refused(outcome("diffusers", without(part)), "has no", part)


def test_all_missing_parts_are_named(outcome):
    assert refused(outcome("diffusers", without("unet", "vae")), "unet/config.json, vae/")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("what", ["configuration", "weights"])
def test_missing_files(outcome, part, what):
    name = "config.json" if what == "configuration" else PARTS[part][0]
    assert refused(outcome("diffusers", without(f"{part}/{name}")), part, name)


@pytest.mark.parametrize("part", PARTS)
def test_truncated_weights(outcome, part):
    assert refused(outcome("diffusers", truncated(f"{part}/{PARTS[part][0]}")), PARTS[part][0])


@pytest.mark.parametrize("part", PARTS)
def test_pickles_with_code(outcome, part):
    ours, pickled = (f"{part}/{name}" for name in PARTS[part])
    result = outcome("diffusers", code(pickled, instead_of=ours))
    assert refused(result, f"{pickled} is not a file of weights alone")


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        *(f"{part}/config.json" for part in PARTS),
    ],
)
@pytest.mark.parametrize("content", [b'{"a', b"[1]", b"\xff\xfe\x00"], ids=["cut", "list", "bytes"])
def test_damaged_configurations(outcome, name, content):
    assert refused(outcome("diffusers", wrote(name, content)), name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (entries("model_index.json", _class_name="WanPipeline"), ["is not TextToVideoSDPipeline"]),
        (entries("model_index.json", unet=["diffusers", "UNetMotionModel"]), ["UNetMotionModel"]),
        (entries("model_index.json", text_encoder=["transformers", "T5EncoderModel"]), ["T5"]),
        (entries("model_index.json", tokenizer=["transformers", "T5Tokenizer"]), ["T5Tokenizer"]),
        (entries("model_index.json", vae=["diffusers", "AutoencoderTiny"]), ["AutoencoderTiny"]),
        (entries("unet/config.json", _class_name="UNetMotionModel"), ["UNetMotionModel"]),
        (entries("vae/config.json", _class_name="AutoencoderTiny"), ["is not AutoencoderKL"]),
        (entries("text_encoder/config.json", model_type="t5"), ['model_type = "t5"']),
        (
            entries("scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscrete"),
            ["FlowMatchEulerDiscrete"],
        ),
        (
            entries("tokenizer/tokenizer_config.json", tokenizer_class="T5Tokenizer"),
            ["T5Tokenizer"],
        ),
    ],
)
def test_unknown_classes(outcome, change, words):
    assert refused(outcome("diffusers", change), *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (entries("unet/config.json", cross_attention_dim=64), ["weights of other shapes"]),
        (entries("unet/config.json", block_out_channels=[32, 64, 96]), ["misses weights"]),
        (entries("vae/config.json", block_out_channels=[32, 32, 64, 96]), ["misses weights"]),
        (entries("vae/config.json", latent_channels=8), ["other shapes"]),
        (entries("vae/config.json", scaling_factor=0), ["scaling_factor = 0"]),
        (entries("text_encoder/config.json", hidden_size=64), ["other shapes"]),
        (entries("text_encoder/config.json", num_hidden_layers=2), ["no known layer"]),
        (entries("unet/config.json", sample_size="wide"), ['sample_size = "wide"']),
        (weights("unet", extra=torch.zeros(1)), ["weights of no known layer: extra"]),
        (weights("unet", **{"conv_in.bias": torch.zeros(31)}), ["conv_in.bias [31]"]),
        (weights("vae", **{"decoder.conv_in.bias": torch.zeros(2)}), ["[2] instead of [64]"]),
        (weights("unet", **{"conv_in.bias": torch.zeros(32).int()}), ["conv_in.bias holds", "32"]),
    ],
)
def test_wrong_widths(outcome, change, words):
    assert refused(outcome("diffusers", change), *words)


@pytest.fixture(scope="module")
def narrow_text_encoder(tmp_path_factory) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("narrow") / "text_encoder"
    config = CLIPTextConfig(hidden_size=64, intermediate_size=64, num_attention_heads=1)
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_parts_that_do_not_fit_each_other(outcome, narrow_text_encoder):
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "text_encoder")
        shutil.copytree(narrow_text_encoder, folder / "text_encoder")

    result = outcome("diffusers", change)
    assert refused(result, "takes texts of width 128, its text encoder makes 64")


# -- ModelScope ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CLIP, UNET, VAE])
def test_missing_files_of_modelscope(outcome, name):
    assert refused(outcome("modelscope", without(name)), f"has no {name}")


@pytest.mark.parametrize("name", [CLIP, UNET, VAE])
def test_truncated_files_of_modelscope(outcome, name):
    assert refused(outcome("modelscope", truncated(name)), name)


@pytest.mark.parametrize("name", [CLIP, UNET, VAE])
def test_pickles_with_code_of_modelscope(outcome, name):
    assert refused(outcome("modelscope", code(name)), f"{name} is not a file of weights alone")


@pytest.mark.parametrize("content", [b'{"a', b"[1]", b"\xff\xfe\x00"], ids=["cut", "list", "bytes"])
def test_damaged_configurations_of_modelscope(outcome, content):
    result = outcome("modelscope", wrote("configuration.json", content))
    assert refused(result, "configuration.json")


def stored(name: str, *path: str, **changed: torch.Tensor) -> Change:
    """A file of torch.save with other weights."""

    def change(folder: Path) -> None:
        whole = torch.load(folder / name, weights_only=True)
        place = whole
        for key in path:
            place = place[key]
        place.update(changed)
        (folder / name).unlink()
        torch.save(whole, folder / name)

    return change


CONFIGURATION = ("configuration.json", "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (entries(*CONFIGURATION, type="image-to-video"), ["latent-text-to-video-synthesis"]),
        (entries(*CONFIGURATION, "model_args", ckpt_unet="../x.pth"), ["ckpt_unet", "../x.pth"]),
        (entries(*CONFIGURATION, "model_args", ckpt_clip="y.bin"), ["has no y.bin"]),
        (entries(*CONFIGURATION, "model_args", max_frames="all"), ['max_frames = "all"']),
        (entries(*CONFIGURATION, "model_cfg", mean_type="x0"), ['mean_type = "x0"']),
        (entries(*CONFIGURATION, "model_cfg", num_timesteps=10), ["num_timesteps = 10"]),
        (entries(*CONFIGURATION, "model_cfg", unet_dim=64), [UNET, "other shapes"]),
        (entries(*CONFIGURATION, "model_cfg", unet_dim="x"), ["configuration.json"]),
        (entries(*CONFIGURATION, "model_cfg", unet_context_dim=64), [UNET, "other shapes"]),
        (stored(UNET, **{"out.2.bias": torch.zeros(5)}), ["out.2.bias [5] instead of [4]"]),
        (stored(UNET, extra=torch.zeros(1)), ["no known layer: extra"]),
        (stored(CLIP, **{"ln_final.bias": torch.zeros(5)}), [CLIP, "ln_final.bias [5]"]),
        (
            stored(VAE, "state_dict", **{"first_stage_model.decoder.conv_in.bias": torch.zeros(5)}),
            [VAE, "conv_in.bias [5] instead of [64]"],
        ),
    ],
)
def test_other_models_of_modelscope(outcome, change, words):
    assert refused(outcome("modelscope", change), *words)


@pytest.mark.parametrize("name", [CLIP, UNET, VAE])
@pytest.mark.parametrize("content", [{}, {"a": torch.zeros(1)}, [1], {"state_dict": {}}])
def test_files_of_something_else(outcome, name, content):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        torch.save(content, folder / name)

    assert refused(outcome("modelscope", change), name)


def test_an_empty_folder(outcome):
    result = outcome("modelscope", without("configuration.json", CLIP, UNET, VAE))
    assert refused(result, "no checkpoint in")
