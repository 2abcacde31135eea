import math

import pytest

from sigmoe.launch.schedule import ScheduleConfig, rate_ratio


def test_cosine_warms_up_peaks_and_ends_at_min_ratio():
    config = ScheduleConfig(name="cosine", warmup_steps=4, min_ratio=0.1)
    ratios = [rate_ratio(config, step, 14) for step in range(14)]
    assert ratios[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert ratios[-1] == pytest.approx(0.1)
    # Half-way between step 4 (peak) and step 13 (end) lies 8.5: steps 8 and 9 are mirrored around the mean.
    assert ratios[8] + ratios[9] == pytest.approx(1.1)
    assert ratios[7] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 3 / 9)) / 2)


def test_wsd_is_stable_then_decays_linearly():
    config = ScheduleConfig(name="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.0)
    assert [rate_ratio(config, step, 10) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]


def test_constant_stays():
    config = ScheduleConfig(name="constant", warmup_steps=1)
    assert {rate_ratio(config, step, 5) for step in range(5)} == {1.0}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"name": "wsd"}, "decay_steps"),
        ({"name": "cosine", "decay_steps": 3}, "decay_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"min_ratio": 1.5}, "min_ratio"),
    ],
)
def test_bad_schedules_are_named(settings, names):
    with pytest.raises(ValueError, match=names):
        ScheduleConfig(**settings)
