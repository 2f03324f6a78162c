"""What holds of all baselines: their cost, states, names and refusals."""

import math
from dataclasses import replace

import pytest
import torch

from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.baselines.pfq import PfqPolicy
from dynasty_lightning.policy.registry import POLICIES, make_policy
from tests.policy.baselines.cases import (
    BASELINES,
    STATISTICAL,
    assert_same,
    bits,
    drive,
    measure,
    three_layers,
)


@pytest.mark.parametrize("target", [2.0, 4.0, 5.1, 8.0])
@pytest.mark.parametrize("name", ["pfq", "cpt", "per_layer", "ampa", "snip"])
def test_a_run_costs_what_was_asked_for(name, target):
    options = {"cpt": {"cycles": 8}, "snip": {"widths": range(2, 9)}}.get(name, {})
    policy = make_policy(name, target_speedup=target, **options)
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
        # 8 bits were active: a step cost 1, none of it for zero blocks.
        entries = policy.update(measure(step=500, steps=1000, speedup=1.0, run_speedup=1.9))
        assert policy.state_dict()["overhead"] == pytest.approx(0.0)
        assert bits(entries) == (2, 2, 2)  # 500 / 1.9 steps are more than all 1000 may cost


@pytest.mark.parametrize("name", STATISTICAL)
def test_the_guard_widens(name):
    options = {"widths": (2, 4, 8)} if name == "snip" else {}
    policy = make_policy(name, target_speedup=4.0, **options)
    layers = three_layers()
    before = policy.update(measure(layers, speedup=1.0, target=8.0))
    policy.raise_precision()
    plans_cost = name in ("ampa", "snip")
    after = policy.update(measure(layers, speedup=1.0 if plans_cost else 8.0, target=8.0))
    mean = [
        sum(float(p.values.double().mean()) for roles in entries.values() for p in roles.values())
        for entries in (before, after)
    ]
    assert (
        mean[1] > mean[0] if plans_cost or name == "per_layer" else mean[1] < mean[0]
    )  # widths up, or thresholds down


@pytest.mark.parametrize("name", BASELINES)
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


@pytest.mark.parametrize("name", BASELINES)
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


@pytest.mark.parametrize("name", BASELINES)
def test_names_are_those_of_the_registry(name):
    policy = make_policy(name, target_speedup=4.0)
    assert policy.name == name
    assert policy.needs_statistics == (name in STATISTICAL)
    assert POLICIES[name].text
    assert POLICIES[name].source


def test_layers_without_shapes_get_scalars():
    for name in ("per_layer", "ampa", "snip", "pfq", "cpt"):
        policy = make_policy(name, target_speedup=4.0)
        policy.initial({"a": None})
        assert all(p.bits.ndim == 0 for p in policy.update(measure(run_speedup=4.0))["a"].values())


def test_layers_that_a_batch_does_not_use_keep_their_widths():
    for name in ("per_layer", "ampa", "snip", "pfq", "cpt"):
        policy = make_policy(name, target_speedup=4.0)
        policy.initial(three_layers())
        everything = policy.update(
            measure(three_layers(), speedup=1.0, target=4.0, run_speedup=4.0)
        )
        some = policy.update(measure({"a": three_layers()["a"]}, step=101, run_speedup=4.0))
        assert set(some) == set(everything) == {"a", "b", "c"}


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
        ("snip", {"widths": (8,)}, "widths must be two distinct widths of 2 to 8 bits or more"),
        ("snip", {"smoothing": -0.1}, r"smoothing must be in \[0, 1\)"),
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


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_needs_a_target(name):
    with pytest.raises(ValueError, match=f"policy '{name}' needs target_speedup"):
        make_policy(name)


@pytest.mark.parametrize("name", ["pfq", "cpt"])
def test_schedules_need_the_length_of_the_run(name):
    with pytest.raises(ValueError, match="give the Trainer max_epochs or max_steps"):
        make_policy(name, target_speedup=4.0).update(measure(steps=math.inf))
