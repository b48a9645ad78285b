"""The settings of `python -m vfengine.serve`: its flags, their defaults and help.

Nothing here imports torch, or what the extra `serve` installs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..names import AUTO, DTYPE_NAMES
from .flags import SWITCH, Parser, Setting, UsageError, add_flags, choice, flag, number, text, whole
from .generate_settings import LORA, PHASE_DEVICES, RAY_ADDRESS

_MODEL, _ADDRESS, _BOUNDS, _STORE = "model", "address", "bounds", "store"
_FOLDER, _FILE = text("DIR", Path), text("FILE", Path)

SETTINGS = (
    Setting(
        "model",
        _MODEL,
        _FOLDER,
        "folder of a checkpoint, or of a text-to-video model of diffusers or ModelScope",
        None,
        "the shipped model",
    ),
    Setting(
        "served_model_name",
        _MODEL,
        text("NAME"),
        "name of the model in requests",
        None,
        "the folder's; vfengine for the shipped model",
    ),
    Setting(
        "base_unet",
        _MODEL,
        _FOLDER,
        "use this image UNet, in diffusers' format, in place of the base network",
    ),
    LORA._replace(group=_MODEL),
    Setting(
        "device",
        _MODEL,
        text("NAME"),
        "device to compute on: cpu, cuda, cuda:1 …; auto is cuda where there is one, else cpu",
        AUTO,
    ),
    *(setting._replace(group=_MODEL) for setting in PHASE_DEVICES),
    Setting(
        "dtype",
        _MODEL,
        choice(DTYPE_NAMES),
        "precision of the networks; auto is bfloat16 where that is faster, else float32",
        AUTO,
    ),
    Setting("no_capture", _MODEL, SWITCH, "run each step without a graph, on CUDA", False),
    Setting("workers", _MODEL, whole(1, 64), "engines, each a process with its own model", 1),
    Setting(
        "batch_size",
        _MODEL,
        whole(1, 4096),
        "largest number of requests of equal shape that are made at a time",
        None,
        "4 on CUDA, 1 on a CPU",
    ),
    Setting(
        "ray",
        _MODEL,
        RAY_ADDRESS,
        "run the engines on a Ray cluster: HOST:PORT, ray://HOST:PORT or auto; without ADDRESS a "
        "cluster of this machine's cores",
    ),
    Setting("host", _ADDRESS, text("ADDRESS"), "address to listen at", "127.0.0.1"),
    Setting("port", _ADDRESS, whole(0, 65535), "port to listen at; 0 is any free one", 8000),
    Setting(
        "api_key_file",
        _ADDRESS,
        _FILE,
        "file of keys, one a line, of which requests must name one; needed for an address other "
        "than a loopback one",
    ),
    Setting("max_queue", _BOUNDS, whole(1, 1_000_000), "requests that may wait", 100),
    Setting("max_body", _BOUNDS, whole(1, 4096, "MIB"), "size of a request's body, in MiB", 32),
    Setting("max_steps", _BOUNDS, whole(1, 100_000), "steps that a request may ask for", 200),
    Setting(
        "max_seconds",
        _BOUNDS,
        number(0.01, 3600, "SECONDS"),
        "length of a clip at the model's frames a second",
        12.0,
    ),
    Setting("max_scale", _BOUNDS, whole(1, 64), "times that pictures may be enlarged", 4),
    Setting(
        "store", _STORE, _FOLDER, "folder of jobs and clips; made if needed", Path("vfengine-jobs")
    ),
    Setting(
        "keep",
        _STORE,
        number(0, 1e6, "HOURS"),
        "hours after which a finished clip is removed; 0: never",
        24.0,
    ),
    Setting("quiet", "output", SWITCH, "print nothing but the address and errors", False),
)


def serve_parser(program: str = "python -m vfengine.serve") -> Parser:
    """All flags, at their defaults unless they are used."""
    parser = Parser(
        program,
        description="Answer requests for clips over HTTP: an API that the openai client speaks "
        "(/v1/videos), a page (/), and a queue on disk that outlives the server.",
        epilog="Flags may be written with hyphens or underscores.",
        allow_abbrev=False,
    )
    add_flags(parser, SETTINGS)
    parser.set_defaults(**{setting.name: setting.default for setting in SETTINGS})
    return parser


def read_settings(
    argv: Sequence[str], program: str = "python -m vfengine.serve"
) -> argparse.Namespace:
    """All settings, as attributes; served_model_name and dtype as they will be used.

    program: how the command was called, for help

    Raises UsageError for unknown flags and bad values.
    """
    settings = serve_parser(program).parse_args([_with_hyphens(token) for token in argv])
    settings.dtype = DTYPE_NAMES[settings.dtype]
    if settings.served_model_name is None:
        model = settings.model
        settings.served_model_name = "vfengine" if model is None else model.resolve().name
    if not settings.served_model_name.strip() or len(settings.served_model_name) > 200:
        raise UsageError("--served-model-name must have 1 to 200 characters")
    for device in ("base_device", "residual_device"):
        if settings.ray is not None and getattr(settings, device) is not None:
            raise UsageError(
                f"{flag(device)} cannot go with --ray: each engine has a device of its own"
            )
    if settings.ray is not None and ":" in settings.device:
        raise UsageError(
            f"--device {settings.device} cannot go with --ray, which gives each engine its GPU: "
            "--device cuda"
        )
    return settings


def _with_hyphens(token: str) -> str:
    """--max_queue=4 as --max-queue=4; values stay as they are."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if token.startswith("--") else token
