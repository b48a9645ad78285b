"""A real server that is killed, and one that gets requests of strangers; longer as scripts."""

import pytest
from fuzz_requests import fuzz
from kill_server import kill_often


@pytest.mark.slow
def test_a_server_that_is_killed_loses_nothing(clean_checkpoint, tmp_path):
    outcome = kill_often(tmp_path, clean_checkpoint, kills=3, clients=2, steps=40)
    assert outcome.kills.total() == 3 and outcome.accepted >= 3
    assert not outcome.wrong, outcome


@pytest.mark.slow
def test_random_requests_to_a_process(clean_checkpoint, tmp_path):
    outcome = fuzz(tmp_path, clean_checkpoint, 500)
    assert outcome.statuses.total() == 500 and outcome.statuses[200] > 20
    assert not outcome.wrong, outcome
