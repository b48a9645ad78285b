"""training/options.py: the learning rate of each step; what is out of range is refused."""

import numpy as np
import pytest

from vfengine.training.options import TrainingOptions


def test_learning_rate_rises_stays_and_falls():
    options = TrainingOptions(steps=100, warmup=10, decay=0.5, learning_rate=1e-3)
    rates = [options.learning_rate_at(step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 1e-4 * np.arange(1, 11))
    np.testing.assert_allclose(rates[9:51], 1e-3)
    np.testing.assert_allclose(rates[50:], 1e-3 * np.arange(50, 0, -1) / 50)
    level = TrainingOptions(steps=3, warmup=0, decay=0.0, learning_rate=1e-3)
    assert [level.learning_rate_at(step) for step in range(3)] == [1e-3] * 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("extra_images", -1),
        ("warmup", -1),
        ("decay", 1.5),
        ("ema", -0.1),
        ("class_dropout", 1.01),
        ("clean_share", float("nan")),
        ("learning_rate", -1e-3),
        ("weight_decay", -0.1),
        ("gradient_clip", 0.0),
        ("base_jitter", -0.1),
        ("precision", "fp16"),
        ("seed", -1),
    ],
)
def test_option_out_of_range_is_refused(option, value):
    with pytest.raises(ValueError, match=option):
        TrainingOptions(**{option: value})
