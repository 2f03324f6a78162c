"""The noise table against an independent NumPy quantizer; the threshold rule against exhaustive
search.
"""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_noise
from dynasty_lightning.numerics.formats import LSB_LIMIT
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.baselines.magnitude import MagnitudePolicy
from dynasty_lightning.policy.noise import (
    DENSE_NOISE_TO_SIGNAL,
    NOISE_PER_LSB,
    NOISE_TO_SIGNAL,
    THRESHOLD_OFFSET,
    ideal_lsb_exponent,
    noise_to_signal,
)
from dynasty_lightning.policy.statistics import example_layer
from dynasty_lightning.policy.threshold import DynastyPolicy

RESULTS = json.loads((Path(bench_noise.ROOT) / "benchmarks" / "results" / "noise.json").read_text())
NAMES = {
    (Role.ACTIVATION, False): "X relu",
    (Role.ACTIVATION, True): "X signed",
    (Role.WEIGHT, True): "W",
    (Role.ERROR, True): "E",
}


def threshold(multiplier, price, harm, role):
    """The best integer, as the map generator takes it."""
    kappa = NOISE_PER_LSB[0][role]
    return ideal_lsb_exponent(multiplier, price, harm, kappa).ceil().to(torch.int16)


def numpy_noise(
    x: np.ndarray, role: Role, signed: bool, bits: int, random: np.random.Generator
) -> tuple[float, float]:
    """NSR and kappa of blocks [count, elements], by docs/reference/numerics.md."""
    peak = np.abs(x).max(1, keepdims=True)
    exponent = np.frexp(peak)[1] - 1
    p = bits - signed
    lsb = 2.0 ** (exponent + 1 - p)
    if role is Role.ERROR:
        lsb = np.where(peak > (2**p - 1) * lsb, 2 * lsb, lsb)
        mantissa = np.floor(x / lsb + random.random(x.shape))
    else:
        mantissa = np.clip(np.rint(x / lsb), -(2**p - 1) if signed else 0, 2**p - 1)
    error = mantissa * lsb - x
    return float((error**2).sum() / (x**2).sum()), float((error / lsb).var())


@pytest.mark.parametrize("block_shape", NOISE_TO_SIGNAL)
@pytest.mark.parametrize(("role", "signed"), NAMES)
def test_table_measured_again(block_shape, role, signed):
    random = np.random.default_rng(1)
    size = math.prod(block_shape)
    count = (1 << 18) // size
    scale = 2.0 ** ((random.permutation(count) + 0.5) / count - 0.5)
    x = random.standard_normal((count, size)) * scale[:, None]
    x = x if signed else np.maximum(x, 0)
    x = x[np.abs(x).max(1) > 0]
    for bits in range(2, 9):
        nsr, kappa = numpy_noise(x, role, signed, bits, random)
        # 16x16 at few bits: a thousand blocks, each off by its own scale and peak.
        assert nsr == pytest.approx(
            noise_to_signal(role, bits, signed=signed, block_shape=block_shape), rel=0.03
        ), bits
        if bits >= 4:
            assert kappa == pytest.approx(
                NOISE_PER_LSB[0][role] * (1 if signed else 0.5), rel=0.05
            ), bits


def test_constants_are_the_benchmarks():
    for block_shape, roles in NOISE_TO_SIGNAL.items():
        for (role, signed), values in roles.items():
            measured = RESULTS["noise"]["x".join(map(str, block_shape))][NAMES[role, signed]]
            assert values == pytest.approx([measured[str(b)]["nsr"] for b in range(2, 9)], rel=1e-3)
            assert all(a > b for a, b in pairwise(values))
    assert {r.letter: o for r, o in THRESHOLD_OFFSET.items()} == {
        k: v["offset"] for k, v in RESULTS["offsets"].items()
    }


def test_denser_codes_measured_again():
    for block_shape, roles in DENSE_NOISE_TO_SIGNAL.items():
        for (role, signed), values in roles.items():
            name = NAMES[role, signed]
            of_all = RESULTS["dense"]["x".join(map(str, block_shape))][name]
            assert values == pytest.approx(list(of_all["nsr"].values()), rel=1e-3)
            again = bench_noise.measure_dense(name, block_shape, (1 << 18) // 256, seed=3)
            assert values == pytest.approx(list(again["nsr"].values()), rel=0.1)
            assert all(a > b for a, b in pairwise(values))
            # 3 to 5 bits: a threshold's noise.
            kappa = NOISE_PER_LSB[2][role] * (1 if signed else 0.5)
            assert of_all["kappa"]["-2"] == pytest.approx(kappa, rel=0.12)


def test_noise_of_denser_codes_is_theirs():
    four = noise_to_signal(Role.WEIGHT, 4, block_shape=(8, 8), scale_bits=2)
    assert four < 0.5 * noise_to_signal(Role.WEIGHT, 4, block_shape=(8, 8))
    plain, dense = (example_layer(), replace(example_layer(), scale_bits=2))
    for name, policy in (("dynasty", DynastyPolicy()), ("magnitude", MagnitudePolicy())):
        found = [policy.predict({"fc": s}, loss=1.0)["fc"][Role.ERROR] for s in (plain, dense)]
        assert [f.noise_per_lsb for f in found] == [1 / 6, 0.106], name


def test_offsets_measured_again():
    for role in Role:
        regrets = [
            bench_noise.study(bench_noise.sweep(k, (4, 4), 4096, 1.5, seed=7))["regret"]
            for k in bench_noise.DECIDING[role]
        ]
        mean = np.mean([r.mean(1) for r in regrets], axis=0)
        at = int(np.abs(bench_noise.OFFSETS - THRESHOLD_OFFSET[role]).argmin())
        assert mean[at] < mean.min() + 0.003, role
        assert mean[at] < 0.01, role


@pytest.mark.parametrize(("role", "closed"), [(Role.WEIGHT, 1.5), (Role.ERROR, 1.0)])
def test_closed_form_agrees_with_the_measured_rule(role, closed):
    assert abs(THRESHOLD_OFFSET[role] - closed) <= 0.125
    # The ceiling of the closed form is what rounding with that offset gives.
    sensitivity = torch.logspace(-9, 9, 37)
    rounded = (0.5 * torch.log2(0.3 * 1e-7 / sensitivity.double()) + closed).round()
    assert torch.equal(threshold(0.3, 1e-7, sensitivity, role).double(), rounded)


def test_threshold_scales():
    sensitivity = torch.tensor([[1e-3, 4e-3], [16e-3, 1.0]])
    for role in Role:
        t = threshold(1.0, 1e-6, sensitivity, role)
        assert (t.dtype, t.shape) == (torch.int16, sensitivity.shape)
        assert t[0, 0] - 1 == t[0, 1] == t[1, 0] + 1  # 4 times the sensitivity, one bit more
        assert torch.equal(threshold(4.0, 1e-6, sensitivity, role), t + 1)
        assert torch.equal(threshold(1.0, 4e-6, sensitivity, role), t + 1)
        assert torch.equal(threshold(1e-6, 1.0, sensitivity, role), t)


def test_threshold_at_the_ends():
    harm = torch.tensor([0.0, 1e-45, 1.0, 3e38, math.inf])
    t = threshold(1.0, 1.0, harm, Role.WEIGHT)
    assert t[0] == LSB_LIMIT
    assert t[1:4].tolist() == [76, 1, -62]
    assert t[4] == -LSB_LIMIT
    for lambda_, price in ((0.0, 1.0), (1.0, 0.0)):
        assert threshold(lambda_, price, harm, Role.ERROR).tolist() == [
            LSB_LIMIT,
            *[-LSB_LIMIT] * 4,
        ]
    # Products beyond float64.
    assert threshold(1e300, 1e300, torch.ones(1), Role.WEIGHT) == LSB_LIMIT
    assert threshold(
        1e-300, 1e-300, torch.full((1,), 5e-324, dtype=torch.float64), Role.WEIGHT
    ) == math.ceil((math.log2(1e-300) * 2 + 1074) / 2 + 1)


@pytest.mark.parametrize(
    ("lambda_", "price", "harm", "message"),
    [
        (-1.0, 1.0, 1.0, "lambda must be finite and not negative, not -1.0"),
        (math.nan, 1.0, 1.0, "lambda must"),
        (1.0, math.inf, 1.0, "price must"),
        (1.0, 1.0, -1e-9, "sensitivities must not be negative"),
        (1.0, 1.0, math.nan, "or NaN"),
    ],
)
def test_threshold_refuses(lambda_, price, harm, message):
    with pytest.raises(ValueError, match=message):
        threshold(lambda_, price, torch.tensor([1.0, harm]), Role.ACTIVATION)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"role": Role.WEIGHT, "bits": 1}, "not 1"),
        ({"role": Role.WEIGHT, "bits": 9}, "not 9"),
        ({"role": Role.WEIGHT, "bits": 4, "signed": False}, "W is always signed"),
        ({"role": Role.WEIGHT, "bits": 4, "block_shape": (1, 16)}, r"not \(1, 16\)"),
    ],
)
def test_noise_to_signal_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise_to_signal(**arguments)
