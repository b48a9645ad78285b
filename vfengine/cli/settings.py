"""The settings of `python -m vfengine.generate`: flags over --config FILE over defaults.

generate_settings.py lists them. Nothing here imports torch, so that --help and errors are printed
at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..names import DTYPE_NAMES
from ..pipelines.conflicts import conflicts, effective
from .flags import Parser, UsageError, add_flags, flag, one_line
from .generate_settings import (
    DEFAULTS,
    MAX_SEED,
    OF_THE_COMMAND,
    ON_OFF_SETTINGS,
    REPEATED,
    SETTINGS,
    SHOWN,
    SWITCHES,
)
from .replay import Clip, is_clip, read_clip

GENERATE = "python -m vfengine.generate"


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
    _check_cluster(settings)
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
    if given & set(SHOWN):  # one of them takes the place of what the command shows
        former = {**former, **{name: DEFAULTS[name] for name in SHOWN}}
        kept = kept - set(SHOWN)
    own = {name: former[name] for name in ("base_seed", "residual_seed") if name in kept}
    seeds = {}
    if former["latents"] is None and "latents" not in given:
        seed = former.get("seed", 0) + index
        if seed > MAX_SEED:
            raise UsageError(f"the seed of line {index} would be {seed}, above {MAX_SEED}")
        seeds = {"seed": seed, "base_seed": seed, "residual_seed": seed + 1, **own}
    given = frozenset(kept | (given & DEFAULTS.keys()))
    settings = argparse.Namespace(**{**former, **seeds, **values, "given": given})
    _check_conflicts(settings)
    return settings


def _check_cluster(settings: argparse.Namespace) -> None:
    """UsageError for settings of a cluster that mean nothing here."""
    for name in ("base_workers", "residual_workers"):
        count = getattr(settings, name)
        if count is not None and settings.ray is None:
            raise UsageError(f"{flag(name, count)} needs --ray, on whose cluster they are")
    if settings.ray is None:
        return
    if settings.prompts is None:
        raise UsageError("--ray needs --prompts, whose lines its workers make")
    if ":" in settings.device:
        raise UsageError(
            f"--device {settings.device} cannot go with --ray, which gives each worker its GPU: "
            "--device cuda"
        )


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
    tokens: dict[str, list[str]] = {}
    for key, value in entries.items():
        name = str(key).replace("-", "_")
        if name in foreign & OF_THE_COMMAND - {"list_labels"}:
            raise UsageError(f"{name} is the same for all lines: {flag(name)} of the command")
        if name not in known:
            raise UsageError(f"unknown entry {key!r}, expected some of {', '.join(sorted(known))}")
        if name in tokens:
            raise UsageError(f"{name} is there twice")
        switch, several = name in SWITCHES, name in REPEATED
        if value is None and (not switch or name in ON_OFF_SETTINGS):
            continue  # null is as good as no entry
        values = value if several and isinstance(value, list) else [value]
        if any(
            switch is not isinstance(one, bool) or isinstance(one, (dict, list)) for one in values
        ):
            wanted = "true or false" if switch else "a list of values" if several else "one value"
            raise UsageError(f"{name} must be {wanted}, got {one_line(value)}")
        if not switch:
            tokens[name] = [f"--{name}={one}" for one in values]
        elif value or name in ON_OFF_SETTINGS:
            tokens[name] = [flag(name, value)]
    return [token for written in tokens.values() for token in written]
