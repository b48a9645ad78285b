"""The settings of `python -m vfengine.generate`: flags over --config FILE over defaults.

Nothing here imports torch, so that --help and mistyped flags are answered at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..names import AUTO, BASE_PATHS, DTYPE_NAMES, FILTERS, SOLVERS

DEFAULTS = {
    "label": None,
    "list_labels": False,
    "preview": False,
    "image": None,
    "num_frames": None,
    "num_inference_steps": 50,
    "guidance_scale": 2.0,
    "base_seed": 0,
    "residual_seed": 1,
    "solver": "ddim",
    "eta": 0.0,
    "num_videos": 1,
    "num_residuals": 1,
    "batch_size": 1,
    "window": None,
    "window_overlap": None,
    "fps": None,
    "output": None,
    "scale": 1,
    "scale_filter": "nearest",
    "model": None,
    "base_unet": None,
    "base_trajectory": None,
    "base_cache": None,
    "base_path": None,
    "overlap_phases": False,
    "offload_base": None,
    "device": AUTO,
    "dtype": AUTO,
    "no_capture": False,
    "quiet": False,
    "json": False,
}
EITHER_WAY = ("offload_base",)  # true, false, or left to the rest of the settings

# a flag, why it cannot go with some others, and which; a flag alone stands for any value of it
APART = (
    ("--num-residuals", "they share one base path", ["--num-videos"]),
    (
        "--base-cache", "a cache finds base paths by seed and settings",
        ["--base-trajectory", "--image", "--overlap-phases"],
    ),
    (
        "--image", "the picture is the base frame",
        ["--base-trajectory", "--base-seed", "--base-path stepwise", "--preview",
         "--overlap-phases", "--base-unet"],
    ),
    (
        "--preview", "the base frame is all that is made",
        ["--num-frames", "--num-residuals", "--residual-seed", "--window", "--window-overlap",
         "--base-path", "--overlap-phases", "--offload-base", "--no-offload-base"],
    ),
    ("--overlap-phases", "both phases run at once", ["--base-path clean", "--offload-base"]),
)  # fmt: skip
# what a plain video model has no use for
BASE_FLAGS = (
    *("--base-seed", "--base-path", "--base-trajectory", "--base-cache", "--image", "--preview"),
    *("--num-residuals", "--window", "--window-overlap", "--overlap-phases"),
    *("--offload-base", "--no-offload-base"),
)


class UsageError(ValueError):
    """Bad input, in one line."""


def one_line(thing: object) -> str:
    """An error's reason, or any value, without line breaks."""
    return " ".join(str(getattr(thing, "strerror", None) or thing).split())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            limit = "2^64-1" if high == 2**64 - 1 else high
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {limit}, got {text!r}"
            )
        return value

    return convert


def _number(low: float, high: float) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # also refuses NaN
            raise argparse.ArgumentTypeError(
                f"expected a number from {low:g} to {high:g}, got {text!r}"
            )
        return value

    return convert


def _parser() -> _Parser:
    """All flags, each absent from the result unless given."""
    parser = _Parser(
        prog="python -m vfengine.generate",
        description="Generate clips with a decomposed video diffusion model (VideoFusion).",
        epilog="Flags may be written with hyphens or underscores.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    seed = _whole(0, 2**64 - 1)

    what = parser.add_argument_group("what")
    what.add_argument("--label", metavar="NAME", help="what to show; see --list-labels")
    what.add_argument("--list-labels", action="store_true", help="print the labels and stop")
    what.add_argument(
        "--image", metavar="FILE",
        help="a picture to animate, cropped and resized to the model's size",
    )  # fmt: skip
    what.add_argument(
        "--preview", action="store_true",
        help="write the base frame alone, bit for bit that of the clip, and stop",
    )  # fmt: skip
    what.add_argument(
        "--num-frames", type=_whole(1, 4096), metavar="N", help="default: as the model was trained"
    )
    what.add_argument("--num-videos", type=_whole(1, 100_000), metavar="N", help="default: 1")
    what.add_argument(
        "--num-residuals", type=_whole(1, 100_000), metavar="K",
        help="motions of one base frame, whose path is walked once; default: 1",
    )  # fmt: skip
    what.add_argument(
        "--seed", type=_whole(0, 2**64 - 2), metavar="S",
        help="short for --base-seed S --residual-seed S+1",
    )  # fmt: skip
    what.add_argument("--base-seed", type=seed, metavar="S", help="of the base frame; default: 0")
    what.add_argument("--residual-seed", type=seed, metavar="S", help="of the motion; default: 1")

    how = parser.add_argument_group("how")
    how.add_argument("--model", metavar="DIR", help="checkpoint folder; default: the shipped one")
    how.add_argument(
        "--num-inference-steps", type=_whole(1, 100_000), metavar="N", help="default: 50"
    )
    how.add_argument(
        "--guidance-scale", type=_number(0, 100), metavar="S",
        help="of classifier-free guidance, 1 is off; default: 2",
    )  # fmt: skip
    how.add_argument("--solver", choices=SOLVERS, help="default: ddim")
    how.add_argument("--eta", type=_number(0, 1), help="noise that ddim adds; default: 0")
    how.add_argument(
        "--window", type=_whole(0, 4096), metavar="N",
        help="frames that the residual network sees at a time, 0 for all; default: as the model "
        "was trained, where --num-frames is larger",
    )  # fmt: skip
    how.add_argument(
        "--window-overlap", type=_whole(1, 4096), metavar="N",
        help="frames that neighbouring windows share; default: the least possible",
    )  # fmt: skip
    how.add_argument(
        "--device", metavar="NAME",
        help="cpu, cuda, cuda:1 …, or auto, the default: cuda where there is one, else cpu",
    )  # fmt: skip
    how.add_argument(
        "--dtype", choices=tuple(DTYPE_NAMES),
        help="of the networks; auto, the default: bfloat16 where that is faster, else float32",
    )  # fmt: skip
    how.add_argument(
        "--batch-size", type=_whole(1, 4096), metavar="N", help="clips at a time; default: 1"
    )
    how.add_argument(
        "--no-capture", action="store_true", help="on CUDA, run each step without a graph"
    )
    how.add_argument("--config", metavar="FILE", help="YAML or JSON of these settings")

    path = parser.add_argument_group("base path")
    path.add_argument(
        "--base-path", choices=BASE_PATHS,
        help="follow the base network step by step, or finish the base frame and animate it; "
        "default: what the checkpoint names",
    )  # fmt: skip
    path.add_argument(
        "--base-unet", metavar="DIR",
        help="a published image UNet, in diffusers' format, in place of the base network",
    )  # fmt: skip
    path.add_argument(
        "--base-trajectory", metavar="FILE",
        help="a .safetensors file: read the base path if it exists, write it otherwise",
    )  # fmt: skip
    path.add_argument(
        "--base-cache", metavar="DIR",
        help="a folder: read the base path if one of these settings is there, add it otherwise",
    )  # fmt: skip
    path.add_argument(
        "--overlap-phases", action="store_true",
        help="run the residual phase a step behind the base phase; needs --base-path stepwise",
    )  # fmt: skip
    path.add_argument(
        "--offload-base", action=argparse.BooleanOptionalAction,
        help="let the base network go before the residual phase, or keep it; default: keep it "
        "where a later batch needs it, on CUDA where there is room",
    )  # fmt: skip

    where = parser.add_argument_group("where to")
    where.add_argument(
        "--output", metavar="FILE",
        help=".mp4, .webm, .gif, .webp, or .png for a sheet of all frames; several clips are "
        "numbered; default: LABEL.mp4, with --preview LABEL.png",
    )  # fmt: skip
    where.add_argument("--fps", type=_number(0.1, 1000), help="default: the model's")
    where.add_argument(
        "--scale", type=_whole(1, 64), metavar="N", help="enlarge N times; default: 1"
    )
    where.add_argument("--scale-filter", choices=FILTERS, help="default: nearest")
    where.add_argument("--quiet", action="store_true", help="print nothing but errors")
    where.add_argument("--json", action="store_true", help="print one machine-readable line")
    return parser


def read_settings(argv: Sequence[str]) -> argparse.Namespace:
    """Flags over --config FILE over `DEFAULTS`, whose keys the result has as attributes.

    Its `given` names those that flags or the file set; --seed sets none of the two by name. Raises
    UsageError for whatever is not understood, or cannot go together.
    """
    parser = _parser()
    flags, given = _parse(parser, argv)
    file = flags.pop("config", None)
    config, in_file = ({}, set()) if file is None else _read_config_file(parser, Path(file))
    given = frozenset(given | (in_file - flags.keys())) & DEFAULTS.keys()
    settings = argparse.Namespace(**{**DEFAULTS, **config, **flags}, given=given)
    asked = asked_for(settings)
    for flag, reason, others in APART:
        for other in others:
            if flag in asked and other in asked:
                raise UsageError(f"{flag} cannot go with {other}: {reason}")
    return settings


def asked_for(settings: argparse.Namespace) -> list[str]:
    """What was given, as flags: for --base-path clean both this and "--base-path".

    One video, or one motion, is what there is without asking.
    """
    flags = []
    for name in DEFAULTS:
        value = getattr(settings, name)
        if name not in settings.given or (name in ("num_videos", "num_residuals") and value == 1):
            continue
        flag = ("no_" if value is False else "") + name
        flag = "--" + flag.replace("_", "-")
        flags += [flag] if isinstance(value, bool) else [flag, f"{flag} {value}"]
    return flags


def _parse(parser: _Parser, tokens: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """What the tokens ask for, and nothing else; --seed already in two. And the names they use."""
    values = vars(parser.parse_args([_with_hyphens(token) for token in tokens]))
    given = set(values)
    if "seed" in values:
        seed = values.pop("seed")
        values = {"base_seed": seed, "residual_seed": seed + 1, **values}
    if "dtype" in values:
        values["dtype"] = DTYPE_NAMES[values["dtype"]]
    return values, given


def _with_hyphens(token: str) -> str:
    """--num_frames=4 as --num-frames=4; values stay as they are."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if token.startswith("--") else token


def _read_config_file(parser: _Parser, file: Path) -> tuple[dict[str, Any], set[str]]:
    """The file's entries, put through the same checks as flags; as `_parse`."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        entries = json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"--config {file}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:  # ValueError: of JSON, or text that is not UTF-8
        raise UsageError(f"--config {file}: cannot be read ({one_line(error)})") from error
    if entries is None:
        entries = {}
    if not isinstance(entries, dict):
        raise UsageError(f"--config {file}: expected names and values, got {one_line(entries)}")
    known = {*DEFAULTS, "seed"} - {"list_labels"}
    tokens = {}
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(
                f"--config {file}: unknown entry {key!r}, expected some of "
                f"{', '.join(sorted(known))}"
            )
        if name in tokens:
            raise UsageError(f"--config {file}: {name} is there twice")
        switch = DEFAULTS.get(name) is False or name in EITHER_WAY
        if value is None and (not switch or name in EITHER_WAY):
            continue  # as if it were not there
        if switch is not isinstance(value, bool) or isinstance(value, (dict, list)):
            wanted = "true or false" if switch else "one value"
            raise UsageError(f"--config {file}: {name} must be {wanted}, got {one_line(value)}")
        if not switch:
            tokens[name] = f"--{name}={value}"
        elif value or name in EITHER_WAY:
            tokens[name] = f"--{name}" if value else f"--no-{name}"
    try:
        return _parse(parser, list(tokens.values()))
    except UsageError as error:
        raise UsageError(f"--config {file}: {error}") from error
