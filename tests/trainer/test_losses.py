# SPDX-License-Identifier: Apache-2.0
"""The loss between two analyses."""

import torch

from dynasty_lightning.trainer.losses import LossMeter
from dynasty_lightning.trainer.ranks import Ranks


def test_micro_batches_make_one_loss():
    meter = LossMeter()
    for _ in range(2):
        meter.gradients_begin()
        for part in (0.5, 1.0):  # losses of 1 and 2, divided by the number of parts
            meter.add(torch.tensor(part), limit=1.5, parts=2)
    assert meter.mean(Ranks(), what="") == (1.5, 0.5)


def test_a_state_goes_on():
    meter, other = LossMeter(), LossMeter()
    meter.add(torch.tensor(2.0), limit=1.0)
    other.load(meter.state())
    for each in (meter, other):
        each.add(torch.tensor(4.0), limit=10.0)
    assert other.mean(Ranks(), what="") == meter.mean(Ranks(), what="") == (3.0, 0.5)
    assert other.state() == meter.state()
    meter.begin()
    assert meter.state() == (0.0, 0, 0.0, 0)
