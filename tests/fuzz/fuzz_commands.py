"""Command lines, files of prompts and files of settings: status 0, or one line and status 2."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from damage import damaged_bytes, damaged_json, damaged_safetensors, odd_value
from fuzz_files import latents, models, trajectories, written

from vfengine.cli import bench, evaluate, generate, main
from vfengine.cli.flags import Setting, flag
from vfengine.cli.settings import SETTINGS as GENERATE_SETTINGS
from vfengine.cli.train_settings import SETTINGS as TRAIN_SETTINGS

ODD_TEXTS = (
    *("", " ", "-", "--", "---", "-1", "0", "1", "2", "4", "nan", "inf", "1e9", "1e400", "0x10"),
    *(
        "1_0",
        "\u0664",
        "9" * 30,
        "9" * 5000,
        "1" * 4999,
        "walk",
        "jump",
        "a fox",
        "\u00e9\U0001f600",
    ),
    *("a\nb", "\x1b[31m", "a" * 300, "/", ".", "..", "a/b.mp4", "/nowhere/a.mp4", "~", "a.mp4"),
    *("a.txt", "a.safetensors", "a.png", "{index}.webp", "{label}.webp", "{", "{x}.webp", "\udc80"),
    *("%s", "%(default)s", "$HOME", "*", "=", "a=b", "null", "true", "[]", "{}", "1,2", "1,", ","),
    *("cpu", "cuda", "meta", "cuda:99", "auto", "float64", "ddim", "unipc", "--json", "0.5", "3"),
)
FILES = (
    *("a.webp", "b.png", "clip.webp", "lines.txt", "lines.jsonl", "settings.yaml", "settings.json"),
    *("path.safetensors", "latents.safetensors", "features.npy", "features.safetensors", "cache"),
    *("decomposed", "plain", "latent", "missing", "data", "run", "a.gif", "a.mp4", "{index}.webp"),
)
# What keeps a case short, said last unless chance leaves it out.
SHORT = {
    "generate": ("--num-inference-steps", "1", "--num-frames", "2", "--device", "cpu"),
    "bench": ("--num-inference-steps", "1", "--num-frames", "2", "--repeats", "1"),
    "train": ("--steps", "1", "--batch-size", "1", "--num-clips", "1"),
    "eval": (),
}
SLOW = {  # right values of these would take long, and prove nothing
    *("num_frames", "num_inference_steps", "num_videos", "num_residuals", "repeats", "scale"),
    *("batch_size", "batch_sizes", "steps", "num_clips", "height", "width", "size", "splits"),
}
TABLES: dict[str, Iterable[Setting]] = {
    "generate": GENERATE_SETTINGS,
    "bench": bench.SETTINGS,
    "train": TRAIN_SETTINGS,
    "eval": evaluate.SETTINGS,
}


# -- argv ------------------------------------------------------------------------------------------


def _value(chance: random.Random, setting: Setting) -> str:
    way, choices = chance.random(), setting.kind.arguments.get("choices")
    if way < 0.15:
        return chance.choice(ODD_TEXTS)
    if choices:
        return str(chance.choice(list(choices)))
    if setting.name in SLOW:
        return chance.choice(("1", "2", "3", "-1", "0", "2.5", "x"))
    if setting.kind.words in ("file", "folder", "name", "text") or way < 0.3:
        return chance.choice((*FILES, *FILES, "walk", "jump", "cpu", "a person walking"))
    return chance.choice(("0", "1", "2", "3", "4", "7", "0.5", "0.1", "1e-3", "-1", "100000", "16"))


def _flags(chance: random.Random, verb: str) -> list[str]:
    tokens: list[str] = []
    table = list(TABLES[verb])
    for setting in chance.choices(table, k=chance.choice((0, 1, 1, 2, 3, 5))):
        name = flag(setting.name)
        name = name.replace("-", "_") if chance.random() < 0.03 else name
        if chance.random() < 0.04:
            name = chance.choice((name[:-1], name + "x", name.upper(), name[1:], "--no" + name[1:]))
        if setting.is_switch:
            tokens.append(name if chance.random() < 0.95 else f"{name}=true")
        elif chance.random() < 0.95:
            value = _value(chance, setting)
            tokens += [f"{name}={value}"] if chance.random() < 0.4 else [name, value]
        else:
            tokens.append(name)
    if chance.random() < 0.08:
        tokens.insert(chance.randrange(len(tokens) + 1), chance.choice(ODD_TEXTS))
    return tokens


def _model(chance: random.Random) -> list[str]:
    return ["--model", chance.choice(("decomposed", "decomposed", "plain", "latent"))]


def _argv(chance: random.Random) -> list[str]:
    verb = chance.choice(("generate",) * 6 + ("train", "train", "eval", "eval", "bench"))
    tokens = _flags(chance, verb)
    if verb in ("generate", "bench"):
        tokens = _model(chance) + tokens
    if verb == "generate" and chance.random() < 0.7:
        tokens += ["--output", chance.choice(("a.webp", "a.png", "a.gif", "{index}.webp"))]
        tokens += chance.choice(([], ["--label", "walk"], ["--prompts", "lines.jsonl"]))
    if verb == "train":
        tokens += ["--data", chance.choice(("data", "missing", "a.webp")), "--output", "run"]
    if verb == "eval":
        distance = chance.choice((*evaluate.DISTANCES, "x", ""))
        tokens = [distance, *tokens]
        for name in ("--generated", "--real"):
            if chance.random() < 0.7:
                tokens += [name, chance.choice(("features.npy", "features.safetensors"))]
    tokens += SHORT[verb]
    if chance.random() < 0.03:
        chance.shuffle(tokens)
    if chance.random() < 0.03:
        verb = chance.choice(ODD_TEXTS)
    return [verb, *tokens]


# -- files of a case -------------------------------------------------------------------------------

LINE = {"label": "walk", "seed": 3, "num_frames": 2, "output": "c.webp"}
ENTRIES: dict[str, Any] = {
    **{"label": "walk", "seed": 3, "num_frames": 2, "num_inference_steps": 1, "solver": "ddim"},
    **{"eta": 0.0, "guidance_scale": 1.5, "output": "c.webp", "quiet": True, "dtype": "float32"},
    **{"model": "decomposed", "device": "cpu", "scale": 1, "base_path": "stepwise"},
}


def _lines(chance: random.Random) -> bytes:
    lines = []
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        kind = chance.random()
        if kind < 0.3:
            lines.append(chance.choice(ODD_TEXTS))
        else:
            entry = LINE if kind < 0.5 else damaged_json(chance, LINE)
            lines.append(json.dumps(entry))
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return damaged_bytes(chance, text) if chance.random() < 0.2 else text


def settings_file(chance: random.Random) -> tuple[str, bytes]:
    """A name, and YAML or JSON that is mostly readable."""
    entries = {
        k: ENTRIES[k] for k in chance.sample(sorted(ENTRIES), chance.randrange(len(ENTRIES)))
    }
    if chance.random() < 0.8:
        entries = damaged_json(chance, entries)
    if isinstance(entries, dict) and chance.random() < 0.4:
        name = chance.choice([setting.name for setting in GENERATE_SETTINGS])
        if name not in SLOW:
            entries[name] = odd_value(chance, chance.choice(("walk", 3, 0.5, True)))
    if chance.random() < 0.5:
        name, text = "settings.json", json.dumps(entries)
    else:
        name = chance.choice(("settings.yaml", "settings.yml", "settings"))
        text = yaml.safe_dump(entries, allow_unicode=chance.random() < 0.5)
        if chance.random() < 0.1:
            text += chance.choice(
                ("&a [*a]\n", "? [1]\n: 2\n", "!!python/object:os.system x\n", "- 1\n", "<<: 3\n")
            )
    content = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.2:
        content = damaged_bytes(chance, content)
    if chance.random() < 0.01:
        content = b"[" * 100_000
    return name, content


@functools.cache
def _features() -> dict[str, bytes]:
    import numpy as np
    from safetensors.torch import save

    rows = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    rows = rows / rows.sum(1, keepdim=True)
    file = io.BytesIO()
    np.save(file, rows.numpy())
    return {"features.npy": file.getvalue(), "features.safetensors": save({"a": rows})}


def _damaged_npy(chance: random.Random, content: bytes) -> bytes:
    import numpy as np

    if chance.random() < 0.5:
        return damaged_bytes(chance, content)
    rows = np.load(io.BytesIO(content))
    other = chance.choice(
        (
            *(rows.astype(np.float16), rows.astype(">f8"), rows.astype(np.int32), rows[0]),
            *(
                rows[:0],
                rows[:1],
                rows[:, :1],
                rows * np.inf,
                rows.astype(float) * 1e300,
                rows * 0,
                rows[None],
            ),
            *(rows.astype(np.longdouble), rows.astype(complex), rows.astype(str), rows.T),
            np.zeros(3, [("a", "f4")]),
        )
    )
    file = io.BytesIO()
    np.save(file, other)
    return file.getvalue()


def _prepared(chance: random.Random, folder: Path) -> None:
    """The files that command lines name, some damaged."""
    for name, files in models().items():
        written(folder / name, files)
    path = trajectories()[chance.choice([*trajectories()])]
    files = {"path.safetensors": path, "latents.safetensors": latents(), **_features()}
    for name, content in files.items():
        if chance.random() < 0.2:
            damage = _damaged_npy if name.endswith(".npy") else damaged_safetensors
            files[name] = damage(chance, content)
    files["lines.jsonl"] = _lines(chance)
    files["lines.txt"] = _lines(chance)
    name, content = settings_file(chance)
    written(folder, {**files, name: content, "data/walk/x.txt": b"no video"})


# -- one case --------------------------------------------------------------------------------------


def _outcome(call: Callable[[], int]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = call()
    except SystemExit as end:  # of --help
        assert end.code in (0, None), f"exit status {end.code!r}"
        status = 0
    finally:
        torch.set_num_threads(threads)
    return status, out.getvalue(), err.getvalue()


def _checked(argv: list[str], folder: Path, call: Callable[[], int]) -> str:
    before = _listing(folder)
    try:
        with warnings.catch_warnings():
            status, out, err = _outcome(call)
    except BaseException as error:
        raise AssertionError(f"{argv}: {type(error).__name__}: {error}") from error
    told = f"{argv}: status {status}, {out[-300:]!r}, {err[-600:]!r}"
    assert "Traceback" not in err, told
    many = "--prompts" in " ".join(argv)  # of which some lines may fail
    assert status in (0, 2) or (status == 1 and (many or "not finite" in err)), told
    if status == 2:
        errors = [line for line in err.splitlines() if ": error: " in line]
        assert err.endswith("\n") and errors, told
        if not many:
            lines = [line for line in err.splitlines() if ": warning: " not in line]
            assert len(lines) == 1, told
            new = _listing(folder) - before
            assert not new, f"{told}; {new} were written"
    return "done" if status == 0 else "refused"


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def command_case(chance: random.Random, folder: Path) -> str:
    _prepared(chance, folder)
    argv = _argv(chance)
    return _checked(argv, folder, lambda: main.main(argv))


def config_case(chance: random.Random, folder: Path) -> str:
    """generate --config FILE, mostly with --dry-run."""
    written(folder / "decomposed", models()["decomposed"])
    name, content = settings_file(chance)
    written(folder, {name: content})
    argv = ["--config", name, "--model", "decomposed", "--device", "cpu"]
    argv += ["--dry-run"] if chance.random() < 0.8 else [*SHORT["generate"]]
    return _checked(argv, folder, lambda: generate.main(argv))
