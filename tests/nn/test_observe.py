# SPDX-License-Identifier: Apache-2.0
"""What a layer records of a step, by what it is told to observe."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from dynasty_lightning import OperandPrecision, convert
from dynasty_lightning.nn.observe import ObservationSlot, Observe, read_key
from dynasty_lightning.numerics.observation import LayerObservation
from dynasty_lightning.numerics.roles import Role

SQUARES = {"x_square", "e_square", "dx_square", "w_square", "dw_square"}


def layer(*, thresholds=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model)
    if thresholds:
        for role in Role:
            model[0].set_precision(role, OperandPrecision(lsb_exponent=-6))
    return model[0]


def seen(layer, what, **options):
    layer.observe(what, **options)
    layer.clear_observation()
    layer(torch.randn(4, 8)).square().sum().backward()
    return layer.observation()


@pytest.mark.parametrize("observe", Observe)
def test_a_key_names_the_slot_and_what_to_record(observe):
    slot = ObservationSlot()
    assert read_key(slot.key(observe)) == (slot, observe)


def test_a_key_of_a_slot_that_is_gone_still_says_what_to_record():
    """Operators give back what is recorded even where nobody keeps it: their outputs have the shape
    that was compiled.
    """
    slot = ObservationSlot()
    key = slot.key(Observe.WIDTHS)
    del slot
    gc.collect()
    assert read_key(key) == (None, Observe.WIDTHS)


@pytest.mark.parametrize("key", ["", "7", ":", "x:y", "1:most"])
def test_what_is_no_key_records_nothing(key):
    assert read_key(key)[1] is Observe.NOTHING


def test_each_records_what_the_one_before_does_and_more():
    one = layer()
    assert seen(one, Observe.NOTHING) is None
    assert not one.observing
    widths = seen(one, Observe.WIDTHS)
    assert one.observing
    assert set(widths.squares) == set()
    assert widths.probe is None
    moments = seen(one, Observe.MOMENTS)
    assert set(moments.squares) == SQUARES
    assert moments.probe is None
    harm = seen(one, Observe.HARM)
    assert set(harm.squares) == SQUARES
    assert harm.probe is not None
    for observation in (widths, moments, harm):
        assert isinstance(observation, LayerObservation)
        assert {r: tuple(b.shape) for r, b in observation.bits.items()} == dict.fromkeys(
            Role, (1, 2)
        ) | {Role.WEIGHT: (2, 2)}


def test_harm_takes_thresholds_that_can_be_shifted():
    assert seen(layer(thresholds=False), Observe.HARM).probe is None


def test_uses_are_counted_whatever_is_recorded():
    one = layer()
    for observe in Observe:
        seen(one, observe)
    assert one.take_uses() == (4, 0, 4)  # nobody wanted a gradient of X
    assert one.uses == (0, 0, 0)


def test_errors_are_exact_for_as_long_as_they_shall_be():
    one = layer()
    one.set_precision(Role.ERROR, OperandPrecision(bits=2))
    found = [
        set(seen(one, Observe.WIDTHS, exact_errors=exact).bits[Role.ERROR].flatten().tolist())
        for exact in (True, False)
    ]
    assert found == [{8}, {2}]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_observes_nothing_and_has_a_slot_of_its_own(copied):
    one = layer()
    one.observe(Observe.MOMENTS, exact_errors=True)
    other = copied(one)
    assert not other.observing
    assert not other.exact_errors
    assert other.slot.number != one.slot.number
