"""Small published text-to-video folders: the real architecture, narrow, with random weights."""

from pathlib import Path

from seeded import filled

from vfengine.formats.tokenizer import MERGES


def small_diffusers_folder(path: Path, seed: int = 0) -> Path:
    """A TextToVideoSDPipeline with latents of 8 x 8, of 2 pixels each."""
    from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet = UNet3DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        sample_size=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=128,
            num_attention_heads=4,
            num_hidden_layers=3,
            hidden_act="gelu",
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    merges = [tuple(line.split()) for line in MERGES.read_text("utf-8").splitlines()[1:]]
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    symbols = [chr(b) for b in kept] + [chr(256 + n) for n in range(256 - len(kept))]
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
    pipe = TextToVideoSDPipeline(
        filled(vae, seed=seed + 2),
        filled(text, seed=seed),
        tokenizer,
        filled(unet, seed=seed + 1),
        scheduler,
    )
    pipe.save_pretrained(path)
    return path
