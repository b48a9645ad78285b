"""Damaged published networks, tokenizers and schedulers: refused, or read and run."""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_peers
import test_text_encoder
import torch
from damage import damaged_bytes
from fuzz_files import Files, contents, damaged_file, written
from published_folders import ldm_state, open_clip_state, unet_state
from seeded import filled, normal

from vfengine.formats.load import find_text_encoder, load_autoencoder, load_unet
from vfengine.formats.published import read_json
from vfengine.formats.scheduler import diffusers_schedule
from vfengine.formats.tokenizer import read_tokenizer

MOST = 4096  # of any width of a network that is run
WORDS = ("a", "b", "ab</w>", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>")


def _saved(module: Any, **how: object) -> Files:
    with tempfile.TemporaryDirectory() as name:
        module.save_pretrained(name, **how)
        return contents(Path(name))


def _pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@functools.cache
def peers() -> dict[str, Files]:
    """Small folders of every form; the name's first word is what they hold."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        UNet3DConditionModel,
    )

    video, text = test_peers.peer_of("video"), test_text_encoder.peer_of("gelu")
    vae, wide_vae = (
        filled(
            AutoencoderKL(
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                layers_per_block=1,
                norm_num_groups=widths[0] // 2,
            )
        )
        for widths in ((8, 16), (64, 64))
    )
    wide = test_text_encoder.peer_of("heads of 64")
    entries = {"block_out_channels": (32, 64), "norm_num_groups": 32, "layers_per_block": 2}
    deep = filled(UNet3DConditionModel(**{**test_peers.SHAPE_3D, **entries}))
    ldm = {f"first_stage_model.{name}": value for name, value in ldm_state(wide_vae).items()}
    clip = _saved(text)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    return {
        "unet 2d": _saved(test_peers.peer_of("classes")),
        "unet 2d bin": _saved(test_peers.peer_of("plain"), safe_serialization=False),
        "unet 2d shards": _saved(test_peers.peer_of("cross"), max_shard_size="40KB"),
        "unet 3d": _saved(video),
        "unet modelscope": {"unet.pth": _pickled(unet_state(deep))},
        "vae": _saved(vae),
        "vae ldm": {"vae.ckpt": _pickled({"state_dict": ldm})},
        "text": clip,
        "text open_clip": {"clip.bin": _pickled(open_clip_state(wide))},
        "tokenizer": {
            "vocab.json": json.dumps(vocabulary).encode(),
            "merges.txt": b"#version: 0.2\na b</w>\n",
            "tokenizer_config.json": json.dumps({**special, "model_max_length": 8}).encode(),
            "special_tokens_map.json": json.dumps(special).encode(),
        },
        "scheduler ddim": _saved(DDIMScheduler(clip_sample=False)),
        "scheduler dpm": _saved(DPMSolverMultistepScheduler(num_train_timesteps=50)),
    }


def _pickle_of_others(chance: random.Random, content: bytes) -> bytes:
    """A file of torch.save with other entries, or with bytes that chance hit."""
    if chance.random() < 0.3:
        return damaged_bytes(chance, content)
    state = torch.load(io.BytesIO(content), weights_only=True)
    inner = state.get("state_dict", state)
    whole, names = dict(inner), sorted(inner)
    for _ in range(chance.choice((1, 1, 2))):
        name, other = chance.choice(names), chance.choice(names)
        value = whole[name]
        inner[name] = chance.choice(
            (
                *(whole[other], value[None], value.flatten(), value.double(), value.long()),
                *(value.to(torch.complex64), value[..., :0] if value.ndim else value),
                *(value.transpose(0, -1) if value.ndim else value, torch.tensor(0.5)),
                *(value.to("meta"), value.to_sparse() if value.ndim else value, None, "x", [value]),
                *(value * float("nan"), torch.nn.Parameter(value.float()), {"a": value}),
            )
        )
        if chance.random() < 0.1:
            inner[chance.choice(("x", "", 7, name + "x", "input_blocks.99.0.weight"))] = value
    return _pickled(chance.choice((state, state, state, state, [state], inner, {"model": state})))


def damaged_peer(chance: random.Random, files: Files) -> Files:
    files, name = dict(files), chance.choice(sorted(files))
    if chance.random() < 0.04:
        content = files.pop(name)
        if chance.random() < 0.5:
            files[chance.choice(("x.bin", "config.json", "a/b.safetensors", name * 2))] = content
    elif name.endswith((".bin", ".pth", ".ckpt")):
        files[name] = _pickle_of_others(chance, files[name])
    else:
        files[name] = damaged_file(chance, name, files[name])
    return files


def _run_unet(source: Path) -> None:
    unet = load_unet(source, torch.float32)
    config = unet.config
    if max(config.block_out_channels) > MOST or config.size_multiple > 16:
        return
    size = config.size_multiple * (1 if config.any_size else 2)
    frames = (2,) if config.is_video else ()
    values = {"x": normal(1, *frames, config.in_channels, 2 * size, size)}
    if config.context_dim is not None:
        values["context"] = normal(1, 3, config.context_dim)
    if config.class_embedding == "projection":
        values["class_labels"] = normal(1, config.class_features)
    elif config.class_embedding == "timestep" or config.num_classes is not None:
        values["class_labels"] = torch.tensor([0])
    out = unet(t=torch.tensor([7]), **values)
    assert out.shape == (1, *frames, config.out_channels, 2 * size, size), out.shape


def _run_autoencoder(source: Path) -> None:
    autoencoder = load_autoencoder(source, torch.float32)
    config = autoencoder.config
    out = autoencoder.decode(normal(1, 2, config.latent_channels, 2, 3))
    assert out.shape == (1, 2, config.out_channels, 2 * config.scale, 3 * config.scale), out.shape


def _run_text_encoder(source: Path) -> None:
    encoder = find_text_encoder(source).read(torch.float32, "cpu")
    config = encoder.config
    out = encoder(torch.zeros(2, min(5, config.max_length), dtype=torch.int64))
    assert out.shape == (2, min(5, config.max_length), config.width), out.shape


def _run_tokenizer(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    ids = tokenizer(["a ab b", "", "\U0001f600 <|endoftext|> x" * 9])
    assert ids.dtype is torch.int64 and ids.shape[0] == 3, ids.shape
    assert bool((ids >= 0).all())


def _run_scheduler(folder: Path) -> None:
    values = read_json(folder / "scheduler_config.json")
    table = diffusers_schedule(values).table("ddim", 5)
    assert bool(table.coeffs.isfinite().all()), f"{values}: coefficients are not finite"


RUNS: dict[str, Callable[[Path], None]] = {
    "unet": _run_unet,
    "vae": _run_autoencoder,
    "text": _run_text_encoder,
    "tokenizer": _run_tokenizer,
    "scheduler": _run_scheduler,
}


def case(chance: random.Random, folder: Path) -> str:
    form = chance.choice(sorted(peers()))
    files = peers()[form]
    whole = chance.random() < 0.03
    place = written(folder / "peer", files if whole else damaged_peer(chance, files))
    kind = form.split()[0]
    alone = len(files) == 1 and kind != "scheduler"
    source = next(iter(place.rglob("*.*")), place) if alone else place
    try:
        RUNS[kind](source)
    except (ValueError, TypeError, OSError) as error:
        assert not whole, f"{form}: {error}"
        text = str(error)
        assert text.strip() and "weights_only=False" not in text, repr(error)
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{form}: {type(error).__name__}: {error}") from error
    return "done"
