"""`mxfp4` and `nvfp4` against their rules in fractions, and in training."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from dynasty_lightning import DynastyCallback, DynastyPrecision, convert
from dynasty_lightning.maps.structure import ModelStructure, model_structure
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics.fp4 import quantize_fp4
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.recipe import Recipe
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.study.method import Method
from tests import oracle

E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
E4M3 = sorted(
    {Fraction(m, 8) * oracle.power(-6) for m in range(8)}
    | {(1 + Fraction(m, 8)) * oracle.power(e) for m in range(8) for e in range(-6, 9)}
    - {Fraction(480)}
)
BLOCKS = {"mxfp4": 32, "nvfp4": 16}


def nearest(v, levels):
    """The level that is nearest; of two, the one with an even last bit: at an even place."""
    best = min(abs(v - level) for level in levels)
    ties = [i for i, level in enumerate(levels) if abs(v - level) == best]
    return levels[min(ties, key=lambda i: i % 2)]


def scale_of(block, whole, scaling, stochastic):
    amax = max(abs(v) for v in block)
    if scaling == "mxfp4":
        scale = oracle.power(max(oracle.floor_log2(amax) - 2, -127))
        return 2 * scale if stochastic and amax > 6 * scale else scale
    # Quotients are float32's.
    wanted = Fraction(float(np.float32(float(amax)) / np.float32(6 * np.float32(float(whole)))))
    scale = nearest(min(wanted, Fraction(448)), E4M3)
    if stochastic and scale * whole * 6 < amax and scale < 448:
        scale = E4M3[E4M3.index(scale) + 1]
    return scale * whole


def expected(x, scaling, edge, numbers=None):
    exact = [[Fraction(float(v)) for v in row] for row in x]
    largest = max((abs(v) for row in exact for v in row), default=Fraction(0))
    whole = Fraction(float(max(np.float32(float(largest)) / np.float32(6 * 448), 2.0**-126)))
    result = np.zeros(x.shape)
    for r, row in enumerate(exact):
        for start in range(0, len(row), edge):
            block = row[start : start + edge]
            if not any(block):
                continue
            scale = scale_of(block, whole, scaling, numbers is not None)
            for i, v in enumerate(block):
                y = abs(v) / scale if scale else Fraction(0)
                if numbers is None:
                    level = nearest(min(y, Fraction(6)), E2M1)
                else:
                    low = max(level for level in E2M1 if level <= min(y, 6))
                    up = E2M1[min(E2M1.index(low) + 1, 7)]
                    share = (y - low) / (up - low) if up > low else 0
                    draw = Fraction(2 * int(numbers[r, start + i]) + 1, 2**17)
                    level = up if share + draw >= 1 else low
                result[r, start + i] = math.copysign(
                    float(np.float32(float(level * scale))), float(v)
                )
    return result


@pytest.mark.parametrize("scaling", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("seed", range(8))
def test_every_element_follows_the_rules(scaling, seed):
    g = np.random.default_rng(seed)
    spread, center = [(0, 0), (2, 0), (6, -20), (3, -120), (1, 100), (8, 0), (0, -140), (4, 10)][
        seed
    ]
    rows, columns, edge = int(g.integers(1, 6)), int(g.integers(1, 70)), BLOCKS[scaling]
    sizes = (center + spread * g.standard_normal((rows, -(-columns // edge)))).repeat(edge, 1)
    x = g.standard_normal((rows, columns)) * 2.0 ** np.clip(sizes[:, :columns], -149, 120)
    x[g.random(x.shape) < 0.1] = 0
    x = x.astype(np.float32)
    layout = BlockLayout(shape=x.shape, block_shape=(1, edge), channel_axis=1)
    for role in Role:
        stream = StreamPosition(seed=seed)
        recipe = Recipe(role=role, request=torch.tensor(4), stream=stream)
        got = quantize_fp4(torch.from_numpy(x), layout, recipe, scaling=scaling)
        numbers = None
        if role is Role.ERROR:
            numbers = np.array(
                [oracle.stream_number(i, 2, seed=seed) for i in range(x.size)]
            ).reshape(x.shape)
        want = expected(x, scaling, edge, numbers)
        values = got.with_passthrough(torch.float64).numpy()
        np.testing.assert_array_equal(values, want)
        per_block = np.abs(layout.split(torch.from_numpy(want)).numpy()).max(axis=(1, 3)) > 0
        np.testing.assert_array_equal(got.bits.numpy(), np.where(per_block, 4, 0))


def values_of(x, scaling, role=Role.WEIGHT, **options):
    layout = BlockLayout(shape=x.shape, block_shape=(1, BLOCKS[scaling]), channel_axis=1)
    recipe = Recipe(role=role, request=torch.tensor(4), **options)
    return quantize_fp4(x, layout, recipe, scaling=scaling).with_passthrough(torch.float64)


def test_cases_by_hand():
    x = torch.zeros(2, 32)
    # Largest 7: exponent 2, scale 1; 7 saturates at 6, 5 is a tie of 4 and 6, 2.5 of 2 and 3.
    x[0, :7] = torch.tensor([7.0, 5.0, 2.5, 3.5, 1.25, 0.25, -0.75])
    # Largest 1.5: scale 1/4, elements 6, 3 and .4 -> .5.
    x[1, :3] = torch.tensor([1.5, 0.75, 0.1])
    got = values_of(x, "mxfp4")
    assert got[0, :7].tolist() == [6.0, 4.0, 2.0, 4.0, 1.0, 0.0, -1.0]
    assert got[1, :3].tolist() == [1.5, 0.75, 0.125]
    # NVFP4: the tensor's scale is 2688 / 2688 = 1; scales 448 and 24 / 6 = 4.
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16], x[0, 17] = 2688.0, 24.0, 9.0
    got = values_of(x, "nvfp4")
    assert (got[0, 0], got[0, 16], got[0, 17]) == (2688.0, 24.0, 8.0)


@pytest.mark.parametrize("scaling", ["mxfp4", "nvfp4"])
def test_errors_are_rounded_without_bias_and_never_saturate(scaling):
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    draws = torch.stack(
        [
            values_of(x, scaling, Role.ERROR, stream=StreamPosition(backward_count=n))
            for n in range(3000)
        ]
    )
    deviation = draws.std(0) / 3000**0.5
    assert float(((draws.mean(0) - x).abs() / deviation.clamp(min=1e-6)).max()) < 4.5
    near = values_of(x, scaling)
    assert float((near - x).square().mean()) < float((draws - x).square().mean())


def test_what_is_not_finite_passes():
    x = torch.ones(2, 32)
    x[0, 3] = float("inf")
    assert torch.equal(values_of(x, "nvfp4"), x.double())
    got = values_of(x, "mxfp4", scope="sample")
    assert torch.equal(got[0], x[0].double())
    assert torch.equal(got[1], torch.ones(32).double())


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_they_are_methods_and_train(name):
    method = Method.parse(name)
    method.check()
    plugin, callback = method.make_plugin(seed=0), method.make_callback(interval=10)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 25, 7)
    )
    plugin.convert_module(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    x, y = torch.randn(40, 3, 5, 5), torch.randint(0, 7, (40,))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        plugin.report.stream.advance()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    model.eval()
    with torch.no_grad():  # a prediction of its own, but for the order of float32 sums
        torch.testing.assert_close(model(x[:1]), model(x)[:1], rtol=1e-5, atol=1e-5)
    assert callback.policy.name == "uniform"


def test_weights_are_the_same_in_both_directions():
    model = nn.Sequential(nn.Linear(40, 24, bias=False))
    convert(model, block_shape=(1, 16), scaling="nvfp4")
    forward = model(torch.eye(40))  # exact in four bits: rows of W
    x = torch.zeros(24, 40, requires_grad=True)
    model(x).backward(torch.eye(24))
    torch.testing.assert_close(forward.T, x.grad, rtol=0, atol=0)


def test_its_cost_is_that_of_four_bits_and_its_blocks_its_own():
    import lightning as L
    from torch.utils.data import DataLoader, TensorDataset

    class Learner(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 4))

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = TensorDataset(torch.randn(64, 40), torch.randint(0, 4, (64,)))
    for scaling, block in (("mxfp4", (1, 32)), ("nvfp4", (1, 16))):
        callback = DynastyCallback(policy="uniform", bits=4, interval=4, table=False)
        trainer = L.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[DynastyPrecision(block_shape=block, scaling=scaling)],
            callbacks=[callback],
        )
        trainer.fit(Learner(), DataLoader(data, batch_size=32))
        assert callback.summary()["speedup_ideal"] == pytest.approx(4.0, rel=0.02)
        assert callback.summary()["nonfinite"] == 0
    with pytest.raises(ValueError, match=r"scaling 'nvfp4' is that of its own \(1, 16\) blocks"):
        DynastyPrecision(scaling="nvfp4")
    with pytest.raises(ValueError, match="scaling must be one of 'window', 'mx', 'mxfp4', 'nvfp4'"):
        DynastyPrecision(scaling="fp4")
    model = nn.Sequential(nn.Linear(40, 24))
    convert(model, block_shape=(1, 16), scaling="nvfp4")
    with pytest.raises(ValueError, match="elements of nvfp4 have 4 bits each"):
        dynamic_layers(model)["0"].set_precision(Role.WEIGHT, OperandPrecision(bits=8))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        plugins=[DynastyPrecision(block_shape=(1, 16), scaling="nvfp4")],
        callbacks=[DynastyCallback(target_speedup=4.0)],
    )
    with pytest.raises(ValueError, match="nvfp4 have 4 bits each, and 'dynasty' chooses widths"):
        trainer.fit(Learner(), DataLoader(data, batch_size=32))
    for word in ("nvfp4:bits=8", "mxfp4:block_shape=4x4", "nvfp4:scaling=mx"):
        with pytest.raises(ValueError, match="has blocks and 4 bits of its own: leave out"):
            Method.parse(word)


def test_what_was_trained_in_one_format_does_not_go_on_in_another():
    def structure(**options):
        model = nn.Sequential(nn.Linear(40, 24))
        convert(model, **options)
        return model_structure(model)

    mxfp4 = structure(block_shape=(1, 32), scaling="mxfp4")
    assert ModelStructure.from_json(json.loads(json.dumps(mxfp4.to_json()))) == mxfp4
    for other in ("mx", "window"):
        plain = structure(block_shape=(1, 32), scaling=other)
        assert "scaling" not in plain.to_json()
        for ours, theirs in ((mxfp4, plain), (plain, mxfp4)):
            assert ours.hash() != theirs.hash()
            with pytest.raises(ValueError, match=r"made for blocks of .*scaling='.*; this model"):
                ours.check_equal(theirs, "the checkpoint")
