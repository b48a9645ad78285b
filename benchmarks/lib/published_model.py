"""Text-to-video models with random weights, as diffusers stores them; and who runs them.

WIDTHS["published"] is ModelScope's model: 340 M weights in the text encoder, 1.4 billion in the
UNet, 84 M in the autoencoder. "small" is the same in narrow. Its widths are such that ModelScope's
own form can say them too: 32 groups in every norm, heads of 64 in the text encoder, two blocks a
level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vfengine.formats.tokenizer import MERGES

OURS, EAGER = "vfengine", "diffusers eager"


class Networks(NamedTuple):
    """Of transformers and diffusers."""

    text: nn.Module
    unet: nn.Module
    vae: nn.Module


def _unet(levels: int, **entries: Any) -> dict[str, Any]:
    """Attention at all levels but the coarsest."""
    crossed = levels - 1
    return {
        "layers_per_block": 2,
        "down_block_types": (*("CrossAttnDownBlock3D",) * crossed, "DownBlock3D"),
        "up_block_types": ("UpBlock3D", *("CrossAttnUpBlock3D",) * crossed),
        **entries,
    }


def _vae(*widths: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }


WIDTHS: Mapping[str, Networks] = {  # entries of configurations, where networks are elsewhere
    "published": Networks(
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
        },
        _unet(
            4,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=64,
            sample_size=32,
        ),
        _vae(128, 256, 512, 512),
    ),
    "small": Networks(
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
        },
        _unet(
            3,
            block_out_channels=(32, 64, 64),
            cross_attention_dim=128,
            attention_head_dim=16,
            sample_size=8,
        ),
        _vae(32, 32, 64, 64),
    ),
}


def build(widths: str) -> Networks:
    """Networks of these widths, with the weights that their classes begin with."""
    from diffusers import AutoencoderKL, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text, unet, vae = WIDTHS[widths]
    return Networks(
        CLIPTextModel(CLIPTextConfig(hidden_act="gelu", **text)),
        UNet3DConditionModel(**unet),
        AutoencoderKL(latent_channels=4, **vae),
    )


def draw(widths: str, dtype: torch.dtype = torch.bfloat16) -> Networks:
    """Networks with random weights in every layer, made in memory of their own size."""
    with torch.device("meta"):
        networks = build(widths)
    generator = torch.Generator().manual_seed(0)
    for network in networks:
        network.to(dtype).to_empty(device="cpu")
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.detach().normal_(0, weight[0].numel() ** -0.5, generator=generator)
            else:
                norm = "norm" in name and name.endswith("weight")
                weight.detach().normal_(float(norm), 0.1, generator=generator)
    return networks


def save(folder: Path, networks: Networks) -> Path:
    """A folder of diffusers' TextToVideoSDPipeline, with the published scheduler."""
    from diffusers import DDIMScheduler, TextToVideoSDPipeline

    quiet()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    text, unet, vae = networks
    TextToVideoSDPipeline(vae, text, clip_tokenizer(), unet, scheduler).save_pretrained(folder)
    return folder


def clip_tokenizer() -> object:
    """transformers' CLIPTokenizer with CLIP's vocabulary; it pads with "!", as published ones do.

    So this word is padding to it, not to open_clip's.
    """
    from transformers import CLIPTokenizer

    merges = [tuple(line.split()) for line in MERGES.read_text("utf-8").splitlines()[1:]]
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    symbols = [chr(b) for b in kept] + [chr(256 + n) for n in range(256 - len(kept))]
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token="!")


def diffusers_pipeline(folder: str | Path, dtype: torch.dtype) -> Any:
    """diffusers' own pipeline of the folder."""
    from diffusers import TextToVideoSDPipeline

    quiet()
    pipe = TextToVideoSDPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet() -> None:
    """The libraries' bars, and the notice that this pipeline is deprecated."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def clip(contender: str, folder: str, prompt: str, **settings: Any) -> Callable[[], object]:
    """For peak_memory.measure: what reads a model and makes a whole clip with it, in bf16."""
    if contender == OURS:
        from vfengine import TextToVideoPipeline

        def work() -> object:
            pipe = TextToVideoPipeline.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
            return pipe(prompt, **settings).frames

        return work
    from diffusers import TextToVideoSDPipeline  # noqa: F401  before its memory is read

    return lambda: diffusers_pipeline(folder, torch.bfloat16)(prompt, **settings).frames
