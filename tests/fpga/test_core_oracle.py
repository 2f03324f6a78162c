"""The oracle itself: against float32 of the processor, torch's convolutions, and cases worked by
hand.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch

from fpga import GemmConfig, GemmJob, Geometry, Operand
from fpga.packing import pack
from fpga.verify.vectors import random_jobs, random_operand
from fpga.walk import Walk

from . import core_oracle


@pytest.mark.parametrize(
    "scale", [-1000, -170, -149, -148, -130, -126, -30, 0, 90, 103, 104, 105, 127, 500]
)
def test_rounding_is_that_of_the_processor(scale: int) -> None:
    rng = np.random.default_rng(scale + 1000)
    values = [
        1,
        2,
        3,
        (1 << 24) - 1,
        (1 << 24) + 1,
        (1 << 25) + 3,
        (1 << 46) - 1,
        (1 << 23) * 3 + 1,
        0xFFFFFF8,
        0xFFFFFF7,
    ]
    values += [int(rng.integers(1, 1 << int(b))) for b in rng.integers(1, 47, size=200)]
    for value in values:
        for signed in (value, -value):
            with np.errstate(over="ignore", under="ignore"):
                # float64 holds value * 2**scale exactly where float32 is not 0 or Inf anyway.
                expected = (np.ldexp(np.float64(signed), scale)).astype(np.float32) + np.float32(0)
            assert core_oracle.float32_bits(signed * Fraction(2) ** scale) == int(
                expected.view(np.uint32)
            ), (signed, scale)


@pytest.mark.parametrize(
    ("name", "gemm"),
    [
        (n, g)
        for n in ("3x3, padding 1", "3x3, stride 2", "5, dilation 2", "1x1, stride 2")
        for g in ("forward", "dgrad", "wgrad")
    ],
)
def test_convolutions_are_torchs(name: str, gemm: str) -> None:
    job = next(j for n, j in random_jobs(GemmConfig()) if n == f"{name}, {gemm}")
    g = job.geometry

    def tensor(operand: Operand, spatial: tuple[int, ...]) -> torch.Tensor:
        exponents = np.repeat(np.repeat(operand.scale_exponents, 4, 0), 4, 2)[
            : operand.shape[0], :, : operand.shape[2]
        ]
        values = np.ldexp(operand.mantissas.astype(np.float64), exponents)
        return (
            torch.from_numpy(values)
            .movedim(2, 1)
            .reshape(operand.shape[0], operand.shape[2], *spatial)
        )

    arguments = (g.stride, g.padding, g.dilation)
    if gemm == "forward":
        expected = torch.nn.functional.conv3d(
            tensor(job.a, g.input), tensor(job.b, g.taps), None, *arguments
        )
    else:
        e = tensor(job.a, g.output)
        x = (
            tensor(job.b, g.input)
            if gemm == "wgrad"
            else torch.zeros(job.rows, job.in_channels, *g.input, dtype=torch.float64)
        )
        w = (
            tensor(job.b, g.taps)
            if gemm == "dgrad"
            else torch.zeros(job.out_channels, job.in_channels, *g.taps, dtype=torch.float64)
        )
        x.requires_grad_()
        w.requires_grad_()
        torch.nn.functional.conv3d(x, w, None, *arguments).backward(e)
        expected = x.grad if gemm == "dgrad" else w.grad
    flat = expected.flatten(2).movedim(1, 2)
    for key, value in core_oracle.gemm(job).items():
        assert float(value) == float(flat[key])


def test_packing_by_hand() -> None:
    """One row block, two channel blocks of widths 2 and 0: a directory word, a word of headers, a
    word of two planes.
    """
    mantissas = np.zeros((4, 1, 8), np.int16)
    mantissas[0, 0, 0], mantissas[1, 0, 2] = 1, -1
    operand = Operand(
        mantissas=mantissas,
        scale_exponents=np.array([[[-3, 0]]]),
        bits=np.array([[[2, 0]]]),
        signed=np.array([[[True, False]]]),
    )
    expected = [1 | 2 << 32, 2 | 1 << 4 | 0 << 5, (1 | 1 << 6) | (1 << 6) << 16]
    assert core_oracle.pack(operand, 16) == expected
    assert core_oracle.bases(operand) == -3


def test_cycles_by_hand() -> None:
    """Two rows of blocks of A (3 and 2 bits), one of B (4 bits), k of one block, two lanes along m:
    the longer lane counts.
    """
    a = Operand(
        mantissas=np.ones((8, 1, 4), np.int16),
        scale_exponents=np.zeros((2, 1, 1), int),
        bits=np.array([[[3]], [[2]]]),
        signed=np.ones((2, 1, 1), bool),
    )
    b = Operand(
        mantissas=np.ones((4, 1, 4), np.int16),
        scale_exponents=np.zeros((1, 1, 1), int),
        bits=np.array([[[4]]]),
        signed=np.ones((1, 1, 1), bool),
    )
    job = GemmJob(a=a, b=b)
    # fill 2, then max(3 * 4, 2 * 4) + 4 to drain, then 2 blocks of 4 rows.
    assert core_oracle.registers(job, 2, (2, 1), raw=False)[0] == 2 + 16 + 8
    # One lane: both products one after the other.
    assert core_oracle.registers(job, 2, (1, 1), raw=False)[0] == 2 + 24 + 8
    # Words of A: two lines of a directory word, a header word and a word of planes; of B: one.
    assert core_oracle.registers(job, 2, (1, 1), raw=False)[1:] == (6, 3, 32)


@pytest.mark.parametrize("row_exponents", [False, True])
@pytest.mark.parametrize("edge", [4, 8, 16])
def test_packing_equals_the_packer(edge: int, row_exponents: bool) -> None:
    for seed, shape in enumerate([(5, 2, 37), (1, 1, 1), (17, 3, 16), (4, 1, 70)]):
        config = GemmConfig(block_edge=edge, tile=3, lanes=(1, 1))
        operand = random_operand(
            np.random.default_rng(seed), shape, config, row_exponents=row_exponents
        )
        packed = pack(operand, config)
        assert packed.words.tolist() == core_oracle.pack(operand, 3)
        assert packed.bases.tolist() == core_oracle.bases(operand)


def test_the_walk_visits_every_product_once() -> None:
    config = GemmConfig(tile=3, lanes=(1, 1))
    for name, job in random_jobs(config):
        tiles = list(core_oracle.walk(job, config.tile))
        assert len(tiles) == Walk(job, config).output_tiles, name
        assert all(len(steps) == Walk(job, config).steps for steps, _ in tiles), name


def test_geometry_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"stride must lie in \[1, 16777216\), not \(0,\)"):
        Geometry(input=(3,), output=(3,), stride=(0,))
    with pytest.raises(ValueError, match="takes up to 3"):
        Geometry(input=(3, 3, 3, 3))
    with pytest.raises(ValueError, match="needs input and padding beyond"):
        Geometry(input=(3,), output=(5,), taps=(3,))
