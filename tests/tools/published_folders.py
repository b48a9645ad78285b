"""Small published text-to-video folders: the real architecture, narrow, with random weights.

One model in both forms: benchmarks/lib/published_model.py names its widths, and writes diffusers'.
"""

import json
from pathlib import Path

import torch
from conftest import benchmark_file
from seeded import filled
from torch import Tensor, nn

CLIP, UNET = "open_clip_pytorch_model.bin", "text2video_pytorch_model.pth"
VAE = "VQGAN_autoencoder.pth"

published_model = benchmark_file("lib.published_model")
Networks, save_diffusers = published_model.Networks, published_model.save


def small_networks(seed: int = 0) -> Networks:
    """In fp32; the seed decides every weight."""
    networks = published_model.build("small")
    return Networks(*(filled(net, seed=seed + number) for number, net in enumerate(networks)))


def small_diffusers_folder(path: Path, seed: int = 0) -> Path:
    """A TextToVideoSDPipeline with latents of 8 x 8, of 8 pixels each."""
    return save_diffusers(path, small_networks(seed))


# -- ModelScope ------------------------------------------------------------------------------------


def small_modelscope_folder(path: Path, seed: int = 0) -> Path:
    """The model of `small_diffusers_folder` as ModelScope stores it."""
    return save_modelscope(path, small_networks(seed))


def save_modelscope(path: Path, networks: Networks) -> Path:
    """configuration.json and the three files that it names, with what else is in published ones."""
    path.mkdir(parents=True, exist_ok=True)
    text, unet, vae = networks
    widths = unet.config.block_out_channels
    cfg = {
        "unet_in_dim": 4,
        "unet_dim": widths[0],
        "unet_y_dim": 768,
        "unet_context_dim": unet.config.cross_attention_dim,
        "unet_out_dim": 4,
        "unet_dim_mult": [width // widths[0] for width in widths],
        "unet_num_heads": 8,
        "unet_head_dim": unet.config.attention_head_dim,
        "unet_res_blocks": 2,
        "unet_attn_scales": [0.5**level for level in range(len(widths) - 1)],
        "unet_dropout": 0.1,
        "temporal_attention": "True",
        "num_timesteps": 1000,
        "mean_type": "eps",
        "var_type": "fixed_small",
        "loss_type": "mse",
    }
    args = {"ckpt_clip": CLIP, "ckpt_unet": UNET, "ckpt_autoencoder": VAE}
    model = {
        "type": "latent-text-to-video-synthesis",
        "model_args": {**args, "max_frames": 16, "tiny_gpu": 1},
        "model_cfg": cfg,
    }
    values = {"framework": "pytorch", "task": "text-to-video-synthesis", "model": model}
    (path / "configuration.json").write_text(json.dumps(values))
    torch.save(open_clip_state(text), path / CLIP)
    torch.save(unet_state(unet), path / UNET)
    state = {f"first_stage_model.{name}": value for name, value in ldm_state(vae).items()}
    state["loss.logvar"] = torch.zeros(())
    torch.save({"state_dict": state}, path / VAE)
    return path


def open_clip_state(text: nn.Module) -> dict[str, Tensor]:
    """A CLIPTextModel as open_clip's, with one block more, and with layers for pictures."""
    state = {n.removeprefix("text_model."): v for n, v in text.state_dict().items()}
    places = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    places |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    out = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "logit_scale": torch.zeros(()),
        "text_projection": torch.zeros(4, 4),
        "visual.conv1.weight": torch.zeros(4, 3, 2, 2),
        "visual.transformer.resblocks.0.ln_1.weight": torch.zeros(4),
    }
    out |= {f"ln_final.{kind}": state[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    blocks = text.config.num_hidden_layers
    for block in range(blocks):
        inner, ours = f"encoder.layers.{block}.", f"transformer.resblocks.{block}."
        for kind in ("weight", "bias"):
            rows = [state[f"{inner}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{ours}attn.in_proj_{kind}"] = torch.cat(rows)
            for theirs, name in places.items():
                out[f"{ours}{name}.{kind}"] = state[f"{inner}{theirs}.{kind}"]
    last = f"transformer.resblocks.{blocks - 1}."
    unused = {n: torch.full_like(v, 7) for n, v in out.items() if n.startswith(last)}
    return out | {n.replace(last, f"transformer.resblocks.{blocks}."): v for n, v in unused.items()}


def unet_state(peer: nn.Module) -> dict[str, Tensor]:
    """A UNet3DConditionModel with two blocks a level, in ModelScope's names."""
    state = {}
    places = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for key, value in peer.state_dict().items():
        block, _, rest = key.partition(".")
        if block == "time_embedding":
            name = rest.replace("linear_1", "time_embed.0").replace("linear_2", "time_embed.2")
        elif block in places:
            name = f"{places[block]}.{rest}"
        elif block == "transformer_in":
            name = f"input_blocks.0.1.{rest}"
        elif block == "mid_block":
            part, index, inner = rest.split(".", 2)
            number = {"attentions": 1, "temp_attentions": 2}.get(part, 3 * int(index))
            name = f"middle_block.{number}.{_inner(part, inner)}"
        else:
            level, part, index, inner = rest.split(".", 3)
            down = block == "down_blocks"
            first = 1 + 3 * int(level) if down else 3 * int(level)
            if part == "downsamplers":
                name = f"input_blocks.{first + 2}.op.{inner.removeprefix('conv.')}"
            elif part == "upsamplers":
                name = f"output_blocks.{first + 2}.{1 if level == '0' else 3}.{inner}"
            else:
                number = {"attentions": 1, "temp_attentions": 2}.get(part, 0)
                side = "input_blocks" if down else "output_blocks"
                name = f"{side}.{first + int(index)}.{number}.{_inner(part, inner)}"
        if "temp_attentions" in key or block == "transformer_in":
            if "proj_in.weight" in key or "proj_out.weight" in key:
                value = value[..., None]  # 1x1 convolutions over frames
        state[name] = value.clone()
    assert len(state) == len(peer.state_dict())
    return state


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _inner(part: str, inner: str) -> str:
    if part == "resnets":
        layer, _, parameter = inner.partition(".")
        return f"{_RESNET[layer]}.{parameter}"
    return f"temopral_conv.{inner}" if part == "temp_convs" else inner


def ldm_state(vae: nn.Module) -> dict[str, Tensor]:
    """An AutoencoderKL in the names of latent diffusion's own code."""
    coarsest, state = len(vae.config.block_out_channels) - 1, {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
    attention["to_out.0"] = "proj_out"
    for key, value in vae.state_dict().items():
        if key.count(".") < 3:  # of no block
            state[key.replace("conv_norm_out", "norm_out")] = value.clone()
            continue
        side, block, *layer, kind = key.split(".")
        if block == "mid_block" and layer[0] == "attentions":
            name = f"{side}.mid.attn_1.{attention['.'.join(layer[2:])]}.{kind}"
            value = value[..., None, None] if value.dim() == 2 else value  # 1x1 convolutions
        elif block == "mid_block":
            name = f"{side}.mid.block_{int(layer[1]) + 1}.{layer[2]}.{kind}"
        else:
            up, level = block == "up_blocks", int(layer[0])
            place = f"up.{coarsest - level}" if up else f"down.{level}"
            if layer[1] == "resnets":
                name = f"{side}.{place}.block.{layer[2]}.{layer[3]}.{kind}"
            else:
                name = f"{side}.{place}.{'up' if up else 'down'}sample.conv.{kind}"
        state[name.replace("conv_shortcut", "nin_shortcut")] = value.clone()
    assert len(state) == len(vae.state_dict())
    return state
