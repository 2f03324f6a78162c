"""The cost of a run from that of some of its steps."""

import pytest

from dynasty_lightning.cost.counts import GemmCost
from dynasty_lightning.cost.run_cost import RunCost


def test_run_cost_weighs_by_steps_and_resumes():
    slow, fast = (
        GemmCost(products=64, products_charged=64, baseline=64),
        GemmCost(products=8, products_charged=16, baseline=64),
    )
    run = RunCost()
    run.add(slow, 10)  # warm-up
    run.add(fast, 20)
    other = RunCost()
    other.load_state_dict(run.state_dict())
    for r in (run, other):
        r.add(fast, 10)
        assert r.steps == 40
        assert r.sum.speedup_ideal == 40 * 64 / (10 * 64 + 30 * 8)
        assert r.sum.speedup_charged == 40 * 64 / (10 * 64 + 30 * 16)
    assert run.sum == other.sum
    with pytest.raises(ValueError, match="take back"):
        run.add(fast, -1)
