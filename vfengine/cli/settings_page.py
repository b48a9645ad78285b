"""docs/settings.md: the flags of the commands, from their tables of settings.

python -m vfengine.cli.settings_page > docs/settings.md
"""

from ..pipelines.request import CONFLICTS, VideoRequest
from .flags import flag, markdown
from .serve_settings import SETTINGS as SERVE_SETTINGS
from .settings import DEFAULTS, SETTINGS
from .train_settings import SETTINGS as TRAIN_SETTINGS

_HEAD = """# Settings

This page is generated: `make settings` writes it from `vfengine/cli/settings.py`,
`vfengine/cli/train_settings.py` and `vfengine/cli/serve_settings.py`. `--help` of each command
prints the same flags.

## python -m vfengine.generate

Flags may be written with hyphens or underscores. `--config FILE` reads any of them but
`--list-labels` from a YAML or JSON file, as names and values: `num_frames: 32`. A flag overrides
the file, and the file overrides the default.

"""


def settings_page() -> str:
    """The page, in Markdown."""
    return (
        f"{_HEAD}{markdown(SETTINGS)}\n"
        f"{_conflicts()}\n"
        f"## python -m vfengine.train\n\n{markdown(TRAIN_SETTINGS)}\n"
        f"## python -m vfengine.serve\n\n{markdown(SERVE_SETTINGS)}"
    )


def _conflicts() -> str:
    """One table of the flags that cannot go together."""
    flags = {setting.name for setting in SETTINGS}
    lines = ["### Flags that cannot go together", "", "| flag | others | why |", "|---|---|---|"]
    groups: dict[tuple[str, str], list[str]] = {}
    for conflict in CONFLICTS:
        if conflict.other in flags:
            value = conflict.value if isinstance(conflict.value, str) else None
            others = groups.setdefault((conflict.setting, conflict.reason), [])
            others.append(f"`{flag(conflict.other, value)}`")
    for (name, reason), others in groups.items():
        lines.append(f"| `{flag(name)}` | {', '.join(others)} | {reason} |")
    plain = ", ".join(f"`{flag(name)}`" for name in VideoRequest.foreign(DEFAULTS))
    return "\n".join(
        [*lines, "", f"A plain video model has no base path. It takes no {plain}.", ""]
    )


if __name__ == "__main__":
    print(settings_page(), end="")
