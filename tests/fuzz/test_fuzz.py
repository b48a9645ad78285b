"""A few random cases of every target; hypothesis names the seed of one that fails."""

import ctypes
import random

import fuzz
import pytest
import torch
import watched
from hypothesis import given, settings
from hypothesis import strategies as st

# Cases of each; more of what costs a millisecond.
EXAMPLES = {"ops": 40, "trajectories": 40, "configs": 25, "plans": 6, "peers": 20}


@pytest.fixture
def threads():
    """Restores torch's number of threads."""
    former = torch.get_num_threads()
    yield
    torch.set_num_threads(former)


@pytest.fixture(scope="module", autouse=True)
def shared():
    """What cases share is made outside of their folders."""
    fuzz.fuzz_files.prepare()


@pytest.mark.parametrize("name", fuzz.CASES)
def test_random_cases(name, tmp_path, isas, threads):
    @settings(max_examples=EXAMPLES.get(name, 15), deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 2**32))
    def run(seed):
        watched.run_case(fuzz.CASES[name], random.Random(seed), tmp_path / "case")

    if name == "peers":
        fuzz.fuzz_peers.peers()
    run()


# -- the tool itself -------------------------------------------------------------------------------


def odd_case(chance, folder):
    """Of five cases one ends well, and each other in a way of its own."""
    way = chance.choice(("done", "wrong", "crash", "hang", "half"))
    if way == "wrong":
        raise KeyError("x")
    if way == "crash":
        ctypes.string_at(0)
    if way == "hang":
        while True:
            pass
    if way == "half":
        (folder / ".a.mp4.0.part").touch()
    return way


def test_crashes_hangs_and_half_files_are_found_and_the_others_go_on(tmp_path):
    found = list(watched.watched(odd_case, 0, range(12), tmp_path, limit=0.3))
    assert [outcome.number for outcome in found] == list(range(12))
    words = {outcome.word for outcome in found}
    assert words == {"done", "wrong", "crash", "hang"}
    for outcome in found:
        assert outcome.bad is (outcome.word != "done")
        assert ("odd_case" in outcome.text) is (outcome.word in ("crash", "hang", "wrong")) or (
            "half-written" in outcome.text
        )
    assert any("half-written" in outcome.text for outcome in found)
    again = list(watched.watched(odd_case, 0, [3, 5], tmp_path, limit=0.3))
    assert [(o.number, o.word) for o in again] == [(n, found[n].word) for n in (3, 5)]
    assert not list(tmp_path.glob("*.trace"))
