"""Rival policies: each rule on a case worked by hand (the numbers are in the comments), steering to
a cost, resuming, refusals.
"""

import math
from dataclasses import replace

import pytest
import torch

from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Gemm, Role
from dynasty_lightning.policy.baselines.rivals import AmpaPolicy, PerLayerPolicy, _combination_costs
from dynasty_lightning.policy.baselines.scheduled import CptPolicy, PfqPolicy
from dynasty_lightning.policy.baselines.widths import EQUAL_SHARES, noise_levels, width_cost
from dynasty_lightning.policy.registry import POLICIES, make_policy
from dynasty_lightning.policy.sensitivity import LayerStatistics, Sensitivity
from dynasty_lightning.policy.threshold import Measurement

X, W, E = Role
RIVALS = ("per_layer", "magnitude", "random", "pfq", "cpt", "ampa")
STATISTICAL = ("per_layer", "magnitude", "random", "ampa")


def layer(*, x=((1.0, 4.0),), e=((1.0, 1.0),), dx=((1e-6, 1e-6),), dw=1e-6, **changes):
    """8 samples through an 8 x 8 Linear in 4 x 4 blocks: 512 MACs a GEMM, 64 elements an
    operand.
    """
    tensors = {
        name: torch.tensor(v) for name, v in (("x_square", x), ("e_square", e), ("dx_square", dx))
    }
    fields = {
        "geometry": LayerGeometry(kind="linear", weight_shape=(8, 8)),
        "samples": 8,
        "step_size": 0.1,
        "macs": dict.fromkeys(Gemm, 512),
        "mean_bits": dict.fromkeys(Role, 8.0),
        "w_square": torch.ones(2, 2),
        "dw_square": torch.full((2, 2), dw),
        "channels_per_block": 4,
        **tensors,
    }
    return LayerStatistics(**{**fields, **changes})


def measure(
    layers=None, *, speedup=4.0, target=None, step=100, steps=1000, loss=1.0, run_speedup=math.nan
):
    """One where the target is met, unless it says otherwise: lambda stays as it is."""
    target = speedup if target is None else target
    return Measurement(
        layers=layers or {"a": layer()},
        loss=loss,
        speedup=speedup,
        target_speedup=target,
        step=step,
        steps=steps,
        run_speedup=run_speedup,
    )


def bits(entries, name="a"):
    return tuple(int(entries[name][role].bits) for role in Role)


# -- Cost and noise of widths


def test_cost_of_widths():
    # X W = 12, E W = 20, E X = 15 bit products of 3 * 64.
    assert width_cost(EQUAL_SHARES, {X: 3, W: 4, E: 5}) == pytest.approx(47 / 192)
    # A first layer has no DGRAD: 12 and 15 of 2 * 64.
    assert width_cost({Gemm.FORWARD: 0.5, Gemm.WGRAD: 0.5}, {X: 3, W: 4, E: 5}) == pytest.approx(
        27 / 128
    )


def test_noise_levels_are_those_measured():
    assert noise_levels(layer(), W).tolist() == [
        0.2207,
        0.05309,
        0.01306,
        0.003236,
        0.0008052,
        0.0002011,
        5.026e-05,
    ]
    # A quarter of X's blocks unsigned: 0.25 * 0.04231 + 0.75 * 0.2207.
    assert float(noise_levels(layer(x_unsigned=0.25), X)[0]) == pytest.approx(0.1761025)
    assert (
        float(noise_levels(layer(channels_per_block=32), E)[0]) == 2.473
    )  # 1 x 32 was not measured: as 16 x 16


# -- Per-layer bits


def per_layer_of_unit_harm(**options):
    """X and W of the only layer have harm 1 in all, E none; only FORWARD runs, so the cost is b_X
    b_W / 64.
    """
    policy = PerLayerPolicy(**options)
    unit = Sensitivity(
        harm=torch.full((1, 1), 1 / 64, dtype=torch.float64),
        price=1.0,
        mean_square=torch.ones(1, 1),
        elements=64.0,
    )
    none = replace(unit, harm=torch.zeros(1, 1, dtype=torch.float64))
    policy.predict = lambda layers, loss: {"a": {X: unit, W: unit, E: none}}
    return policy, {"a": layer(macs={Gemm.FORWARD: 512})}


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        # noise(b_X) + noise(b_W) + lambda b_X b_W / 64 at lambda 0.1:
        # 4 x 4: .01306 + .01306 + .02500 = .0511    4 x 5: .01306 + .00324 + .03125 = .0475
        # 5 x 5: .00324 + .00324 + .03906 = .0455    5 x 6: .00324 + .00081 + .04688 = .0509
        (0.1, (5, 5, 2)),
        # lambda 0.13: 5 x 5 = .00647 + .05078 = .05725, 4 x 5 = .01630 + .04063 = .05692, 4 x 4 =
        # .02612 + .0325 = .05862.
        (0.13, (4, 5, 2)),
    ],
)
def test_per_layer_takes_the_cheapest_combination(multiplier, expected):
    policy, layers = per_layer_of_unit_harm(hysteresis=0.0)
    policy.multiplier = multiplier
    entries = policy.update(measure(layers))
    assert (
        bits(entries) == expected
    )  # E costs nothing and is worth nothing: of equals the narrowest
    b_x, b_w, _ = expected
    noise = {4: 0.01306, 5: 0.003236}
    assert policy.predicted_harm == pytest.approx(noise[b_x] + noise[b_w], rel=1e-3)


def test_per_layer_keeps_a_width_until_it_must_move():
    policy, layers = per_layer_of_unit_harm(hysteresis=0.25)
    policy.multiplier = 0.1
    assert bits(policy.update(measure(layers))) == (5, 5, 2)
    # 4 x 5 is a little better now, but 5 x 5 still is best at 0.13 / sqrt 2 = 0.092.
    policy.multiplier = 0.13
    assert bits(policy.update(measure(layers))) == (5, 5, 2)
    # At 0.19 / sqrt 2 = 0.134, 4 x 5 = .01630 + .04199 = .0583 beats 5 x 5 = .00647 + .05248 =
    # .0589 and 4 x 4 = .02612 + .03359 = .0597: X moves, W need not.
    policy.multiplier = 0.19
    assert bits(policy.update(measure(layers))) == (4, 5, 2)


def test_per_layer_counts_what_backward_reads():
    costs = _combination_costs(
        {Gemm.FORWARD: 0.5, Gemm.WGRAD: 0.25, Gemm.DGRAD: 0.25}, {X: 2, W: 4}
    )
    # X 5, W 6, E 3: FORWARD 5 * 6, WGRAD 3 * 2, DGRAD 3 * 4.
    assert float(costs[5 - 2, 6 - 2, 3 - 2]) == pytest.approx(
        (0.5 * 30 + 0.25 * 6 + 0.25 * 12) / 64
    )
    policy, layers = per_layer_of_unit_harm(backward_bits={"W": 3})
    entries = policy.update(measure(layers))["a"]
    assert [entries[role].backward_bits for role in Role] == [8, 3, 8]


def test_per_layer_begins_at_the_cost_that_was_asked_for():
    # 5 x 5 / 64 = .391 is the dearest combination on the way down that a target of 2.5 = 1 / .4
    # allows; 5 x 6 / 64 = .469.
    policy, layers = per_layer_of_unit_harm()
    assert bits(policy.update(measure(layers, speedup=1.0, target=2.5))) == (5, 5, 2)


def test_per_layer_role_weights():
    # 16 times the harm of X is two bits of X, in part paid for by W: at lambda 0.1,
    # 6 x 4: 16 * .0008051 + .01306 + .0375 = .0634    6 x 5: .01288 + .00324 + .04688 = .0630    7 x 5: .00322 + .00324 + .05469 = .0611
    # 7 x 4: .00322 + .01306 + .04375 = .0600          8 x 4: .00080 + .01306 + .05 = .0639
    policy, layers = per_layer_of_unit_harm(hysteresis=0.0, role_weights={"X": 16.0})
    policy.multiplier = 0.1
    assert bits(policy.update(measure(layers))) == (7, 4, 2)


def test_per_layer_least_bits():
    policy, layers = per_layer_of_unit_harm(least_bits={"E": 3, "X": 6})
    policy.multiplier = 0.1
    assert bits(policy.update(measure(layers)))[::2] == (6, 3)


# -- Magnitude


@pytest.mark.parametrize(
    ("options", "x_threshold"),
    # X: mean square 2.5, 64 elements, price (512 * 8 + 512 * 8) / (64 elements * 64 * 1536 MACs) =
    # 1 / 768. T = ceil(1/2 log2(lambda / 768 * 2.5 / (3 / 12))) = ceil(1/2 log2(lambda / 76.8));
    # lambda = 76.8 * 1.5 / 64: ceil(-2.71) = -2. Four times the harm is one binade.
    [({}, -2), ({"role_weights": {"X": 4.0}}, -3), ({"role_weights": {"X": 1.0, "W": 4.0}}, -2)],
)
def test_magnitude_has_one_threshold_for_a_tensor(options, x_threshold):
    policy = make_policy("magnitude", target_speedup=4.0, **options)
    policy.multiplier = 76.8 * 1.5 / 64
    entries = policy.update(measure())["a"]
    assert entries[X].lsb_exponent.tolist() == [[x_threshold, x_threshold]]
    # W: mean square 1: half the ratio's 2.5, ceil(1/2 log2(1.5 / 64 / 2.5)) = ceil(-3.37), and one
    # binade less at 4 times the harm.
    assert set(entries[W].lsb_exponent.flatten().tolist()) == {
        -4 if options.get("role_weights", {}).get("W") else -3
    }
    # E: kappa 1/6 instead of 1/12: ceil(1/2 log2(1.5 / 64 / 2.5 / 2)) = ceil(-3.87).
    assert set(entries[E].lsb_exponent.flatten().tolist()) == {-3}


def test_magnitude_does_not_see_gradients():
    thresholds = []
    for gradients in ({}, {"dx": ((1.0, 100.0),), "dw": 7.0, "step_size": 3.0}):
        policy = make_policy("magnitude", target_speedup=4.0)
        policy.multiplier = 2.0
        thresholds.append(
            [
                p.lsb_exponent.tolist()
                for p in policy.update(measure({"a": layer(**gradients)}))["a"].values()
            ]
        )
    assert thresholds[0] == thresholds[1]


def test_magnitude_measures_its_role_split():
    assert make_policy("magnitude", target_speedup=4.0).wants_probes
    assert not make_policy("magnitude", target_speedup=4.0, calibrate="none").wants_probes


# -- Random


def random_policy(seed=0, **options):
    return make_policy(
        "random", target_speedup=4.0, seed=seed, calibrate="none", hysteresis=0.0, **options
    )


def test_random_swaps_what_is_at_stake():
    # Two groups of E, mean squares 1 and 16, equal harm a squared error. Swapped, the first is owed
    # 16 / 1 times its harm and the second 1 / 16: thresholds two binades lower and higher.
    layers = {"a": layer(e=((1.0, 16.0),))}
    ours = make_policy("dynasty", target_speedup=4.0, calibrate="none", hysteresis=0.0)
    ours.multiplier = 1e3
    reference = ours.update(measure(layers))["a"][E].lsb_exponent
    found = set()
    for seed in range(8):
        policy = random_policy(seed)
        policy.multiplier = 1e3
        found.add(
            tuple(
                (policy.update(measure(layers))["a"][E].lsb_exponent - reference).flatten().tolist()
            )
        )
    assert found == {(0, 0), (-2, 2)}


def test_random_keeps_the_distribution_and_its_order():
    square = torch.arange(1.0, 33.0).reshape(1, 32) ** 2
    square[0, 5] = 0.0
    wide = {
        "geometry": LayerGeometry(kind="linear", weight_shape=(8, 128)),
        "x_square": square,
        "dx_square": torch.full((1, 32), 1e-3),
    }
    layers = {"a": layer(w_square=torch.ones(2, 32), dw_square=torch.ones(2, 32), **wide)}
    ours = make_policy("dynasty", target_speedup=4.0, calibrate="none").sensitivities(
        layers, loss=1.0
    )["a"][X]
    policy = random_policy()
    first, again = (policy.sensitivities(layers, loss=1.0)["a"][X] for _ in range(2))
    stake = (ours.harm * ours.mean_square).flatten()
    shuffled = (first.harm * first.mean_square).flatten()
    torch.testing.assert_close(shuffled.sort().values, stake.sort().values)
    assert int((shuffled != stake).sum()) > 20
    assert first.harm[0, 5] == ours.harm[0, 5]  # no signal, nothing to shuffle
    assert torch.equal(first.harm, again.harm)
    assert not torch.equal(
        first.harm, random_policy(1).sensitivities(layers, loss=1.0)["a"][X].harm
    )


# -- PFQ


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


# -- CPT


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


# -- AMPA


def test_ampa_takes_bits_where_they_matter_least():
    # First-order sensitivity of X, sqrt(<dX^2> <X^2>): 1 and 3 of two layers, so .5 and 1.5 of the
    # mean; W and E are alike in both. Each bit less doubles it (E: 2.014 at 7 bits). After one bit
    # less: X_a 1.0, W 2.0003, E 2.014, X_b 3.0; X_a's second: .5 * 4.0023. So X_a, W_a, W_b, X_a,
    # E_a, E_b, X_b, ... lose a bit in turn. After four, a = 6/7/8 and b = 8/7/8 cost (42 + 56 + 48
    # + 56 + 56 + 64) / 384 = .8385; after three .8776. At 8 bits the speedup is 1, so 1 / .85 takes
    # four.
    layers = {
        "a": layer(x=((1.0, 1.0),), dx=((1.0, 1.0),)),
        "b": layer(x=((1.0, 1.0),), dx=((9.0, 9.0),)),
    }
    entries = AmpaPolicy().update(measure(layers, speedup=1.0, target=1 / 0.85))
    assert (bits(entries, "a"), bits(entries, "b")) == ((6, 7, 8), (8, 7, 8))


@pytest.mark.parametrize(("spread", "expected"), [(1, (7, 7, 8)), (2, (6, 8, 8)), (5, (6, 8, 8))])
def test_ampa_spread(spread, expected):
    # X_a hardly counts: it alone loses bits, down to `spread` below X_b. 6/8/8 costs 160 and b 192:
    # 352 of 384. Where only 7/8/8 is allowed, 368, W_a is next (49 + 56 + 56 + 192 = 353).
    layers = {"a": layer(dx=((1e-12, 1e-12),)), "b": layer(dx=((1.0, 1.0),))}
    entries = AmpaPolicy(spread=spread).update(measure(layers, speedup=1.0, target=384 / 354))
    assert bits(entries, "a") == expected
    assert bits(entries, "b") == (8, 8, 8)


def test_ampa_smooths_sensitivities():
    # 64 elements, gradients of 1, then 3: 64 and 192. At .6: (.6 * .4 * 64 + .4 * 192) / (.6 * .4 +
    # .4) = 144.
    policy = AmpaPolicy()
    for gradient in (1.0, 9.0):
        policy.update(
            measure(
                {"a": layer(x=((1.0, 1.0),), dx=((gradient, gradient),))}, speedup=1.0, target=2.0
            )
        )
    state = policy.state_dict()
    assert state["averages"]["a"]["X"] / state["weights"]["a"] == pytest.approx(144)


def test_ampa_allows_for_what_zero_blocks_are_charged():
    # At 8 bits everywhere the step costs 1.1 uniform steps: 0.1 are no widths. 1.1 - 1/48 has room
    # for one bit of X: 8 * 7 twice, 64.
    layers = {"a": layer(dx=((1e-12, 1e-12),)), "b": layer(dx=((1.0, 1.0),))}
    entries = AmpaPolicy().update(measure(layers, speedup=1 / 1.1, target=1 / (1.1 - 16 / 384)))
    assert (bits(entries, "a"), bits(entries, "b")) == ((7, 8, 8), (8, 8, 8))


# -- Steering, on costs that widths have by themselves


def shares_of(layers):
    total = sum(sum(s.macs.values()) for s in layers.values())
    return {
        name: {gemm: macs / total for gemm, macs in s.macs.items()} for name, s in layers.items()
    }


def drive(
    policy,
    layers,
    *,
    steps=2000,
    interval=10,
    overhead=0.03,
    loss=lambda p: 2 * math.exp(-4 * p) + 0.2,
):
    """Run a policy of fixed widths against their cost and `overhead` for zero blocks; returns the
    whole run's speedup.
    """
    entries, spent, last, step = policy.initial(layers), 0.0, 0, 1
    shares = shares_of(layers)
    while True:
        widths = {
            n: {r: int(entries[n][r].bits) if n in entries else 8 for r in Role} for n in layers
        }
        cost = overhead + sum(width_cost(shares[n], widths[n]) for n in layers)
        spent, last = spent + cost * (step - last), step
        shown = {
            n: replace(s, mean_bits={r: float(b) for r, b in widths[n].items()})
            for n, s in layers.items()
        }
        rest = (steps - step) / max(steps / policy_target(policy) - spent, 1e-9)
        target = min(max(rest, policy_target(policy) / 1.3), policy_target(policy) * 1.3)
        entries = policy.update(
            Measurement(
                layers=shown,
                loss=loss(step / steps),
                speedup=1 / cost,
                target_speedup=target,
                step=step,
                steps=steps,
                run_speedup=step / spent,
            )
        )
        if step == steps:
            return steps / spent
        step = min(step + interval, steps)


def policy_target(policy):
    return getattr(policy, "target_speedup", None) or policy.tested_target


def three_layers():
    return {
        "a": layer(macs={Gemm.FORWARD: 4096, Gemm.WGRAD: 4096}, x=((1.0, 3.0),)),
        "b": layer(macs=dict.fromkeys(Gemm, 1024), dx=((1e-4, 1e-5),), dw=1e-3, x_unsigned=1.0),
        "c": layer(macs=dict.fromkeys(Gemm, 128), dx=((1e-2, 1e-3),), dw=1e-1, x_unsigned=1.0),
    }


@pytest.mark.parametrize("target", [2.0, 4.0, 5.1, 8.0])
@pytest.mark.parametrize("name", ["pfq", "cpt", "per_layer", "ampa"])
def test_a_run_costs_what_was_asked_for(name, target):
    policy = make_policy(name, target_speedup=target, **({"cycles": 8} if name == "cpt" else {}))
    policy.tested_target = target
    # Three layers have few combinations of widths; of schedules only the last stage or cycle is not
    # paid back.
    assert drive(policy, three_layers()) == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize(
    "loss", [lambda p: 1.0, lambda p: 5.0 - 4.0 * p], ids=["still at once", "never still"]
)
def test_pfq_meets_its_cost_whenever_stages_change(loss):
    assert drive(
        PfqPolicy(target_speedup=5.1, threshold=0.01), three_layers(), loss=loss
    ) == pytest.approx(5.1, rel=0.02)


def test_schedules_stay_cheap_when_the_guard_took_their_budget():
    for name in ("pfq", "cpt"):
        policy = make_policy(name, target_speedup=4.0)
        policy.initial({"a": None})
        policy.raise_precision()
        # 8 bits were in force: a step cost 1, none of it for zero blocks.
        entries = policy.update(measure(step=500, steps=1000, speedup=1.0, run_speedup=1.9))
        assert policy.state_dict()["overhead"] == pytest.approx(0.0)
        assert bits(entries) == (2, 2, 2)  # 500 / 1.9 steps are more than all 1000 may cost


@pytest.mark.parametrize("name", STATISTICAL)
def test_the_guard_widens(name):
    policy = make_policy(name, target_speedup=4.0)
    layers = three_layers()
    before = policy.update(measure(layers, speedup=1.0, target=8.0))
    policy.raise_precision()
    after = policy.update(measure(layers, speedup=1.0 if name == "ampa" else 8.0, target=8.0))
    mean = [
        sum(float(p.values.double().mean()) for roles in entries.values() for p in roles.values())
        for entries in (before, after)
    ]
    assert (
        mean[1] > mean[0] if name in ("per_layer", "ampa") else mean[1] < mean[0]
    )  # widths up, or thresholds down


# -- State


@pytest.mark.parametrize("name", RIVALS)
def test_a_resumed_policy_makes_the_same_maps(name, tmp_path):
    def updates(first, last):
        for i in range(first, last):
            layers = {
                n: replace(s, x_square=s.x_square * (1 + 0.3 * i))
                for n, s in three_layers().items()
            }
            yield measure(
                layers,
                speedup=3.0 + 0.2 * i,
                target=4.0,
                step=25 * i,
                steps=400,
                loss=2.0 / i,
                run_speedup=3.5,
            )

    def policy(**options):
        return make_policy(
            name, target_speedup=4.0, **({"cycles": 4} if name == "cpt" else {}), **options
        )

    unbroken = policy()
    unbroken.initial({"a": None})
    for measurement in updates(1, 6):
        unbroken.update(measurement)
    torch.save(unbroken.state_dict(), tmp_path / "state.pt")
    resumed = policy(**({"seed": 9} if name == "random" else {}))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for measurement in updates(6, 12):
        a, b = unbroken.update(measurement), resumed.update(measurement)
        assert list(a) == list(b) == ["a", "b", "c"]
        assert all(a[n][r].equals(b[n][r]) for n in a for r in Role)
    assert unbroken.state_dict().keys() == resumed.state_dict().keys()


@pytest.mark.parametrize("name", RIVALS)
def test_a_checkpoint_holds_everything(name):
    options = {"pfq": {"periods": 8, "window": 2}, "cpt": {"cycles": 4}}.get(name, {})
    policy, twin = (
        make_policy(
            name, target_speedup=4.0, **options, **({"seed": s} if name == "random" else {})
        )
        for s in (1, 2)
    )
    policy.initial({"a": None})
    # PFQ: periods of 50 steps, of mean losses 3, 1, 1, and half a one; unit 5/3, so the third is
    # the first to equal the one before.
    for i, loss in enumerate((3.0, 3.0, 1.1, 0.9, 0.9, 1.1, 0.9), start=1):
        policy.update(
            measure(
                three_layers(),
                speedup=3.0,
                target=4.0,
                step=25 * i,
                steps=400,
                loss=loss,
                run_speedup=3.5,
            )
        )
    if name == "pfq":
        assert policy.stage == 1
        assert policy.state_dict()["period"] == (pytest.approx(0.9 * 25), 25)
    policy.raise_precision()
    twin.load_state_dict(policy.state_dict())
    assert_same(policy, twin, name)


def assert_same(a, b, path):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif hasattr(a, "__dict__") and not isinstance(a, Role):
        for key in vars(a) | vars(b):
            assert_same(getattr(a, key), getattr(b, key), f"{path}.{key}")
    else:
        assert a == b, path


@pytest.mark.parametrize("name", RIVALS)
def test_names_are_those_of_the_registry(name):
    policy = make_policy(name, target_speedup=4.0)
    assert policy.name == name
    assert policy.needs_statistics == (name in STATISTICAL)
    assert POLICIES[name].text
    assert POLICIES[name].source


def test_layers_without_shapes_get_scalars():
    for name in ("per_layer", "ampa", "pfq", "cpt"):
        policy = make_policy(name, target_speedup=4.0)
        policy.initial({"a": None})
        assert all(p.bits.ndim == 0 for p in policy.update(measure(run_speedup=4.0))["a"].values())


def test_layers_that_a_batch_does_not_use_keep_their_widths():
    for name in ("per_layer", "ampa", "pfq", "cpt"):
        policy = make_policy(name, target_speedup=4.0)
        policy.initial(three_layers())
        everything = policy.update(
            measure(three_layers(), speedup=1.0, target=4.0, run_speedup=4.0)
        )
        some = policy.update(measure({"a": three_layers()["a"]}, step=101, run_speedup=4.0))
        assert set(some) == set(everything) == {"a", "b", "c"}


# -- Refusals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pfq", {"forward": (3, 4)}, "a width for each stage alike"),
        ("pfq", {"forward": (), "backward": ()}, "forward must be a sequence"),
        (
            "pfq",
            {"forward": "3+x", "backward": "8+8"},
            "a width of forward must be an integer of at least 1",
        ),
        ("pfq", {"threshold": 0.0}, "threshold must be positive"),
        ("pfq", {"decay": 1.5}, r"decay in \(0, 1\]"),
        ("pfq", {"window": 1}, "window must be an integer of at least 2"),
        ("pfq", {"periods": 0}, "periods must be"),
        ("cpt", {"least": 9}, "least must not exceed most, not 9 and 8"),
        ("cpt", {"cycles": 0}, "cycles must be an integer of at least 1, not 0"),
        ("cpt", {"cycles": 2.5}, "cycles must be an integer"),
        ("ampa", {"spread": 0}, "spread must be an integer of at least 1 bit"),
        ("ampa", {"smoothing": 1.0}, r"smoothing must be in \[0, 1\)"),
        ("random", {"seed": -1}, "seed must be an integer and not negative"),
        (
            "magnitude",
            {"role_weights": {"X": 0.0}},
            "weights of roles must be positive and finite, not 0.0 for X",
        ),
        ("magnitude", {"role_weights": {"Q": 1.0}}, "a role is written X"),
        (
            "magnitude",
            {"calibrate": "layers"},
            "calibrate of magnitude must be 'roles' or 'none', not 'layers'",
        ),
        ("per_layer", {"role_weights": {"E": math.nan}}, "positive and finite"),
        ("per_layer", {"calibrate": "roles"}, "calibrate of per_layer must be 'none', not 'roles'"),
        (
            "dynasty",
            {"calibrate": "all"},
            "calibrate of dynasty must be 'layers' or 'roles' or 'none', not 'all'",
        ),
        (
            "dynasty",
            {"role_weights": {"E": -1.0}},
            "weights of roles must be positive and finite, not -1.0 for E",
        ),
        ("dynasty", {"backward_bits": {"X": 0}}, "to 2 bits or more, not X to 0"),
        ("dynasty", {"backward_bits": 2}, "backward_bits takes a value for each role .* not 2"),
        ("dynasty", {"least_bits": 3}, "least_bits takes a value for each role .* not 3"),
        ("random", {"role_weights": 4.0}, r"role_weights takes a value for each role .* not 4\.0"),
        (
            "dynasty",
            {"role_weights": {"X": "much"}},
            "weights of roles must be positive and finite, not 'much' for X",
        ),
        ("dynasty", {"backward_bits": {"E": 4}}, "limits X in WGRAD and W in DGRAD .* not E to 4"),
        ("dynasty", {"backward_bits": {"X": 9}}, r"backward_bits\[X\] must be 0"),
        (
            "magnitude",
            {"backward_bits": {"W": 3}, "least_bits": {"W": 4}},
            "backward_bits of W, 3, must not be below its least_bits, 4",
        ),
        ("per_layer", {"noise_budget": 1.0}, "takes target_speedup, not noise_budget"),
        ("ampa", {"tempo": 3}, "policy 'ampa': .*tempo"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_policy(name, target_speedup=4.0, **options)


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_needs_a_target(name):
    with pytest.raises(ValueError, match=f"policy '{name}' needs target_speedup"):
        make_policy(name)


@pytest.mark.parametrize("name", ["pfq", "cpt"])
def test_schedules_need_the_length_of_the_run(name):
    with pytest.raises(ValueError, match="give the Trainer max_epochs or max_steps"):
        make_policy(name, target_speedup=4.0).update(measure(steps=math.inf))


def test_ampa_needs_a_cost():
    with pytest.raises(ValueError, match="ampa steers to a cost"):
        AmpaPolicy().update(replace(measure(), target_speedup=None))


def test_stages_from_a_command_line():
    given = PfqPolicy(target_speedup=3.0, forward="4+8", backward="8+8").initial({"a": None})
    assert bits(given) == bits(
        PfqPolicy(target_speedup=3.0, forward=(4, 8), backward=(8, 8)).initial({"a": None})
    )
