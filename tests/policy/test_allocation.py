"""How cost is spread over a run."""

import math

import pytest

from dynasty_lightning.policy.allocation import ALLOCATIONS, Allocation


@pytest.mark.parametrize("name", [*ALLOCATIONS, "late-10", "ramp-4"])
def test_allocation_spends_what_it_was_given(name):
    allocation, mean, steps = Allocation.named(name), 1 / 5.1, 8000
    plan = [allocation.shares((i + 0.5) / steps, mean) for i in range(steps)]
    costs = [now for now, _ in plan]
    assert sum(costs) / steps == pytest.approx(mean, rel=1e-3)
    # What is left, summed from behind.
    left = 0.0
    for i in range(steps - 1, 0, -1):
        left += costs[i]
        if i % 777 == 0:
            assert plan[i][1] == pytest.approx(left / (steps - i), rel=2e-3)


def test_shapes_of_allocations():
    def costs(name):
        return [Allocation.named(name).shares(p, 0.2)[0] for p in (0.0, 0.5, 0.99)]

    assert costs("constant") == [0.2] * 3
    assert costs("progressive") == pytest.approx([0.1, 0.2, 0.298])
    assert costs("late") == pytest.approx([(0.2 - 0.03) / 0.97] * 2 + [1.0])
    assert Allocation.named("cyclic").shares(0.0, 0.2)[0] == pytest.approx(0.1)
    assert Allocation.named("cyclic").shares(1 / 16, 0.2)[0] == pytest.approx(0.3)


def test_an_analysis_falls_on_the_beginning_of_the_late_steps():
    late = Allocation.named("late")
    assert late.next_mark(500, 1000) == 970
    assert late.next_mark(970, 1000) == 1000
    assert late.next_mark(500, math.inf) == math.inf
    assert Allocation().next_mark(500, 1000) == 1000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Allocation.named("later"), "one of constant"),
        (lambda: Allocation.named("late-many"), "late-many"),
        (lambda: Allocation.named("late-100"), "final"),
        (lambda: Allocation(start=0.0), "positive"),
        (lambda: Allocation(swing=1.0), "swing"),
        (lambda: Allocation(cycles=0), "cycles"),
        (lambda: Allocation.named("late-20").shares(0.1, 1 / 5.1), "cost more than all"),
    ],
)
def test_bad_allocations(make, message):
    with pytest.raises(ValueError, match=message):
        make()
