"""PFQ's stages, worked by hand; the numbers are in the comments."""

from dynasty_lightning.policy.baselines.pfq import PfqPolicy
from tests.policy.baselines.cases import bits, measure


def test_pfq_enters_a_stage_when_the_loss_stands_still():
    policy = PfqPolicy(
        target_speedup=4.0, window=3, threshold=0.1, decay=0.5, scale_periods=2, periods=10
    )
    policy.initial({"a": None})
    stages = []
    # The unit is (2.0 + 1.0) / 2 = 1.5, the limit 0.15: 2.0, 1.0, 0.9 differ by 1.1; 1.0, 0.9, 0.95
    # by .05 at most: stage 1, anew. Limit 0.075: 0.80, 0.79, 0.70 differ by 0.10; 0.79, 0.70, 0.72
    # by 0.07: stage 2. Limit 0.0375, too few periods left.
    for step, loss in enumerate((2.0, 1.0, 0.9, 0.95, 0.80, 0.79, 0.70, 0.72, 0.72, 0.72), start=1):
        policy.update(measure(step=step, steps=10, loss=loss, run_speedup=4.0))
        stages.append(policy.stage)
    assert stages == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_pfq_takes_the_mean_loss_of_a_period():
    # Periods of 4 steps, analyses after 1, 2, 4 steps: mean (1 * 5 + 1 * 3 + 2 * 1) / 4 = 2.5.
    policy = PfqPolicy(target_speedup=4.0, periods=5)
    for step, loss in ((1, 5.0), (2, 3.0), (4, 1.0)):
        policy.update(measure(step=step, steps=20, loss=loss))
    assert policy.state_dict()["losses"] == [2.5]


def test_pfq_shifts_the_published_stages_to_the_cost():
    # Equal GEMMs; (b_X^2 + 2 b_X b_E) / 192 on average over the stages must not exceed 1 / 5.1 =
    # .196.
    # Three less, no less than 2: 2/3, 2/3, 3/5, 5/5 cost (16 + 16 + 39 + 75) / (4 * 192) = .190.
    # E one more: 2/4, 2/4, 3/6, 5/6 cost (20 + 20 + 45 + 85) / (4 * 192) = .221.
    policy = PfqPolicy(target_speedup=5.1)
    assert bits(policy.initial({"a": None})) == (2, 2, 3)
    assert [stage_widths(policy, stage) for stage in range(4)] == [(2, 3), (2, 3), (3, 5), (5, 5)]
    # X and W turn half a bit later than E, so that the case between is there for 1 / 4.4 = .227;
    # with all turning at once the next is 2/4, 2/4, 4/6, 6/6 at .276.
    assert [stage_widths(PfqPolicy(target_speedup=4.4), stage) for stage in range(4)] == [
        (2, 4),
        (2, 4),
        (3, 6),
        (5, 6),
    ]
    # A target of 1 asks for nothing: 8 bits everywhere.
    assert bits(PfqPolicy(target_speedup=1.0).initial({"a": None})) == (8, 8, 8)


def stage_widths(policy, stage):
    """Of X and of E, at the offset of the beginning."""
    policy.stage = 0
    policy.initial({"a": None})
    policy.stage = stage
    return bits(policy._choose(0, 1.0))[::2]


def test_stages_from_a_command_line():
    given = PfqPolicy(target_speedup=3.0, forward="4+8", backward="8+8").initial({"a": None})
    assert bits(given) == bits(
        PfqPolicy(target_speedup=3.0, forward=(4, 8), backward=(8, 8)).initial({"a": None})
    )
