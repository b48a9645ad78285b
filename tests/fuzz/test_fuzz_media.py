"""A few hundred damaged pictures and videos, and the whole ones that they are made of."""

from collections import Counter

import fuzz_media
from watched import watched


def test_damaged_pictures_and_videos_are_read_or_refused_by_name(tmp_path):
    assert len(fuzz_media.files()) > 50
    (whole,) = watched(fuzz_media.whole_case, 0, [0], tmp_path)
    assert not whole.bad, whole.text
    outcomes = list(watched(fuzz_media.case, 0, range(300), tmp_path))
    bad = [outcome for outcome in outcomes if outcome.bad]
    assert not bad, "\n".join(f"case {one.number}: {one.word}\n{one.text}" for one in bad)
    words = Counter(outcome.word for outcome in outcomes)
    assert min(words["read"], words["refused"]) > 50
