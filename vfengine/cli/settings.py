"""The settings of `python -m vfengine.generate`: flags over --config FILE over defaults.

`SETTINGS` lists them. Flags, entries of a file, defaults, help and docs/settings.md
(`make settings`) are made from it. Nothing here imports torch, so that --help and errors are
printed at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..names import AUTO, BASE_PATHS, CHROMAS, CODECS, DTYPE_NAMES, FILTERS, SOLVERS
from ..pipelines.request import SamplingRequest, TextRequest, conflicts, effective
from .flags import (
    ON_OFF,
    SWITCH,
    Kind,
    Parser,
    Setting,
    UsageError,
    add_flags,
    choice,
    flag,
    number,
    one_line,
    text,
    whole,
)
from .replay import Clip, is_clip, read_clip

GENERATE = "python -m vfengine.generate"

# -- the settings ----------------------------------------------------------------------------------

_COUNT = whole(1, 100_000)
_SEED = whole(0, 2**64 - 1, "S")
_MAX_SEED = 2**64 - 2  # of --seed, whose successor is a seed too
_SAMPLE = whole(0, 2**31 - 1, "K")


def _field(name: str, group: str, kind: Kind, help: str, otherwise: str = "") -> Setting:
    """A setting that is a field of a request, with the request's default."""
    request = SamplingRequest if hasattr(SamplingRequest, name) else TextRequest
    return Setting(name, group, kind, help, getattr(request, name), otherwise)


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
    _field("num_inference_steps", "how", _COUNT, "steps of the solver"),
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
        whole(0, _MAX_SEED, "S"),
        "seed of a text-to-video clip; else short for --base-seed S --residual-seed S+1",
        None,
        "0",
    ),
    _field("base_seed", "what", _SEED, "seed of the base frame"),
    _field("residual_seed", "what", _SEED, "seed of the motion"),
    _field("solver", "how", choice(SOLVERS), "solver of the sampling steps"),
    _field("eta", "how", number(0, 1, "ETA"), "share of new noise in each step of ddim"),
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
    Setting(
        "dtype",
        "how",
        choice(DTYPE_NAMES),
        "precision of the networks; auto is bfloat16 where that is faster, else float32",
        AUTO,
    ),
    Setting("no_capture", "how", SWITCH, "run each step without a graph, on CUDA", False),
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
_SHOWN = ("label", "prompt")
_SHORT = ("seed", "config")  # they stand for other settings
DEFAULTS = {setting.name: setting.default for setting in SETTINGS if setting.name not in _SHORT}
# What a command has once, however many lines of --prompts there are.
OF_THE_COMMAND = frozenset(
    ("prompts", "resume", "dry_run", "list_labels", "json", "quiet")
    + ("model", "base_unet", "device", "dtype", "no_capture")
)
_SWITCHES = {setting.name for setting in SETTINGS if setting.is_switch}
_ON_OFF = {setting.name for setting in SETTINGS if setting.kind is ON_OFF}


# -- reading them ----------------------------------------------------------------------------------


@lru_cache  # a file may have many lines
def generate_parser(program: str = GENERATE) -> Parser:
    """All flags, each absent from the result unless it is used."""
    parser = Parser(
        prog=program,
        description="Generate clips with a decomposed video diffusion model (VideoFusion), or with "
        "a published text-to-video model.",
        epilog="Flags may be written with hyphens or underscores.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(parser, SETTINGS)
    return parser


def read_settings(argv: Sequence[str], program: str = GENERATE) -> argparse.Namespace:
    """Flags over --config FILE over `DEFAULTS`, whose keys the result has as attributes.

    Its `given` names those that flags or the file set; --seed does not count as the two seeds. Its
    `clip` is the clip that --config names, or None.
    Raises UsageError for flags and entries that are unknown, have bad values or cannot go together.
    """
    parser = generate_parser(program)
    flags, given = _parse(parser, argv)
    file, clip = flags.pop("config", None), None
    if file is None:
        config, in_file = {}, set()
    elif is_clip(file):
        clip = read_clip(Path(file), {name: flags[name] for name in given & flags.keys()})
        config, in_file = _read_clip(parser, clip)
    else:
        config, in_file = _read_config_file(parser, Path(file))
    given = frozenset(given | (in_file - flags.keys())) & DEFAULTS.keys()
    settings = argparse.Namespace(**{**DEFAULTS, **config, **flags}, given=given, clip=clip)
    if settings.resume and settings.prompts is None:
        raise UsageError("--resume needs --prompts, whose lines it may pass over")
    if clip is not None and settings.prompts is not None:
        raise UsageError(f"--prompts cannot go with --config {clip.file}, which is one clip")
    _check_conflicts(settings)
    return settings


def line_settings(
    command: argparse.Namespace, entries: Mapping[str, Any], index: int
) -> argparse.Namespace:
    """The settings of a line of --prompts: its entries over those of the command.

    Without seeds of its own, line `index` has those of --seed S+index, S being the command's.
    Raises UsageError as `read_settings` does, and for an entry that only a command can have.
    """
    values, given = _parse(generate_parser(), _tokens(entries, OF_THE_COMMAND))
    former = vars(command)
    kept = command.given
    if given & set(_SHOWN):  # one of them takes the place of what the command shows
        former = {**former, **{name: DEFAULTS[name] for name in _SHOWN}}
        kept = kept - set(_SHOWN)
    own = {name: former[name] for name in ("base_seed", "residual_seed") if name in kept}
    seeds = {}
    if former["latents"] is None and "latents" not in given:
        seed = former.get("seed", 0) + index
        if seed > _MAX_SEED:
            raise UsageError(f"the seed of line {index} would be {seed}, above {_MAX_SEED}")
        seeds = {"seed": seed, "base_seed": seed, "residual_seed": seed + 1, **own}
    given = frozenset(kept | (given & DEFAULTS.keys()))
    settings = argparse.Namespace(**{**former, **seeds, **values, "given": given})
    _check_conflicts(settings)
    return settings


def _check_conflicts(settings: argparse.Namespace) -> None:
    """UsageError for settings that cannot go together."""
    written = written_settings(settings)
    for conflict in conflicts(written):
        value = written[conflict.other]
        shown = value if isinstance(value, bool) else conflict.value
        raise UsageError(
            f"{flag(conflict.setting)} cannot go with {flag(conflict.other, shown)}: "
            f"{conflict.reason}"
        )


def written_settings(settings: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags or the file set, by name, without those that change nothing."""
    return effective({name: vars(settings)[name] for name in DEFAULTS if name in settings.given})


def _parse(parser: Parser, tokens: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """The settings in the tokens, --seed as two seeds, and the names that the tokens use."""
    values = vars(parser.parse_args([_with_hyphens(token) for token in tokens]))
    given = set(values)
    if "seed" in values:
        seed = values["seed"]
        values = {"base_seed": seed, "residual_seed": seed + 1, **values}
    if "dtype" in values:
        values["dtype"] = DTYPE_NAMES[values["dtype"]]
    return values, given


def _with_hyphens(token: str) -> str:
    """--num_frames=4 as --num-frames=4; values stay as they are."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if token.startswith("--") else token


def _read_config_file(parser: Parser, file: Path) -> tuple[dict[str, Any], set[str]]:
    """The settings and names in the file, checked as flags are; as `_parse`."""
    import yaml

    from ..files import parse_json

    try:
        content = file.read_text(encoding="utf-8")
        entries = parse_json(content) if file.suffix.lower() == ".json" else yaml.safe_load(content)
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except RecursionError as error:
        raise UsageError(f"--config {file}: nested too deeply") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: of JSON, or text that is not UTF-8
        raise UsageError(f"--config {file}: cannot be read ({one_line(error)})") from error
    if entries is None:
        entries = {}
    if not isinstance(entries, dict):
        raise UsageError(f"--config {file}: expected names and values, got {one_line(entries)}")
    try:
        return _parse(parser, _tokens(entries))
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from error


def _read_clip(parser: Parser, clip: Clip) -> tuple[dict[str, Any], set[str]]:
    """The settings and names in a clip, checked as flags are; as `_parse`."""
    try:
        config, names = _parse(parser, _tokens(dict(clip.entries)))
    except UsageError as error:
        raise UsageError(f"--config {clip.file}: {error}") from error
    named = {} if "prompts" in clip.flags else {"output": clip.output}
    return {**named, **config}, names


def _tokens(
    entries: Mapping[str, Any], foreign: Set[str] = frozenset(("list_labels",))
) -> list[str]:
    """A file's entries as flags; UsageError for an unknown name or a value of a wrong kind.

    foreign: settings that the file cannot have
    """
    known = {*DEFAULTS, "seed"} - foreign
    tokens = {}
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name in foreign & OF_THE_COMMAND - {"list_labels"}:
            raise UsageError(f"{name} is the same for all lines: {flag(name)} of the command")
        if name not in known:
            raise UsageError(f"unknown entry {key!r}, expected some of {', '.join(sorted(known))}")
        if name in tokens:
            raise UsageError(f"{name} is there twice")
        switch = name in _SWITCHES
        if value is None and (not switch or name in _ON_OFF):
            continue  # null is as good as no entry
        if switch is not isinstance(value, bool) or isinstance(value, (dict, list)):
            wanted = "true or false" if switch else "one value"
            raise UsageError(f"{name} must be {wanted}, got {one_line(value)}")
        if not switch:
            tokens[name] = f"--{name}={value}"
        elif value or name in _ON_OFF:
            tokens[name] = flag(name, value)
    return list(tokens.values())
