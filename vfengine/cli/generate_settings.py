"""The settings of `python -m vfengine.generate`, one by one; settings.py reads them.

Flags, entries of a file, defaults, help and docs/settings.md (`make settings`) are made from
`SETTINGS`. Nothing here imports torch.
"""

from __future__ import annotations

import argparse

from ..formats.lora_files import LoraFile, parse_lora
from ..names import AUTO, BASE_PATHS, CHROMAS, CODECS, DTYPE_NAMES, FILTERS, SOLVERS
from ..pipelines.request import SamplingRequest, TextRequest
from ..pipelines.reuse_every import plain_reuse_every
from .flags import ON_OFF, SWITCH, Kind, Setting, choice, number, repeated, text, whole


def _every(text: str) -> int | str:
    """--reuse-every in its plain form; a request knows its model's phases."""
    try:
        return plain_reuse_every(text, SamplingRequest.sampled)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("reuse_every ")) from error


_COUNT = whole(1, 100_000)
_EVERY = Kind("whole number, or `base=N,residual=N`", {"metavar": "N", "type": _every})
_SEED = whole(0, 2**64 - 1, "S")
MAX_SEED = 2**64 - 2  # of --seed, whose successor is a seed too
_SAMPLE = whole(0, 2**31 - 1, "K")
RAY_ADDRESS = Kind("address", {"metavar": "ADDRESS", "nargs": "?", "const": "local"})


def _field(name: str, group: str, kind: Kind, help: str, otherwise: str = "") -> Setting:
    """A setting that is a field of a request, with the request's default."""
    request = SamplingRequest if hasattr(SamplingRequest, name) else TextRequest
    return Setting(name, group, kind, help, getattr(request, name), otherwise)


def _lora(words: str) -> LoraFile:
    try:
        return parse_lora(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


LORA = Setting(
    "lora",
    "how",
    repeated(Kind("file, or file:scale", {"metavar": "FILE:SCALE", "type": _lora})),
    "add this LoRA to the weights, SCALE times, or once without :SCALE; a folder of PEFT will do",
)
PHASE_DEVICES = (
    Setting(
        "base_device",
        "how",
        text("NAME"),
        "device of the base phase, with the text encoder",
        None,
        "that of --device",
    ),
    Setting(
        "residual_device",
        "how",
        text("NAME"),
        "device of the residual phase, with the decoder",
        None,
        "that of --device",
    ),
)
SETTINGS = (
    _field("label", "what", text("NAME"), "what to show, one of the names of --list-labels"),
    _field(
        "prompt", "what", text("TEXT"), "what to show, in words; for a model that takes prompts"
    ),
    _field("negative_prompt", "what", text("TEXT"), "what to avoid, in words", "empty"),
    Setting(
        "prompts",
        "what",
        text("FILE"),
        "make a clip of each line: a prompt, or a JSON object of settings; - is stdin",
    ),
    Setting("list_labels", "what", SWITCH, "print the labels and stop", False),
    _field(
        "preview", "what", SWITCH, "write the base frame alone; the clip will have the same one"
    ),
    _field("image", "what", text("FILE"), "animate this picture, cropped to the model's size"),
    _field("num_frames", "what", whole(1, 4096), "frames of a clip", "as the model was trained"),
    _field("height", "what", whole(8, 8192), "height in pixels, of text-to-video", "the model's"),
    _field("width", "what", whole(8, 8192), "width in pixels, of text-to-video", "the model's"),
    _field(
        "num_inference_steps",
        "how",
        _COUNT,
        "steps of the solver",
        "the model's: 8 of unipc for the one that is included; of another solver 50",
    ),
    _field(
        "guidance_scale",
        "how",
        number(0, 100, "S"),
        "scale of classifier-free guidance; 1 is off",
        "2; 9 for a text-to-video model",
    ),
    Setting(
        "seed",
        "what",
        whole(0, MAX_SEED, "S"),
        "seed of a text-to-video clip; else short for --base-seed S --residual-seed S+1",
        None,
        "0",
    ),
    _field("base_seed", "what", _SEED, "seed of the base frame"),
    _field("residual_seed", "what", _SEED, "seed of the motion"),
    _field(
        "solver",
        "how",
        choice(SOLVERS),
        "solver of the sampling steps",
        "the model's: unipc for the one that is included, else ddim",
    ),
    _field("eta", "how", number(0, 1, "ETA"), "share of new noise in each step of ddim"),
    _field(
        "reuse_every",
        "how",
        _EVERY,
        "run the whole network on every N-th step, and on the others its shallow part, with "
        "features that were kept: of both phases, or as base=N,residual=N",
    ),
    _field("num_videos", "what", _COUNT, "number of clips"),
    _field(
        "num_residuals", "what", whole(1, 100_000, "K"), "motions of one base frame, a clip each"
    ),
    _field(
        "sample_offset",
        "what",
        _SAMPLE,
        "number of the first clip, on which its noise depends: clip K of --num-videos alone",
    ),
    Setting("batch_size", "how", whole(1, 4096), "clips that are made at a time", 1),
    _field(
        "window",
        "how",
        whole(0, 4096),
        "frames that the network of the motion sees at a time; 0 is all of them",
        "the trained length, for clips that are longer, if the model names it",
    ),
    _field(
        "window_overlap",
        "how",
        whole(1, 4096),
        "frames that two neighbouring windows share",
        "the least possible; half a window for a text-to-video model",
    ),
    _field(
        "loop",
        "what",
        SWITCH,
        "make a clip that repeats without a seam: its last and first frames are neighbours",
    ),
    Setting("fps", "where to", number(0.1, 1000, "FPS"), "frames a second", None, "the model's"),
    Setting(
        "output",
        "where to",
        text("FILE"),
        "file to write: .mp4, .webm, .mkv, .gif, .webp, or .png for a sheet of all frames; several "
        "clips are numbered; with --prompts, {index}, {label}, {prompt} and seeds are a line's",
        None,
        "LABEL.mp4, or LABEL.png with --preview; the first words of a prompt",
    ),
    Setting("resume", "where to", SWITCH, "pass over lines of --prompts whose files exist", False),
    _field(
        "save_latents",
        "where to",
        text("FILE"),
        "write finished latents to this .safetensors file before they are decoded",
    ),
    Setting(
        "latents", "where to", text("FILE"), "decode the latents in this file, without sampling"
    ),
    Setting(
        "codec",
        "where to",
        choice(CODECS),
        "codec of an mp4, webm or mkv; ffv1 is lossless",
        None,
        "h264 for mp4, vp9 for webm, ffv1 for mkv",
    ),
    Setting(
        "crf",
        "where to",
        whole(0, 63),
        "loss of the encoding: less is better, in a larger file",
        None,
        "17; 18 for vp9, 20 for av1",
    ),
    Setting(
        "chroma",
        "where to",
        choice(CHROMAS),
        "resolution of colours: half of the picture's, or the picture's own",
        None,
        "420; RGB for ffv1",
    ),
    Setting("no_metadata", "where to", SWITCH, "leave out of the file what made it", False),
    Setting("scale", "where to", whole(1, 64), "enlarge the pictures N times", 1),
    Setting("scale_filter", "where to", choice(FILTERS), "filter that enlarges them", "nearest"),
    Setting(
        "model",
        "how",
        text("DIR"),
        "folder of a checkpoint, or of a text-to-video model of diffusers or ModelScope",
        None,
        "the shipped model",
    ),
    Setting(
        "base_unet",
        "base path",
        text("DIR"),
        "use this image UNet, in diffusers' format, in place of the base network",
    ),
    LORA,
    Setting(
        "base_trajectory",
        "base path",
        text("FILE"),
        "read the base path from this .safetensors file; write it there if there is no such file",
    ),
    _field(
        "base_cache",
        "base path",
        text("DIR"),
        "look up the base path in this folder; add it if it is not there",
    ),
    _field(
        "base_offset",
        "base path",
        _SAMPLE,
        "number of the clip whose base path is followed: motion K of --num-residuals alone is "
        "--base-offset 0 --sample-offset K; in a --base-trajectory, number of the path",
        "the clip's own; 0 with --num-residuals",
    ),
    _field(
        "base_path",
        "base path",
        choice(BASE_PATHS),
        "follow the base network step by step, or finish the base frame and animate it",
        "the one that the checkpoint names",
    ),
    _field(
        "overlap_phases",
        "base path",
        SWITCH,
        "run both phases at once, the residual phase a step behind; needs --base-path stepwise",
    ),
    _field(
        "offload_base",
        "base path",
        ON_OFF,
        "free the base network before the residual phase, or keep it",
        "free it, unless a later batch needs it; on CUDA, only where there is too little room",
    ),
    Setting(
        "device",
        "how",
        text("NAME"),
        "device to compute on: cpu, cuda, cuda:1 …; auto is cuda where there is one, else cpu",
        AUTO,
    ),
    *PHASE_DEVICES,
    Setting(
        "dtype",
        "how",
        choice(DTYPE_NAMES),
        "precision of the networks; auto is bfloat16 where that is faster, else float32",
        AUTO,
    ),
    Setting("no_capture", "how", SWITCH, "run each step without a graph, on CUDA", False),
    Setting(
        "ray",
        "cluster",
        RAY_ADDRESS,
        "make the lines of --prompts on a Ray cluster: HOST:PORT, ray://HOST:PORT or auto; without "
        "ADDRESS a cluster of this machine's cores",
    ),
    Setting(
        "base_workers",
        "cluster",
        whole(1, 10_000),
        "workers that walk base paths",
        None,
        "as many as their share of the work asks for",
    ),
    Setting(
        "residual_workers",
        "cluster",
        whole(1, 10_000),
        "workers that follow base paths and write clips",
        None,
        "one a core or GPU, as far as memory reaches",
    ),
    Setting(
        "config",
        "how",
        text("FILE"),
        "read settings from this YAML or JSON file, or those of a clip from the clip itself",
    ),
    Setting(
        "dry_run", "where to", SWITCH, "print what would be made, with memory, and stop", False
    ),
    Setting("quiet", "where to", SWITCH, "print nothing but errors", False),
    Setting("json", "where to", SWITCH, "print one machine-readable line", False),
)
SHOWN = ("label", "prompt")
_SHORT = ("seed", "config")  # they stand for other settings
DEFAULTS = {setting.name: setting.default for setting in SETTINGS if setting.name not in _SHORT}
# What a command has once, however many lines of --prompts there are.
OF_THE_COMMAND = frozenset(
    ("prompts", "resume", "dry_run", "list_labels", "json", "quiet")
    + ("model", "base_unet", "lora", "device", "base_device", "residual_device")
    + ("dtype", "no_capture", "ray", "base_workers", "residual_workers")
)
SWITCHES = {setting.name for setting in SETTINGS if setting.is_switch}
REPEATED = {setting.name for setting in SETTINGS if setting.is_repeated}
ON_OFF_SETTINGS = {setting.name for setting in SETTINGS if setting.kind is ON_OFF}
