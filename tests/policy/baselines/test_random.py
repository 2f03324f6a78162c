"""A map in random places."""

import torch

from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.policy.registry import make_policy
from tests.policy.baselines.cases import E, X, layer, measure


def random_policy(seed=0, **options):
    return make_policy(
        "random", target_speedup=4.0, seed=seed, calibrate="none", hysteresis=0.0, **options
    )


def test_random_swaps_what_is_at_stake():
    # Two groups of E, mean squares 1 and 16, equal harm a squared error. Swapped, the first is owed
    # 16 / 1 times its harm and the second 1 / 16: thresholds two binades lower and higher.
    layers = {"a": layer(e=((1.0, 16.0),))}
    placed = make_policy("dynasty", target_speedup=4.0, calibrate="none", hysteresis=0.0)
    placed.multiplier = 1e3
    reference = placed.update(measure(layers))["a"][E].lsb_exponent
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
    placed = make_policy("dynasty", target_speedup=4.0, calibrate="none").sensitivities(
        layers, loss=1.0
    )["a"][X]
    policy = random_policy()
    first, again = (policy.sensitivities(layers, loss=1.0)["a"][X] for _ in range(2))
    stake = (placed.harm * placed.mean_square).flatten()
    shuffled = (first.harm * first.mean_square).flatten()
    torch.testing.assert_close(shuffled.sort().values, stake.sort().values)
    assert int((shuffled != stake).sum()) > 20
    assert first.harm[0, 5] == placed.harm[0, 5]  # no signal, nothing to shuffle
    assert torch.equal(first.harm, again.harm)
    assert not torch.equal(
        first.harm, random_policy(1).sensitivities(layers, loss=1.0)["a"][X].harm
    )
