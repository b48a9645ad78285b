"""Helpers for tests of `python -m vfengine.generate`; fixtures are in tests/conftest.py."""

import json

import numpy as np

from vfengine.media.video import read_video

STEPS = "4"
WALK = ["--label", "walk"]


def refused(result, *words):
    """Asserts that a run ended in one line on stderr that holds all the words, and status 2."""
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("vfengine.generate: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return True


def done(result):
    """The --json line of a run that went well."""
    status, out, err = result
    assert (status, err) == (0, "")
    return json.loads(out)


def frames_of(name):
    return read_video(name).frames


def clips(name, count):
    return [frames_of(f"{name}-{k:03d}.webp") for k in range(count)]


def close(a, b):
    """Equal but for the rounding of a sum in another order."""
    return bool(np.abs(a.astype(int) - b).max() <= 1)
