# SPDX-License-Identifier: Apache-2.0
"""What is left to save, against runs that are played to their end."""

import math

import pytest

from dynasty_lightning.cost.counts import StepCost
from dynasty_lightning.policy.allocation import Allocation
from dynasty_lightning.policy.cost_target import CostTarget


def step_at(speedup):
    return StepCost(macs=1.0, baseline=64.0, products_charged=64.0 / speedup)


def play(target, *, steps, warmup, interval=50, overhead=0):
    """A run whose steps cost exactly what is asked; its speedup, and what was asked."""
    spent, cost, asked = step_at(1.0).scaled(warmup), step_at(1.0), []
    step = warmup
    while step < steps:
        wanted = target.next(cost, spent, step=step, last_step=steps, interval=interval)
        asked.append(wanted)
        cost = step_at(wanted)
        following = min(step + interval, steps)
        spent = spent + cost.scaled(following - step - overhead) + step_at(1.0).scaled(overhead)
        step = following
    return spent.speedup_charged, asked


@pytest.mark.parametrize("speedup", [1.5, 4.0, 8.0])
@pytest.mark.parametrize("name", ["constant", "progressive", "regressive", "cyclic", "late"])
def test_a_run_that_gets_what_it_asks_for_meets_its_target(speedup, name):
    target = CostTarget(target=speedup, allocation=Allocation.named(name))
    reached, asked = play(target, steps=5000, warmup=10)
    assert speedup <= reached < 1.04 * speedup
    if name == "constant":
        assert max(asked) < 1.1 * speedup


def test_what_analysed_steps_cost_is_made_up_for():
    plain, charged = (CostTarget(target=4.0) for _ in range(2))
    charged.charge(step_at(4.0), step_at(1.0), exact_steps=1, interval=50)
    assert charged.overhead == pytest.approx(3.0 / 50)
    cost, spent = step_at(4.0), step_at(4.0).scaled(100)
    at = {"step": 100, "last_step": 1000, "interval": 50}
    assert charged.next(cost, spent, **at) == pytest.approx(1.06 * plain.next(cost, spent, **at))
    assert play(charged, steps=5000, warmup=10, overhead=1)[0] >= 4.0
    charged.charge(step_at(1.0), step_at(4.0), exact_steps=1, interval=50)
    assert charged.overhead == 0.0  # a cheaper one asks for nothing


def test_slack_bounds_what_a_late_start_asks_of_the_rest():
    target = CostTarget(target=4.0)
    late = target.next(
        step_at(1.0), step_at(1.0).scaled(990), step=990, last_step=1000, interval=50
    )
    assert late == pytest.approx(4.0 * 1.01 * 1.3)
    thrifty = target.next(
        step_at(16.0), step_at(16.0).scaled(900), step=900, last_step=1000, interval=50
    )
    assert thrifty == pytest.approx(4.0 * 1.01 / 1.3)


def test_ends_of_the_range():
    at = {"step": 10, "last_step": 100, "interval": 50}
    cost, spent = step_at(1.0), step_at(1.0).scaled(10)
    assert CostTarget().next(cost, spent, **at) is None
    assert CostTarget(target=1.0).next(cost, spent, **at) == 1.0
    assert CostTarget(target=16.0).next(cost, spent, **at) <= 16.0 * 1.3
    target = CostTarget(target=4.0)
    assert target.next(cost, spent, step=100, last_step=100, interval=50) == 4.0
    # Nobody knows the end: as if it were ten intervals away, and later as far as it has been.
    for step, length in ((10, 510), (5000, 10000)):
        spent = step_at(1.0).scaled(step)
        unknown = target.next(cost, spent, step=step, last_step=math.inf, interval=50)
        known = target.next(cost, spent, step=step, last_step=length, interval=50)
        assert unknown == known
