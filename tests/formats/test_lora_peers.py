"""LoRA in published models: the weights that PEFT merges and diffusers fuses, of each kind of file.

diffusers fuses into UNets of images and text encoders; video UNets are PEFT's alone.
"""

import json

import pytest
import torch
from conftest import ON_CPU, tiny_config
from published_folders import small_diffusers_folder, small_modelscope_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from seeded import normal
from test_peers import peer_of
from torch import nn

import vfengine as vf
from vfengine.formats.load import find_text_encoder, find_unet
from vfengine.formats.lora_targets import checkpoint_targets, published_targets
from vfengine.pipelines.loras import open_loras

SCALE = 0.7
UNET = ["to_q", "to_k", "to_out.0", "proj_in", "ff.net.0.proj", "resnets.0.conv1", "conv_shortcut"]
UNET += ["time_emb_proj", "linear_1", "conv_in", "downsamplers.0.conv"]
VIDEO = [*UNET, "temp_convs.0.conv2.3", "temp_convs.0.conv1.2"]
TEXT = ["q_proj", "out_proj", "mlp.fc1"]
PATTERNS = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn2.to_k": 7, "conv1": 1}}


def adapted(network: nn.Module, layers: list[str], **settings) -> nn.Module:
    """The network with a random adapter, in PEFT's wrapper."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, target_modules=layers, **settings)
    peer = get_peft_model(network, config)
    for number, (name, weight) in enumerate(sorted(peer.named_parameters())):
        if "lora_" in name:
            weight.data = 0.3 * normal(*weight.shape, seed=number)
    return peer


def diffusers_files(file, **peers: nn.Module) -> None:
    """What diffusers saves of adapters, its settings in the header."""
    from peft import get_peft_model_state_dict

    state, metadata = {}, {}
    for name, peer in peers.items():
        for key, value in get_peft_model_state_dict(peer).items():
            state[key.replace("base_model.model", name)] = value.contiguous()
        for key, value in peer.peft_config["default"].to_dict().items():
            if value is not None:
                metadata[f"{name}.{key}"] = sorted(value) if isinstance(value, set) else value
    save_file(state, file, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})


def kohya_file(file, source) -> None:
    """The same in kohya's names, without the settings but with each layer's alpha."""
    settings, state = json.loads(header(source)["lora_adapter_metadata"]), {}
    for name, value in load_file(source).items():
        layer, part = name.removesuffix(".weight").rsplit(".", 1)
        network, layer = layer.split(".", 1)
        key = "lora_unet_"
        if network == "text_encoder":
            key, layer = "lora_te_text_model_", layer.removeprefix("text_model.")
        key += layer.replace(".", "_")
        state[f"{key}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value
        if part == "lora_A":
            alpha = float(settings[f"{network}.lora_alpha"])
            for pattern, other in settings[f"{network}.alpha_pattern"].items():
                alpha = float(other) if layer.endswith(pattern) else alpha
            if settings[f"{network}.use_rslora"]:
                alpha *= len(value) ** 0.5
            state[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(state, file)


def header(file) -> dict:
    with safe_open(str(file), "pt") as opened:
        return opened.metadata()


# -- text to video ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model; a LoRA of its UNet and text encoder; the weights of both with that merged."""
    from diffusers import UNet3DConditionModel
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("lora")
    model = small_diffusers_folder(folder / "model")
    unet = adapted(UNet3DConditionModel.from_pretrained(model / "unet"), VIDEO, **PATTERNS)
    text = adapted(CLIPTextModel.from_pretrained(model / "text_encoder"), TEXT, use_rslora=True)
    diffusers_files(folder / "lora.safetensors", unet=unet, text_encoder=text)
    unet.save_pretrained(folder / "adapter")
    unet.merge_and_unload().save_pretrained(folder / "unet")
    text.merge_and_unload().save_pretrained(folder / "text_encoder")
    (plain_video, plain_text), (video, text) = weights(model), weights(folder)
    merged = scaled(plain_video, video), scaled(plain_text, text)
    return model, folder / "lora.safetensors", merged


def weights(folder, lora=None) -> tuple[dict, dict]:
    """Of the UNet and the text encoder of a model, in our names."""
    updates = open_loras(lora, published_targets(folder)).updates if lora else {}
    networks = {"video": find_unet(folder), "text": find_text_encoder(folder)}
    read = [net.read(torch.float32, "cpu", updates.get(name)) for name, net in networks.items()]
    return tuple(network.state_dict() for network in read)


def scaled(plain: dict, changed: dict) -> dict:
    return {name: torch.lerp(plain[name], changed[name], SCALE) for name in plain}


def same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.allclose(weight, theirs[name], rtol=0, atol=1e-6), name


def test_files_of_diffusers(models):
    model, lora, merged = models
    ours = weights(model, (lora, SCALE))
    for network, expected in zip(ours, merged, strict=True):
        same(network, expected)


def test_modelscope_takes_names_of_diffusers(models, tmp_path):
    for network, expected in zip(
        weights(small_modelscope_folder(tmp_path), (models[1], SCALE)), models[2], strict=True
    ):
        same(network, expected)


def test_adapters_of_peft(models):
    model, lora, merged = models
    ours, _ = weights(model, (lora.with_name("adapter"), SCALE))
    same(ours, merged[0])


def test_names_of_kohya(models, tmp_path):
    model, lora, merged = models
    kohya_file(tmp_path / "kohya.safetensors", lora)
    for network, expected in zip(
        weights(model, (tmp_path / "kohya.safetensors", SCALE)), merged, strict=True
    ):
        same(network, expected)


def test_pipelines_sample_with_it(models):
    call = {"num_inference_steps": 1, "num_frames": 2, "output_type": "latent"}
    plain, changed = (
        vf.load_pipeline(models[0], lora=lora, **ON_CPU)("a dog", **call).latents
        for lora in (None, [models[1]])
    )
    assert changed.isfinite().all()
    assert not torch.equal(plain, changed)


# -- UNets of images -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "old"])
def test_diffusers_fuses_the_same_weights(kind, tmp_path):
    from diffusers import StableDiffusionPipeline

    peer_of("cross").save_pretrained(tmp_path / "unet")
    file = tmp_path / "lora.safetensors"
    layers = ["attn2.to_q", "attn1.to_out.0"] if kind == "old" else UNET
    patterns = PATTERNS if kind == "diffusers" else {"alpha_pattern": {"conv1": 1}}
    diffusers_files(file, unet=adapted(peer_of("cross"), layers, **patterns))
    if kind == "kohya":
        kohya_file(file, file)
    elif kind == "old":
        state = {}
        for name, value in load_file(file).items():  # alpha is the rank
            name = name.replace("attn2.to_q.", "attn2.processor.to_q_lora.")
            name = name.replace("attn1.to_out.0.", "attn1.processor.to_out_lora.")
            state[name.replace("lora_A", "down").replace("lora_B", "up")] = value
        save_file(state, file)
    peer = peer_of("cross")
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
        str(tmp_path), weight_name=file.name, return_lora_metadata=True
    )
    peer.load_lora_adapter(state, network_alphas=alphas, metadata=metadata, prefix="unet")
    peer.fuse_lora(lora_scale=SCALE)
    peer.unload_lora()
    peer.save_pretrained(tmp_path / "fused")
    targets = checkpoint_targets(tiny_config(), tmp_path / "unet")
    updates = open_loras((file, SCALE), targets).updates["base"]
    ours = find_unet(tmp_path / "unet").read(torch.float32, "cpu", updates).state_dict()
    same(ours, find_unet(tmp_path / "fused").read(torch.float32, "cpu").state_dict())
