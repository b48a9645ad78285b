"""Measured choices: what is chosen, when it is measured, and where it cannot be."""

import pytest
import torch

from vfengine.ops import _tuning
from vfengine.ops._tuning import can_measure, choose, measured, mode

CANDIDATES = {"guess": "guess", "slow": "slow", "fast": "fast"}  # a call is told by its name here
TIMES = {"guess": 2.0, "slow": 3.0, "fast": 1.0}


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A machine where calls can be measured and take TIMES; the calls that were measured."""
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("VFENGINE_TUNING", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU (80 GB)")
    monkeypatch.setattr(_tuning, "_versions", lambda: {"torch": "2"})
    new_process(monkeypatch)
    monkeypatch.setattr(_tuning, "can_measure", lambda: True)
    monkeypatch.setattr(_tuning, "_time", lambda call: calls.append(call) or TIMES[call])
    return calls


def new_process(monkeypatch):
    monkeypatch.setattr(_tuning, "_choices", {})
    monkeypatch.setattr(_tuning, "_times", {})
    _tuning._stored.cache_clear()


def test_the_fastest_is_chosen_and_measured_once(timed):
    assert [choose("key", CANDIDATES) for _ in range(3)] == ["fast"] * 3
    assert timed == list(CANDIDATES)
    assert measured() == {"key": TIMES}


def test_each_key_is_measured(timed):
    assert choose("key", CANDIDATES) == "fast"
    assert choose("another", {"slow": "slow", "guess": "guess"}) == "guess"


def test_one_candidate_is_not_measured(timed):
    assert choose("key", {"slow": "slow"}) == "slow"
    assert timed == []


def test_where_nothing_can_be_measured_it_is_the_first_or_what_was_chosen(timed, monkeypatch):
    choose("known", CANDIDATES)
    monkeypatch.setattr(_tuning, "can_measure", lambda: False)
    assert choose("known", CANDIDATES) == "fast"
    assert choose("unknown", CANDIDATES) == "guess"


def test_later_processes_choose_the_same(timed, monkeypatch, tmp_path):
    key = ("op", torch.device("cuda", 0), torch.bfloat16, torch.Size((1, 2)))
    assert choose(key, CANDIDATES) == "fast"
    assert choose("another", CANDIDATES) == "fast"
    assert [file.name for file in (tmp_path / "vfengine").iterdir()] == ["A-GPU-80-GB-.json"]
    new_process(monkeypatch)
    timed.clear()
    assert choose(key, CANDIDATES) == choose("another", CANDIDATES) == "fast"
    assert timed == []
    assert choose("another", {"slow": "slow", "guess": "guess"}) == "fast", "once a process and key"


@pytest.mark.parametrize("stale", ["versions", "candidate", "half a file", "process"])
def test_what_does_not_fit_is_measured_again(stale, timed, monkeypatch, tmp_path):
    choose("key", CANDIDATES)
    (file,) = (tmp_path / "vfengine").iterdir()
    candidates = CANDIDATES
    if stale == "versions":
        monkeypatch.setattr(_tuning, "_versions", lambda: {"torch": "3"})
    elif stale == "candidate":
        candidates = {"slow": "slow", "guess": "guess"}
    elif stale == "process":
        monkeypatch.setenv("VFENGINE_TUNING", "process")
    else:
        file.write_bytes(file.read_bytes()[:20])
    new_process(monkeypatch)
    timed.clear()
    before = file.read_bytes()
    assert choose("key", candidates) == ("guess" if stale == "candidate" else "fast")
    assert timed == list(candidates)
    assert (file.read_bytes() == before) == (stale == "process")


def test_choices_that_cannot_be_kept_are_made_all_the_same(timed, monkeypatch, tmp_path):
    (tmp_path / "vfengine").write_text("in the way")
    with pytest.warns(UserWarning, match="measured choices are not kept"):
        assert choose("key", CANDIDATES) == "fast"


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("VFENGINE_TUNING", "maybe")
    with pytest.raises(ValueError, match="one of on, process, off, got 'maybe'"):
        mode()


@pytest.fixture
def gpu(monkeypatch):
    """Variables and a torch.cuda as of a machine with a GPU; whether its stream is captured."""
    capturing = []
    monkeypatch.delenv("VFENGINE_TUNING", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    return capturing


def test_what_rules_measuring_out(gpu, monkeypatch):
    assert can_measure()
    gpu.append("a capture")
    assert not can_measure()
    gpu.clear()
    for variable, value in (("VFENGINE_TUNING", "off"), ("TRITON_INTERPRET", "1")):
        monkeypatch.setenv(variable, value)
        assert not can_measure()
        monkeypatch.delenv(variable)
    torch.use_deterministic_algorithms(True)
    try:
        assert not can_measure()
    finally:
        torch.use_deterministic_algorithms(False)
    assert can_measure()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not can_measure()


@pytest.mark.parametrize(("milliseconds", "launches"), [(0.01, 8), (0.2, 2), (4.0, 1)])
def test_a_call_is_timed_among_calls_behind_a_busy_gpu(monkeypatch, milliseconds, launches):
    """Each time the GPU is held up, then an event, the calls, an event; slow calls are few."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")
            self.at = happened.count("call") * milliseconds

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: happened.append("hold"), raising=False)
    assert _tuning._time(lambda: happened.append("call")) == pytest.approx(milliseconds)
    first, repeat = (["hold", "event", *["call"] * n, "event", "wait"] for n in (1, launches))
    assert happened == ["call", *first, *repeat * _tuning._REPEATS]
