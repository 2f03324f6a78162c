"""When an analysis is due, and when the loss guard speaks."""

import math

import pytest

from dynasty_lightning.policy.schedule import AnalysisSchedule, LossGuard


def test_warmup_then_settling_then_interval():
    schedule = AnalysisSchedule(interval=50, warmup_steps=10)
    due = []
    for step in range(1, 400):
        if step >= schedule.next_step:
            due.append(step)
            # Far from the target until step 25.
            schedule.advance(step, log_error=0.5 if step < 25 else 0.01, last_step=math.inf)
    assert due == [5, 10, 15, 20, 25, 75, 125, 175, 225, 275, 325, 375]
    assert not schedule.is_warm(9)
    assert schedule.is_warm(10)


def test_the_last_step_is_analysed_and_settling_ends():
    schedule = AnalysisSchedule(interval=50, warmup_steps=0)
    due = []
    for step in range(1, 131):
        if step >= schedule.next_step:
            due.append(step)
            schedule.advance(step, log_error=1.0, last_step=130)
    assert due[-1] == 130
    assert len(due) < 20  # a target that is never met does not keep the interval short for ever


def test_state_continues():
    one, other = (
        AnalysisSchedule(interval=20, warmup_steps=4),
        AnalysisSchedule(interval=20, warmup_steps=4),
    )
    for step in (2, 4, 6):
        one.advance(step, log_error=0.01, last_step=math.inf)
    other.load_state_dict(one.state_dict())
    one.advance(8, log_error=0.01, last_step=math.inf)
    other.advance(8, log_error=0.01, last_step=math.inf)
    assert one.state_dict() == other.state_dict()


def test_loss_guard():
    guard = LossGuard(ratio=2.0)
    assert guard.check(2.0) is None
    assert guard.check(1.0) is None
    assert guard.check(1.9) is None
    assert "2 times its best mean 1" in guard.check(2.1)
    assert "nan" in guard.check(math.nan)
    assert LossGuard(ratio=None).check(math.inf) is None


def test_loss_guard_judges_no_single_batch():
    """A detector: every fourth batch has no boxes, and a tenth of the loss. What rises for good is
    noticed all the same.
    """
    guard = LossGuard(ratio=2.0)
    assert not [
        said for i in range(40) if (said := guard.check(0.2 if i % 4 == 1 else 2.0, steps=1))
    ]
    assert [bool(guard.check(10.0, steps=1)) for _ in range(3)] == [False, False, True]
    assert not [said for _ in range(40) if (said := guard.check(10.0, steps=1))]


def test_loss_guard_lets_a_task_pass_that_comes_once_in_a_while():
    """One loss of 2.3 among ten of 0.1: the mean trebles, and most losses are where they were."""
    guard = LossGuard(ratio=2.0)
    assert guard.check(0.1) is None
    assert guard.limit == pytest.approx(0.2)
    assert guard.check(0.32, above=0.1) is None
    assert guard.check(0.32, above=0.4) is None
    assert guard.check(0.32, above=0.6) is not None


def test_loss_guard_is_quiet_near_zero():
    guard = LossGuard(ratio=2.0)
    for loss in (2.3, 0.5, 0.0014, 0.0030, 0.01):
        assert guard.check(loss) is None
    assert guard.check(0.3) is not None


@pytest.mark.parametrize("options", [{"interval": 0}, {"warmup_steps": -1}])
def test_bad_schedules(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AnalysisSchedule(**options)
