"""Fixed-point types from blocks."""

import numpy as np
import pytest

from dynasty_lightning.hardware.hls4ml.types import FixedPoint, last_place_of
from fpga import Operand


def test_last_places_come_from_the_stated_percentile() -> None:
    mantissas = np.ones((4, 1, 16), np.int16)
    mantissas[..., 12:] = 0
    operand = Operand(
        mantissas=mantissas,
        scale_exponents=np.array([[[-3, -7, -5, 0]]]),
        bits=np.array([[[3, 4, 2, 0]]], np.uint8),
        signed=np.array([[[True, True, True, False]]]),
        block_edge=4,
    )
    # non-zero blocks end at 2**-3, 2**-7 and 2**-5: all are met by -7, two of three by -5, one by
    # -3
    assert [last_place_of(operand, p) for p in (100, 60, 40, 1)] == [-7, -5, -5, -3]


@pytest.mark.parametrize(
    ("largest", "last_place", "signed", "text"),
    [
        (0.99, -5, True, "fixed<6,1,RND_CONV,SAT>"),
        (1.0, -5, True, "fixed<7,2,RND_CONV,SAT>"),
        (1.0, -5, False, "ufixed<6,1,RND_CONV,SAT>"),
        (300.0, -20, True, "fixed<24,10,RND_CONV,SAT>"),
        (0.0, -3, False, "ufixed<1,-2,RND_CONV,SAT>"),
        (0.02, -3, True, "fixed<2,-4,RND_CONV,SAT>"),
    ],
)
def test_a_type_holds_its_largest_value(
    largest: float, last_place: int, signed: bool, text: str
) -> None:
    assert str(FixedPoint.spanning(largest, last_place, signed=signed)) == text
