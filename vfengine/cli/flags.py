"""A command's flags as a table: its parser and its page of documentation are made from one list.

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from .streams import say


class UsageError(ValueError):
    """Bad input, in one line."""


class Failure(RuntimeError):
    """Something that went wrong after all input had been accepted, in one line."""


def one_line(thing: object) -> str:
    """An error's reason, or any value, without line breaks."""
    return " ".join(str(getattr(thing, "strerror", None) or thing).split())


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, where argparse prints its usage and exits.

    Help that cannot be printed raises Unsaid.
    """

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if value == [] or value == [[]]:  # which some versions make of --name=--
                self.error(f"argument {flag(name)}: expected one argument")
        return found, rest

    def print_help(self, file: None = None) -> None:
        say(self.format_help(), end="")


# -- kinds of values -------------------------------------------------------------------------------


class Kind(NamedTuple):
    """The values that a setting may have.

    words:     for the documentation
    arguments: of `ArgumentParser.add_argument`
    """

    words: str
    arguments: Mapping[str, Any]


SWITCH = Kind("switch", {"action": "store_true"})
ON_OFF = Kind("switch", {"action": argparse.BooleanOptionalAction})  # --name or --no-name


def text(metavar: str, convert: Callable[[str], Any] = str) -> Kind:
    words = {"FILE": "file", "DIR": "folder", "TEXT": "text"}.get(metavar, "name")
    return Kind(words, {"metavar": metavar, "type": convert})


def choice(names: Iterable[str]) -> Kind:
    names = tuple(names)
    return Kind(", ".join(f"`{name}`" for name in names), {"choices": names})


def whole(low: int, high: int, metavar: str = "N") -> Kind:
    limit = "2^64-1" if high == 2**64 - 1 else high

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {low} to {limit}, got {text!r}"
            )
        return value

    words = f"2^64-{2**64 - high}" if high > 2**63 else high
    return Kind(f"whole number, {low} to {words}", {"metavar": metavar, "type": convert})


def number(low: float, high: float, metavar: str) -> Kind:
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

    return Kind(f"number, {low:g} to {high:g}", {"metavar": metavar, "type": convert})


def repeated(kind: Kind) -> Kind:
    """A list of such values: one for each time that the flag is used."""
    return Kind(f"{kind.words}; repeatable", {**kind.arguments, "action": "append"})


# -- settings --------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A flag of a command, its name with underscores.

    help:      begins with a noun or a verb
    otherwise: what holds without the flag, where `default` does not say it
    """

    name: str
    group: str
    kind: Kind
    help: str
    default: Any = None
    otherwise: str = ""
    required: bool = False

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false, without a value after it."""
        return self.kind in (SWITCH, ON_OFF)

    @property
    def is_repeated(self) -> bool:
        """Whether its value is a list (`repeated`)."""
        return self.kind.arguments.get("action") == "append"

    @property
    def default_words(self) -> str:
        """Its default as --help states it; empty if it has none."""
        if self.otherwise or self.default is None or self.default is False:
            return self.otherwise
        if isinstance(self.default, tuple):
            return ",".join(map(str, self.default))
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def flag(name: str, value: Any = None) -> str:
    """A setting as the command line writes it, with the value if there is one.

    A switch has none: True and False are --name and --no-name.
    """
    words = "--" + (("no_" if value is False else "") + name).replace("_", "-")
    return words if value is None or isinstance(value, bool) else f"{words} {value}"


def grouped(settings: Iterable[Setting]) -> dict[str, list[Setting]]:
    """The settings by group; groups and settings stay in order."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting.group, []).append(setting)
    return groups


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting]) -> None:
    """Adds the flags, but not their defaults."""
    for title, members in grouped(settings).items():
        group = parser.add_argument_group(title)
        for setting in members:
            words = setting.default_words
            help = f"{setting.help} (default: {words})" if words else setting.help
            needed = {"required": True} if setting.required else {}
            group.add_argument(flag(setting.name), help=help, **setting.kind.arguments, **needed)


def markdown(settings: Iterable[Setting]) -> str:
    """One table of flags a group."""
    lines = []
    for title, members in grouped(settings).items():
        lines += [f"### {title.capitalize()}", ""]
        lines += ["| flag | what it is | default | values |", "|---|---|---|---|"]
        for setting in members:
            name = f"`{flag(setting.name)}`"
            if setting.kind is ON_OFF:
                name += f", `{flag(setting.name, False)}`"
            default = setting.default_words or ("off" if setting.is_switch else "none")
            default = "required" if setting.required else default
            lines.append(f"| {name} | {setting.help} | {default} | {setting.kind.words} |")
        lines.append("")
    return "\n".join(lines)
