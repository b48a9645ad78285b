"""A clock on the wall that is set, while clips are made: they are the same, and all are made."""

import itertools
import time
from pathlib import Path

import tqdm.std

from vfengine.cli.train_loop import Limit
from vfengine.cli.train_settings import read_settings


def test_a_clock_that_jumps_changes_no_clip(cli, monkeypatch):
    Path("lines").write_text("walk\njump\nwalk")
    flags = ["--prompts", "lines", "--base-cache", "cache", "--resume", "--output"]
    assert cli(*flags, "calm/{index}.webp")[0] == 0
    moments = itertools.cycle((2e9, 1.0, 4e9, 1e9))  # years ahead, and long ago
    for module, name in ((time, "time"), (tqdm.std, "time")):
        monkeypatch.setattr(module, name, lambda: next(moments))
    for cache in ("cache", "other"):
        flags[3] = cache
        status, _, err = cli(*flags, f"{cache}-clips/{{index}}.webp")
        assert (status, err) == (0, "")
        for k in range(3):
            made = Path(f"{cache}-clips/{k}.webp").read_bytes()
            assert made == Path(f"calm/{k}.webp").read_bytes()


def test_a_trainings_time_is_not_the_clocks(monkeypatch):
    settings = read_settings(["--data", "mocap", "--output", "x", "--max-minutes", "1"])
    began = time.perf_counter()
    limit = Limit(settings, began)
    monkeypatch.setattr(time, "time", lambda: began + 1e9)
    assert not limit.reached
    monkeypatch.setattr(time, "perf_counter", lambda: began + 61)
    assert limit.reached
