# SPDX-License-Identifier: Apache-2.0
"""What share of the time analyses take."""

import math

import pytest

from dynasty_lightning.trainer import clock
from dynasty_lightning.trainer.clock import StepClock


@pytest.fixture
def tick(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def step(watch, seconds, *, observed):
        watch.start(observed=observed)
        now[0] += seconds
        watch.stop()

    return step


def test_what_observed_steps_take_more_is_the_share(tick):
    watch = StepClock()
    for seconds in (1.0, 1.0, 5.0):  # one that something else held up
        tick(watch, seconds, observed=False)
    assert math.isnan(watch.share())
    tick(watch, 4.0, observed=True)
    assert watch.share() == pytest.approx((4.0 - 1.0) / 11.0)


def test_an_analysis_never_takes_less_than_nothing(tick):
    watch = StepClock()
    tick(watch, 2.0, observed=False)
    tick(watch, 1.0, observed=True)
    assert watch.share() == 0.0
