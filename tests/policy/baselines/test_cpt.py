"""CPT's cycles, worked by hand; the numbers are in the comments."""

import pytest

from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.baselines.cpt import CptPolicy
from dynasty_lightning.policy.baselines.widths import EQUAL_SHARES, width_cost
from tests.policy.baselines.cases import (
    bits,
    measure,
)


@pytest.mark.parametrize(
    ("step", "expected"),
    # 3 + 5 (1 - cos(pi phase)) / 2 in each of 4 cycles of 300 steps: cos is 1, 1/2, 0, -1/2 at 0,
    # 1/3, 1/2, 2/3.
    [(0, 3.0), (100, 4.25), (150, 5.5), (200, 6.75), (300, 3.0), (500, 6.75), (1199, 8.0)],
)
def test_cpt_rises_by_half_a_cosine_and_begins_again(step, expected):
    policy = CptPolicy(target_speedup=4.0, cycles=4)
    assert policy.now(step, 1200) == (pytest.approx(expected, abs=1e-3), 8)


def test_cpt_shifts_e_too():
    # X and W at 4 all the time, E at 8, equal GEMMs: 4/8 cost (16 + 64) / 192 = .417; one less,
    # 3/7: 51 / 192 = .266; two less, 2/6: 28 / 192 = .146. A target of 4 = 1 / .25 leaves the last,
    # up to where 4 - 1.5 would round to 3.
    policy = CptPolicy(target_speedup=4.0, least=4, most=4)
    assert bits(policy.initial({"a": None})) == (2, 2, 6)
    assert policy.offset == pytest.approx(-1.5)


def test_cpt_plans_what_is_left():
    # In the middle of the second of four cycles: two whole ones, and the second half of this one.
    rest = CptPolicy(target_speedup=4.0, cycles=4).rest(450, 1200)
    assert {bits > 5.5: time for (bits, _), time in rest.items()} == {False: 2, True: 3}


def test_cpt_moves_its_offset_at_the_beginning_of_a_cycle_only():
    policy = CptPolicy(target_speedup=4.0, cycles=4)
    policy.initial({"a": None})
    offsets = []
    for step in range(50, 1200, 50):
        policy.update(
            measure(step=step, steps=1200, speedup=5.0, run_speedup=6.0)
        )  # cheaper than planned: there is more to spend
        offsets.append(policy.offset)
    assert len(set(offsets)) == 4
    assert offsets == sorted(offsets)
    assert all(len(set(offsets[max(6 * c - 1, 0) : 6 * c + 5])) == 1 for c in range(4))


def test_cpt_says_when_analyses_are_too_rare():
    policy = CptPolicy(target_speedup=4.0, cycles=4)
    policy.update(measure(step=1, steps=1200))
    policy.update(measure(step=76, steps=1200))  # a quarter of a cycle: warnings are errors here
    policy.raise_precision()  # what the guard takes out is nobody's interval
    policy.update(measure(step=300, steps=1200))
    with pytest.warns(
        UserWarning,
        match=r"cpt: 76 steps between analyses do not follow a cycle of 300: set interval=30",
    ):
        policy.update(measure(step=376, steps=1200))
    policy.update(measure(step=476, steps=1200))  # once is enough


def test_the_last_map_of_a_schedule_stays():
    # Evaluation reads it: a new cycle of narrow widths must not begin at the end.
    policy = CptPolicy(target_speedup=4.0, cycles=1)
    maps = [bits(policy.initial({"a": None}))]
    for step in range(100, 1201, 100):
        cost = width_cost(EQUAL_SHARES, dict(zip(Role, maps[-1], strict=True)))
        maps.append(
            bits(policy.update(measure(step=step, steps=1200, speedup=1 / cost, run_speedup=4.0)))
        )
    assert maps[0][0] == 2
    assert maps[-1] == maps[-2]
    assert maps[-1][0] >= 5
