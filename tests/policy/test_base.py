"""What a policy is asked for, and what it reports of itself."""

import copy
import math
from types import SimpleNamespace

import pytest

from dynasty_lightning import DynastyCallback
from dynasty_lightning.policy.base import Measurement, Policy, check_policy
from dynasty_lightning.policy.registry import POLICIES, make_policy
from dynasty_lightning.policy.statistics import example_layer as linear
from dynasty_lightning.policy.threshold import DynastyPolicy


class Eight(Policy):
    """The least that somebody has to write."""

    name = "eight"
    needs_statistics = False
    wants_probes = False

    def initial(self, layers):
        return {}

    def update(self, measurement):
        return {}

    def raise_precision(self):
        return None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        return None


class Earlier:
    """Eight, by somebody who inherits nothing and knows nothing of figures."""

    name = "eight"
    needs_statistics = False
    wants_probes = False
    initial, update, raise_precision = Eight.initial, Eight.update, Eight.raise_precision
    state_dict, load_state_dict = Eight.state_dict, Eight.load_state_dict


def test_a_policy_has_no_figures_and_no_fixed_widths_unless_it_says_so():
    assert check_policy(Eight()).figures() == {}
    assert not Eight().fixed_widths


def test_a_policy_of_before_gets_what_is_asked_for_now_and_can_be_copied():
    mine = Earlier()
    assert DynastyCallback(policy=mine).policy is mine
    for policy in (mine, copy.deepcopy(mine)):
        assert policy.figures() == {}
        assert policy.fixed_widths is False


def test_what_lacks_something_is_named():
    with pytest.raises(TypeError, match=r"SimpleNamespace is no Policy: it lacks needs_statistics"):
        check_policy(SimpleNamespace(name="some"))
    with pytest.raises(TypeError, match=r"not the class Eight"):
        check_policy(Eight)
    for word in (None, "dynasty", {"bits": 4}):
        with pytest.raises(TypeError, match="policy takes an object, for example DynastyPolicy"):
            check_policy(word)


@pytest.mark.parametrize("name", POLICIES)
def test_only_uniform_has_fixed_widths(name):
    policy = make_policy(name, target_speedup=None if name == "uniform" else 4.0)
    assert policy.fixed_widths == (name == "uniform")
    assert all(isinstance(key, str) for key in policy.figures())


def test_figures_of_thresholds_are_lambda_harm_and_the_weights_of_roles():
    policy = DynastyPolicy(role_weights={"E": 4.0}, calibrate="roles")
    assert policy.figures()["lambda"] is None
    assert math.isnan(policy.figures()["predicted_harm"])
    layers = {"a": linear(outputs=4, inputs=8, step_size=0.5, dw=0.1)}
    policy.update(Measurement(layers=layers, loss=1.0, speedup=4.0, target_speedup=4.0))
    policy.calibration.log_role["X"] = math.log(2.0)
    figures = policy.figures()
    assert figures["lambda"] == policy.multiplier
    assert figures["predicted_harm"] == policy.predicted_harm > 0
    assert {k: figures[k] for k in ("weight_X", "weight_W", "weight_E")} == pytest.approx(
        {"weight_X": 2.0, "weight_W": 1.0, "weight_E": 4.0}
    )


@pytest.mark.parametrize("name", ["pfq", "cpt"])
def test_a_schedule_reports_what_it_adds(name):
    policy = make_policy(name, target_speedup=4.0)
    policy.initial({"a": None})
    assert policy.figures() == {"offset": policy.offset}
    assert policy.offset < 0
