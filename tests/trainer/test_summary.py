# SPDX-License-Identifier: Apache-2.0
"""The figures of a run, from its counts alone."""

import math

import pytest

from dynasty_lightning.cost.counts import StepCost
from dynasty_lightning.trainer.summary import Summary, logged

COST = StepCost(
    macs=10.0,
    baseline=640.0,
    products=100.0,
    products_charged=160.0,
    stored_bits=1.0,
    stored_bits_baseline=2.0,
)
ENTRY = {
    "step": 40,
    "speedup_ideal": 6.4,
    "speedup_charged": 4.0,
    "energy_ratio_sram": 2.0,
    "lambda": None,
    "noise_ratio": math.nan,
    "bits": {"stem": {"X": 3.0, "W": 4.0, "E": 2.0}},
    "mean_bits": {"X": 3.0, "W": 4.0, "E": 2.0},
    "zero_share": {"X": 0.0, "W": 0.0, "E": 0.3},
}


def test_figures_of_a_run():
    figures = Summary(steps=40, cost=COST, step_cost=COST, last=ENTRY, nonfinite=3).figures()
    assert (figures["speedup_ideal"], figures["speedup_charged"]) == (6.4, 4.0)
    assert figures["bits"] == ENTRY["mean_bits"]
    assert figures["zero_share"] == ENTRY["zero_share"]
    assert (figures["nonfinite"], figures["steps"], figures["lambda"]) == (3, 40, None)
    assert set(figures["analytics_hardware"]) == {"operations", "bytes", "energy"}


def test_figures_before_anything_is_counted():
    figures = Summary(steps=0, cost=StepCost(), step_cost=StepCost()).figures()
    assert figures["bits"] == {}
    assert math.isnan(figures["speedup_charged"])
    assert math.isnan(figures["analytics_share"])


def test_the_table_has_promises_and_layers():
    summary = Summary(steps=40, first_step=8, cost=COST, step_cost=COST, last=ENTRY)
    lines = summary.table(["  a promise"]).splitlines()
    assert "over 40 steps from step 8 on" in lines[0]
    assert "6.40x fewer" in lines[1]
    assert "4.00x zero blocks counted" in lines[1]
    assert lines[2] == "  a promise"
    assert lines[-1].split() == ["stem", "3.00", "4.00", "2.00"]
    assert "from step" not in Summary(steps=1, cost=COST, step_cost=COST).table([])


def test_what_is_logged():
    bar, values = logged(ENTRY, nonfinite=2)
    assert bar == {"dynasty/speedup_charged": 4.0, "dynasty/bits_E": 2.0}
    assert values["dynasty/zero_share"] == pytest.approx(0.1)
    assert values["dynasty/energy_ratio_sram"] == 2.0
    assert values["dynasty/nonfinite"] == 2.0
    assert "dynasty/lambda" not in values
    steered = logged({**ENTRY, "lambda": 3.0, "noise_ratio": 0.1}, nonfinite=0)[1]
    assert (steered["dynasty/lambda"], steered["dynasty/noise_ratio"]) == (3.0, 0.1)
