# SPDX-License-Identifier: Apache-2.0
"""Split codes and scales with a mantissa: the oracle, plain torch and both forms of the C++ kernels
agree to the bit; what the codes promise; and that they round better.
"""

import numpy as np
import pytest
import torch

from dynasty_lightning import DynastyPrecision, PrecisionMap, Role, convert, quantize
from dynasty_lightning.hardware.checkpoint import load_converted
from dynasty_lightning.maps.structure import model_structure
from dynasty_lightning.numerics.backends.pytorch import quantize_in_torch
from dynasty_lightning.numerics.formats import BlockFormat
from dynasty_lightning.numerics.quantized import header_negated
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.recipe import Recipe
from fpga import Operand
from tests import oracle

from .native_cases import FINE, offered, random_fine_case


@pytest.mark.parametrize("first", range(1000, 1120, 30))
def test_torch_equals_the_oracle(first):
    for number in range(first, first + 30):
        found = random_fine_case(number)
        x, layout, recipe = found.x, found.layout, found.recipe
        if x.numel() > 2000:
            continue
        stream = recipe.stream
        request = recipe.request.numpy()
        want = oracle.quantize(
            x.float().numpy(),
            recipe.role.letter,
            block=layout.block_shape,
            axis=layout.channel_axis,
            **({"lsb": request} if recipe.is_threshold else {"bits": request}),
            least=recipe.least_bits,
            most=recipe.most_bits,
            offered=offered(recipe),
            group=recipe.width_group,
            scope=recipe.scope,
            stream={
                name: getattr(stream, name)
                for name in ("seed", "rank", "backward_count", "call_index", "layer")
            },
            nearest=not recipe.stochastic,
            split=recipe.code == "split",
            scale_bits=recipe.scale_bits,
            signed_x=recipe.force_signed,
        )
        blocks = quantize_in_torch(x, layout, recipe)
        got = blocks.block_tensor()
        for name in ("mantissas", "bits", "signed", "occupied", "scale_exponents"):
            np.testing.assert_array_equal(getattr(want, name), getattr(got, name), str(number))
        np.testing.assert_array_equal(want.negated, header_negated(blocks.headers), str(number))


def test_one_block_by_hand():
    # W, 3 bits: p = 2, e = 0, LSB 1/2, codes -4 .. 3. The largest element is positive, so the block
    # is negated and holds 4 LSBs above, 3 below. 1.97 exceeds 4 LSBs of 1/4 by 3.88, more than the
    # slack of 1.5: 1.97 -> 3.94 -> 4, -1.75 -> -3.5 -> -3 (clipped), .2 -> .4 -> 0, .3 -> .6 -> 1.
    x = torch.zeros(4, 4)
    x[0, :4] = torch.tensor([1.97, -1.75, 0.2, 0.3])
    blocks = quantize(x, 3, role=Role.WEIGHT, code="split")
    assert blocks.scale_exponents.tolist() == [[-1]]
    assert blocks.mantissas[0].tolist() == [4, -3, 0, 1]
    # 1.3 is 5.2 LSBs of 1/4 and exceeds 4 by less than 1.5: the LSB is the finer one.
    x[0, :4] = torch.tensor([1.3, -0.6, 0.2, 0.3])
    blocks = quantize(x, 3, role=Role.WEIGHT, code="split")
    assert blocks.scale_exponents.tolist() == [[-2]]
    assert blocks.mantissas[0].tolist() == [4, -2, 1, 1]


@pytest.mark.parametrize(
    ("largest", "mantissa", "exponent"),
    # Unsigned X of 3 bits holds 7 LSBs, with a slack of half of one: the LSB is the least of
    # 1/8, 5/32, 6/32, 7/32 and 1/4 that is at least largest / 7.5. (0.93: of 1/16 to 1/8.)
    [
        (0.93, 7, -3),
        (1.0, 6 * 5, -5),
        (1.17, 7 * 5, -5),
        (1.18, 6 * 3, -4),
        (1.41, 6 * 7, -5),
        (1.65, 7, -2),
    ],
)
def test_an_lsb_is_a_quarter_step(largest, mantissa, exponent):
    x = torch.zeros(4, 4)
    x[0, 0] = largest
    blocks = quantize(x, 3, role=Role.ACTIVATION, scale_bits=2)
    assert (int(blocks.mantissas[0, 0]), int(blocks.scale_exponents)) == (mantissa, exponent)


@pytest.mark.parametrize("role", list(Role))
def test_only_narrow_blocks_have_a_mantissa_in_their_scale(role):
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    for bits in range(2, 9):
        blocks = quantize(x, bits, role=role, scale_bits=2, block_shape=(8, 8))
        largest = 2 ** (bits - 1) - 1
        scaled = blocks.mantissas.abs().amax() > largest
        assert scaled == (bits <= 5), bits
        assert blocks.mantissas.abs().amax() <= (7 * largest if bits <= 5 else largest)


@pytest.mark.parametrize(("code", "scale_bits"), FINE)
def test_errors_stay_unbiased_and_never_saturate(code, scale_bits):
    torch.manual_seed(0)
    x = torch.randn(8, 8) * torch.exp2(0.7 * torch.randn(8, 8))
    x = torch.where(x.abs() < 0.1, 0.1, x)  # smaller ones round up too rarely to tell in 4000 draws
    total, draws = torch.zeros_like(x).double(), 4000
    squares = torch.zeros_like(total)
    for draw in range(draws):
        stream = StreamPosition(seed=5, backward_count=draw)
        values = quantize(
            x, 2, role=Role.ERROR, code=code, scale_bits=scale_bits, stream=stream
        ).dequantize(torch.float64)
        total += values
        squares += (values - x.double()) ** 2
    deviation = (squares / draws / draws).sqrt()
    assert ((total / draws - x.double()).abs() <= 4.5 * deviation + 1e-12).all()


@pytest.mark.parametrize(
    ("role", "most"),
    [(Role.WEIGHT, {2: 0.5, 3: 0.5, 4: 0.5}), (Role.ERROR, {2: 0.35, 3: 0.45, 4: 0.55})],
)
def test_both_halve_the_noise(role, most):
    torch.manual_seed(0)
    x = torch.randn(256, 256)

    def noise(bits: int, **options: object) -> float:
        return float((quantize(x, bits, role=role, **options).dequantize() - x).square().sum())

    for bits, ratio in most.items():
        assert noise(bits, code="split", scale_bits=2) < ratio * noise(bits)


def test_the_plain_format_is_what_it_was():
    assert not BlockFormat().is_fine
    assert not Recipe(role=Role.WEIGHT, request=torch.tensor(4)).is_fine


def test_layers_train_in_fine_formats():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 4)
    )
    convert(network, mode="exact", code="split", scale_bits=2)
    fast = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 4)
    )
    fast.load_state_dict(network.state_dict())
    convert(fast, mode="fast", code="split", scale_bits=2)
    x = torch.randn(8, 3, 4, 4)
    grads = []
    for net in (network, fast):
        net(x).square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    for exact, close in zip(*grads, strict=True):
        torch.testing.assert_close(exact, close, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code": "signed"}, "code must be one of symmetric, split, not 'signed'"),
        ({"scale_bits": 1}, r"scale_bits must be one of \(0, 2\), not 1"),
        ({"scale_bits": True}, "scale_bits must be one of"),
        ({"scale_bits": 1.0}, r"scale_bits must be one of .*, not 1\.0"),
        ({"scale_bits": None}, r"scale_bits must be one of .*, not None"),
        ({"code": "split", "block_shape": (1, 16)}, r"needs blocks of .*, not \(1, 16\)"),
    ],
)
def test_what_is_no_format_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockFormat(**options)
    if None not in options.values():  # which is the usual ones
        with pytest.raises(ValueError, match=message):
            DynastyPrecision(**options)


def test_what_networks_are_converted_to():
    assert (DynastyPrecision().format.code, DynastyPrecision().format.scale_bits) == ("split", 2)
    for options in ({"block_shape": (1, 32)}, {"code": "symmetric", "scale_bits": 0}):
        assert not DynastyPrecision(**options).format.is_fine


def test_a_map_knows_its_codes(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(8, 4))
    plugin = DynastyPrecision(code="split", scale_bits=2)
    plugin.convert_module(network)
    path = tmp_path / "map.safetensors"
    plugin.precision_map().save(path)
    assert PrecisionMap.load(path, network).structure.code == "split"
    plain = torch.nn.Sequential(torch.nn.Linear(8, 4))
    convert(plain, code="symmetric", scale_bits=0)
    with pytest.raises(ValueError, match=r"made for blocks of .*, code='split', scale_bits=2; "):
        PrecisionMap.load(path, plain)
    DynastyPrecision(code="symmetric", scale_bits=0).convert_module(plain)
    assert "code" not in model_structure(plain).to_json()  # files of before stay what they were


def test_a_checkpoint_keeps_its_codes():
    trained = torch.nn.Sequential(torch.nn.Linear(8, 4))
    plugin = DynastyPrecision(code="split", scale_bits=2)
    plugin.convert_module(trained)
    plugin.apply_map(plugin.precision_map())
    saved = {"state_dict": trained.state_dict(), "DynastyPrecision": plugin.state_dict()}
    network = torch.nn.Sequential(torch.nn.Linear(8, 4))
    load_converted(network, saved, mode="fast")
    assert network[0].format == plugin.format
    x = torch.randn(3, 8)
    assert torch.equal(network.eval()(x), trained.eval()(x))


@pytest.mark.parametrize("shape", [(2, 4), (3, 4), (7, 8), (12, 8), (4, 12)])
@pytest.mark.parametrize(("code", "scale_bits"), [("split", 0), ("split", 2)])
def test_blocks_that_are_not_square_are_refused(shape, code, scale_bits):
    with pytest.raises(ValueError, match=rf"must be one of .*, not \({shape[0]}, {shape[1]}\)"):
        quantize(
            torch.zeros(24, 24),
            4,
            role=Role.WEIGHT,
            block_shape=shape,
            code=code,
            scale_bits=scale_bits,
        )


def test_a_whole_number_of_another_kind_is_one():
    assert type(BlockFormat(scale_bits=np.int64(2)).scale_bits) is int
    assert quantize(torch.ones(4, 4), 4, role=Role.WEIGHT, scale_bits=np.int64(2)).bits.item() == 4


def test_the_core_takes_arrays_of_fine_blocks():
    arrays = quantize(torch.full((4, 4), 8.0), 4, role=Role.WEIGHT, code="split").numpy()
    assert set(arrays["mantissas"].ravel().tolist()) == {8}  # negated codes of -8
    x = quantize(torch.full((4, 4, 1), 9.0), 4, role=Role.ACTIVATION, scale_bits=2).numpy()
    operand = Operand(**{n: v.transpose(0, 2, 1) for n, v in x.items()})
    assert (operand.steps.item(), operand.values()[0, 0, 0]) == (5, 8.75)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("code", "scale_bits"), FINE)
def test_a_compiled_network_computes_what_the_eager_one_does(code, scale_bits):
    torch._dynamo.reset()
    network = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.ReLU(), torch.nn.Linear(10, 6))
    convert(network, mode="exact", code=code, scale_bits=scale_bits)
    x = torch.randn(9, 12)
    expected = network(x)
    assert torch.equal(torch.compile(network)(x), expected)
