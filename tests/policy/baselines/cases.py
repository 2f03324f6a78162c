"""Statistics, measurements and runs that the tests of baselines share."""

import math
from dataclasses import replace

import torch

from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Gemm, Role
from dynasty_lightning.policy.base import Measurement
from dynasty_lightning.policy.baselines.widths import width_cost
from dynasty_lightning.policy.statistics import LayerStatistics

X, W, E = Role
BASELINES = ("per_layer", "magnitude", "random", "pfq", "cpt", "ampa", "snip")
STATISTICAL = ("per_layer", "magnitude", "random", "ampa", "snip")


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
