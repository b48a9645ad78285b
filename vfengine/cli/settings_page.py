"""docs/settings.md: the flags of all commands, from their tables of settings.

python -m vfengine.cli.settings_page > docs/settings.md
"""

from ..pipelines.conflicts import CONFLICTS
from ..pipelines.request import VideoRequest
from .bench import SETTINGS as BENCH_SETTINGS
from .evaluate import DISTANCES
from .evaluate import SETTINGS as EVAL_SETTINGS
from .flags import flag, markdown
from .serve_settings import SETTINGS as SERVE_SETTINGS
from .settings import DEFAULTS, SETTINGS
from .train_settings import SETTINGS as TRAIN_SETTINGS

_PROMPTS = """### Lines of prompts

`--prompts FILE` makes a clip of each line, with one load of the model, and prints one line of JSON
for each: that of `--json`, with `index` (from 0) and `line` (from 1). Blank lines, and those that
begin with `#`, are passed over. In a .txt file a line is a prompt, or a label of a model that knows
labels alone. In a .jsonl file it is an object of settings, checked as entries of `--config` are:
`{"prompt": "a person walking", "num_frames": 32}`. Settings of the command hold for all lines that
have none of their own. Another file, or `-` for stdin, holds objects if its first line begins with
`{`. Lines of a pipe are made as they come.

- Without a seed of its own, line `index` has that of `--seed S+index`: alone, it makes the same
  clip. `--base-seed` and `--residual-seed` of the command hold for all lines.
- In `--output`, `{index}`, `{seed}`, `{base_seed}`, `{residual_seed}`, `{label}` and `{prompt}`
  stand for what the line has. Numbers may have a width, as in `{index:04d}`; `{{` is a brace.
  Labels and prompts come as words joined by hyphens. The default is `{index:04d}-{prompt}.mp4`.
  Missing folders are made.
- `--resume` passes over lines whose files all exist. Files only ever appear whole.
- A line that fails stops no other. Its line of JSON has `error`, and the exit status is 1 in the
  end. A file that cannot be read, or none of whose lines can, is refused before the model is read:
  status 2.
- `--dry-run` tells of each line what would be made.

"""

_HEAD = """# Settings

This page is generated: `make settings` writes it from the tables of settings in `vfengine/cli/`.
`--help` of each command prints the same flags. `python -m vfengine.generate` is `vfengine generate`
where the package is installed, and so are the others.

## python -m vfengine.generate

Flags may be written with hyphens or underscores. `--config FILE` reads any of them but
`--list-labels` from a YAML or JSON file, as names and values: `num_frames: 32`. A flag overrides
the file, and the file overrides the default.

"""


def settings_page() -> str:
    """The page, in Markdown."""
    return (
        f"{_HEAD}{markdown(SETTINGS)}\n{_PROMPTS}"
        f"{_conflicts()}\n"
        f"## python -m vfengine.train\n\n{markdown(TRAIN_SETTINGS)}\n"
        f"## python -m vfengine.serve\n\n{markdown(SERVE_SETTINGS)}\n"
        f"## python -m vfengine.bench\n\n{markdown(BENCH_SETTINGS)}\n"
        f"## python -m vfengine.eval\n\n{_distances()}\n{markdown(EVAL_SETTINGS)}"
    )


def _distances() -> str:
    """One table of the distances that `eval` knows."""
    rows = [f"| `{name}` | {words} |" for name, words in DISTANCES.items()]
    return "\n".join(["| distance | what it is |", "|---|---|", *rows, ""])


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
