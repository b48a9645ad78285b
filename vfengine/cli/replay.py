"""--config CLIP: what made a clip, from the clip itself, to make it again.

A clip may come from anyone. Its settings are read as those of a --config file are, but for those
that name places: only pipelines/clip_settings.py's are taken, and files by their bare names, which
must have the content that the clip was made of. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..formats.lora_files import lora_record
from ..pipelines.clip_settings import FILES, RECORDED, file_record, model_record
from ..pipelines.conflicts import conflicts
from .flags import UsageError, flag, one_line
from .generate_settings import REPEATED

if TYPE_CHECKING:
    from ..pipelines.pipeline import Pipeline

SUFFIXES = (".mp4", ".webm", ".mkv", ".gif", ".webp", ".png")
_ENCODING = ("codec", "crf", "chroma")


class Clip(NamedTuple):
    """A clip that is made again.

    record:  what its file carries (`pipelines.clip_settings`)
    entries: the settings of it that no flag takes the place of, with files where they are found
    output:  the file to write, unless a flag names one
    flags:   names of the settings that flags set
    """

    file: Path
    record: Mapping[str, Any]
    entries: Mapping[str, Any]
    output: str
    flags: frozenset[str]


def is_clip(file: str) -> bool:
    """Whether a --config file is a clip, by its name."""
    return Path(file).suffix.lower() in SUFFIXES


def read_clip(file: Path, flags: Mapping[str, Any]) -> Clip:
    """The clip in a file, and its settings beside those of the flags.

    A setting of the clip gives way to a flag of the same name, and to one that it cannot go with.
    How it is encoded gives way to an output of another format, and crf and chroma to --codec.

    Raises UsageError for a file without settings of ours, with settings that this version does not
    know or that no flags can tell, or for whose files there are none of that content.
    """
    record = _record(file)
    if record.get("beyond"):
        names = ", ".join(map(repr, record["beyond"]))
        raise UsageError(
            f"--config {file}: was made with what the command line has no setting for: {names}"
        )
    entries = {name: value for name, value in record["settings"].items() if name not in flags}
    for conflict in conflicts({**entries, **flags}):
        for name in (conflict.setting, conflict.other):
            if name not in flags:
                entries.pop(name, None)
    if flags.get("seed") is not None:  # stands for the others
        entries = {n: v for n, v in entries.items() if n not in ("base_seed", "residual_seed")}
    suffix = Path(flags.get("output") or file).suffix
    if flags.get("preview") and "output" not in flags:
        suffix = ".png"
    for name in _ENCODING:
        if suffix.lower() != file.suffix.lower() or "codec" in flags:
            entries.pop(name, None)
    for name in entries.keys() & {*FILES, "base_unet"}:
        entries[name] = _found(file, name, entries[name], record["files"].get(name, {}))
    if "lora" in entries:
        entries["lora"] = _loras(file, entries["lora"], record["files"].get("lora"))
    output = file.stem + "-again" + suffix
    return Clip(file, record, entries, output, frozenset(flags))


def check_clip(settings: argparse.Namespace, pipe: Pipeline) -> None:
    """Compares the clip of --config with the model and the version in use.

    Raises UsageError for another model; warns of it where flags name the model, of another version
    and of another kind of device.
    """
    clip = settings.clip
    if clip is None:
        return
    theirs, ours = clip.record["model"], model_record(pipe)
    same = ("fingerprint", "networks")
    if not any(theirs.get(name) for name in same):
        same = ("name",)  # of a published model, whose weights have no SHA-256
    if any(theirs.get(name) != ours.get(name) for name in same):
        words = f"{clip.file} was made by model {_model(theirs)}, but {_model(ours)} is in use"
        if not clip.flags & {"model", "base_unet", "lora"}:
            raise UsageError(f"{words}: --model names the folder of another")
        warnings.warn(words, stacklevel=2)
    version, places = clip.record["vfengine"], (pipe.device.type, pipe.place("base").type)
    device = clip.record.get("device")
    made_on = device, clip.record.get("base_device", device)
    if version != __version__:
        words = f"{clip.file} was made by vfengine {version!r}, this is {__version__}"
        warnings.warn(f"{words}: the new clip may differ", stacklevel=2)
    if made_on != places:
        theirs, ours = (_kinds(*pair) for pair in (map(repr, made_on), places))
        words = f"{clip.file} was made on {theirs}, this is {ours}"
        warnings.warn(f"{words}: the new clip may differ", stacklevel=2)


def input_files(settings: argparse.Namespace) -> dict[str, dict[str, str]]:
    """The files that the settings' clips are made of, as their metadata tells; raises OSError."""
    named = {name: getattr(settings, name) for name in FILES}
    return {name: file_record(f) for name, f in named.items() if f is not None and Path(f).exists()}


# -- inside ----------------------------------------------------------------------------------------


def _record(file: Path) -> dict[str, Any]:
    """What a file carries, of the right form; UsageError for anything else."""
    from ..media.metadata import read_metadata

    try:
        text = read_metadata(file)
    except (ValueError, OSError) as error:
        raise UsageError(f"--config {one_line(error)}") from error
    try:
        record = json.loads(text or "")
    except (ValueError, RecursionError):
        record = None
    parts = ("settings", "model", "files", "beyond")
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("vfengine"), str)
        or not all(isinstance(record.setdefault(name, {}), dict) for name in parts)
        or not record["settings"]
        or not all(
            isinstance(found, list if name in REPEATED else dict)
            for name, found in record["files"].items()
        )
    ):
        raise UsageError(f"--config {file}: carries no settings of vfengine")
    for name, value in record["settings"].items():
        if name not in RECORDED or isinstance(value, dict | list) is not (name in REPEATED):
            raise UsageError(f"--config {file}: carries a setting that is unknown: {name!r}")
    return record


def _loras(file: Path, names: Any, records: Any) -> list[str]:
    """The LoRA that a clip names, as --lora takes them."""
    records = records or [{}] * len(names)
    if len(names) != len(records) or not all(isinstance(found, dict) for found in records):
        raise UsageError(f"--config {file}: names {len(names)} LoRA, and tells of {len(records)}")
    found = []
    for words, record in zip(map(str, names), records, strict=True):
        name, colon, scale = words.rpartition(":")
        found.append(_found(file, "lora", name, record, lora_record) + colon + scale)
    return found


def _found(
    file: Path,
    name: str,
    value: Any,
    record: Mapping[str, Any],
    record_of: Callable[[Path], Mapping[str, str]] = file_record,
) -> str:
    """Where a file or folder that a clip names is: here or beside the clip, with its content.

    record:    what the clip says of its content
    record_of: what says the same of a file
    """
    what = f"--config {file}: was made with {flag(name)} {value!r}"
    if not isinstance(value, str) or value in ("", ".", "..") or Path(value).name != value:
        raise UsageError(f"{what}, which is no name of a file")
    there = [path for path in (Path(value), file.parent / value) if path.exists()]
    if not there:
        raise UsageError(
            f"{what}, which is neither here nor beside it: {flag(name)} says where it is"
        )
    if name == "base_unet":
        return str(there[0])  # the model's fingerprint is of its content
    wanted = str(record.get("sha256"))
    try:
        digests = [record_of(path)["sha256"] for path in there if path.is_file() or name == "lora"]
    except OSError as error:  # a folder that is no LoRA
        raise UsageError(f"{what}: {one_line(error)}") from error
    for path, digest in zip(there, digests, strict=False):
        if digest == wanted:
            return str(path)
    raise UsageError(
        f"{what} of SHA-256 {wanted[:16]!r}, but {there[0]} is another file"
        + (f" ({digests[0][:16]})" if digests else "")
    )


def _kinds(device: str, base_device: str) -> str:
    """The kinds of device that a clip was made on, in words."""
    return device if base_device == device else f"{device} with the base on {base_device}"


def _model(record: Mapping[str, Any]) -> str:
    """A model's name and what tells it from others."""
    networks = record.get("networks")
    digests = dict(networks) if isinstance(networks, dict) else {}
    shown = ", ".join(f"{name} {digest}" for name, digest in digests.items())
    words = f"{record.get('name')!r} ({shown or record.get('fingerprint')})"
    return "".join(letter if letter.isprintable() else "?" for letter in words)
