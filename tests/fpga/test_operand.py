"""Operands: what is refused, packing there and back, and corrupt memory."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpga import GemmConfig, Operand, OperandError
from fpga.packing import PackedOperand, pack, segment_words, unpack
from fpga.verify.vectors import random_operand


def same(a: Operand, b: Operand) -> bool:
    live = a.bits > 0
    return (
        np.array_equal(a.mantissas, b.mantissas)
        and np.array_equal(a.bits, b.bits)
        and np.array_equal(a.signed & live, b.signed)
        and np.array_equal(np.where(live, a.scale_exponents, 0), b.scale_exponents)
    )


def plain(**changes: object) -> Operand:
    values = {
        "mantissas": np.ones((4, 1, 8), np.int16),
        "scale_exponents": np.zeros((1, 1, 2), np.int32),
        "bits": np.full((1, 1, 2), 4),
        "signed": np.ones((1, 1, 2), bool),
    }
    return Operand(**(values | changes))


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 70)),
    edge=st.sampled_from([4, 8, 16]),
    tile=st.sampled_from([1, 2, 5, 16]),
    row_exponents=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unpacking_gives_back_what_was_packed(
    shape: tuple[int, int, int], edge: int, tile: int, row_exponents: bool, seed: int
) -> None:
    config = GemmConfig(block_edge=edge, tile=tile, lanes=(1, 1))
    operand = random_operand(
        np.random.default_rng(seed), shape, config, row_exponents=row_exponents
    )
    packed = pack(operand, config)
    assert same(operand, unpack(packed, shape, config, row_exponents=row_exponents))
    segments = segment_words(operand, config)
    assert packed.words.size == segments.size + segments.sum()


def test_memory_follows_the_widths() -> None:
    config = GemmConfig()
    sizes = []
    for width in (0, 2, 4, 8):
        operand = random_operand(np.random.default_rng(0), (64, 4, 64), config, widths=(width,))
        sizes.append(pack(operand, config).words.size)
    # 64 lines of one segment of 16 blocks: a directory word; 4 words of headers and 4 a plane.
    assert sizes == [64, 64 * (1 + 4 + 8), 64 * (1 + 4 + 16), 64 * (1 + 4 + 32)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mantissas": np.ones((4, 8), np.int16)}, r"integers \[rows, positions, channels\]"),
        ({"mantissas": np.ones((4, 1, 8))}, "not float64"),
        ({"mantissas": np.ones((0, 1, 8), np.int16)}, "none empty"),
        (
            {"mantissas": np.full((4, 1, 8), 11, np.int16)},
            r"mantissa 11 at .*\(0, 0, 0\) does not fit 4 signed bits: legal are -8 to 8",
        ),
        (
            {"mantissas": np.full((4, 1, 8), -11, np.int16)},
            "does not fit 4 signed bits",
        ),
        (
            {"mantissas": np.tile(np.array([1, -8, 1, 8], np.int16), (4, 1, 2))},
            r"block \(0, 0, 0\) holds -8 and 8: codes of 4 bits reach one",
        ),
        ({"mantissas": np.full((4, 1, 8), 300, np.int16)}, r"\[-128, 255\]"),
        (
            {"mantissas": np.full((4, 1, 8), -1, np.int16), "signed": np.zeros((1, 1, 2), bool)},
            "4 unsigned bits: legal are 0 to 15",
        ),
        (
            {"bits": np.full((1, 1, 2), 1)},
            r"bits must be 0 or in \[2, 8\], not 1 in block \(0, 0, 0\)",
        ),
        ({"bits": np.full((1, 1, 2), 9)}, "not 9"),
        ({"bits": np.zeros((1, 1, 2), int)}, "does not fit 0"),
        ({"bits": np.full((1, 1, 3), 4)}, r"grid's shape \(1, 1, 2\), not \(1, 1, 3\)"),
        ({"scale_exponents": np.zeros((1, 1, 2))}, "scale_exponents must be integers"),
        (
            {"scale_exponents": np.full((1, 1, 2), 1 << 32)},
            r"scale_exponents must lie in \[-2\*\*20, 2\*\*20\], not 4294967296 to",
        ),
        ({"scale_exponents": np.full((1, 1, 2), -(1 << 20) - 1)}, "not -1048577 to -1048577"),
        (
            {"signed": np.full((1, 1, 2), 0.5)},
            "signed must be true or false for each block, not float64",
        ),
        ({"signed": np.full((1, 1, 2), 2)}, "from 2 to 2"),
    ],
)
def test_illegal_arrays_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OperandError, match=message):
        plain(**changes)


def test_line_blocks_and_other_edges_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="1 x 32 are for emulation only"):
        plain(block_edge=(1, 32))
    with pytest.raises(OperandError, match="blocks of edge 8, not 4"):
        pack(plain(), GemmConfig(block_edge=8))


def test_a_span_of_exponents_beyond_the_header_is_refused() -> None:
    with pytest.raises(OperandError, match="may span 31 binades, not 32"):
        plain(scale_exponents=np.array([[[0, 32]]])).shifts()
    assert plain(scale_exponents=np.array([[[0, 31]]])).shifts().max() == 31


def test_a_width_group_is_held_to_its_contract() -> None:
    config = GemmConfig(width_group=(8, 8))
    bits = np.array([[[4, 6]]])
    with pytest.raises(
        OperandError, match=r"width group 8 x 8 at .*\(0, 0, 0\) holds blocks of different widths"
    ):
        pack(plain(bits=bits), config)
    zero = plain(
        bits=np.array([[[4, 0]]]),
        mantissas=np.repeat([1, 0], 4).reshape(1, 1, 8) * np.ones((4, 1, 1), np.int16),
    )
    pack(zero, config)  # a zero block may lie in any group


def packed_example() -> tuple[Operand, PackedOperand, GemmConfig]:
    config = GemmConfig()
    operand = random_operand(
        np.random.default_rng(3), (5, 2, 70), config, widths=(3, 4, 8), signed=1
    )
    return operand, pack(operand, config), config


@pytest.mark.parametrize("word", range(16))
def test_no_single_corrupt_bit_of_directory_or_headers_goes_unseen(word: int) -> None:
    operand, packed, config = packed_example()
    directory = 8
    for bit in range(64):
        words = packed.words.copy()
        # The directory, then the first segment's headers: 16 blocks in 4 words.
        words[word if word < directory else directory + (word - directory) % 4] ^= np.uint64(
            1 << bit
        )
        corrupt = PackedOperand(words=words, bases=packed.bases)
        try:
            other = unpack(corrupt, operand.shape, config)
        except OperandError:
            continue
        assert not same(operand, other), "a flipped bit was ignored"


def test_truncated_and_overlong_memory_is_refused() -> None:
    operand, packed, config = packed_example()
    for words, message in (
        (packed.words[:-1], "should begin at word"),
        (np.append(packed.words, np.uint64(0)), "1 words follow the last segment"),
        (packed.words[:3], "too few for a directory of 8"),
    ):
        with pytest.raises(OperandError, match=message):
            unpack(replace(packed, words=words), operand.shape, config)


@pytest.mark.parametrize("row_exponents", [False, True])
def test_a_segment_shorter_than_its_headers_is_refused(row_exponents: bool) -> None:
    config = GemmConfig()
    words = np.array(
        [1 << 32 | 1, 0], np.uint64
    )  # one segment, of one word, which holds four headers
    with pytest.raises(OperandError, match="segment 0 of line 0 has 1 words, too few for"):
        unpack(
            PackedOperand(words=words, bases=np.zeros(4 if row_exponents else (), np.int32)),
            (4, 1, 20),
            config,
            row_exponents=row_exponents,
        )


@pytest.mark.parametrize(
    "shape",
    [(1, 1 << 33, -1), (0, 1, 8), (4, 1), (4.0, 1, 8), (True, 1, 8), (1 << 20, 1 << 10, 2), "418"],
)
def test_a_shape_that_no_operand_has_is_refused_before_it_is_believed(shape: object) -> None:
    with pytest.raises(
        OperandError,
        match=r"an operand's shape is rows, positions, channels|an operand of shape .* has",
    ):
        unpack(PackedOperand(words=np.zeros(0, np.uint64), bases=np.int32(0)), shape, GemmConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "bases", "message"),
    [
        (np.zeros(2, np.float64), np.int32(0), "words must be uint64"),
        (np.zeros((2, 1), np.uint64), np.int32(0), "words must be uint64"),
        (np.zeros(1, np.uint64), np.zeros(4, np.int32), r"bases must be integers of shape \(\)"),
        (np.zeros(1, np.uint64), np.float32(0.5), "bases must be integers"),
        (np.zeros(1, np.uint64), np.int64(1 << 33), "bases must lie in"),
    ],
)
def test_words_and_bases_are_what_pack_gives(
    words: np.ndarray, bases: np.ndarray, message: str
) -> None:
    with pytest.raises(OperandError, match=message):
        unpack(PackedOperand(words=words, bases=bases), (4, 1, 8), GemmConfig())


@pytest.mark.parametrize("rows", [False, True])
def test_narrow_blocks_hold_multiples_of_three_five_and_seven(rows: bool) -> None:
    config = GemmConfig()
    grid = (4 if rows else 1, 1, 4)
    codes = np.tile(np.array([7, -8, 1, 0], np.int16), (4, 1, 4))
    mantissas = codes * np.repeat(np.array([1, 3, 5, 7], np.int16), 4)
    operand = plain(
        mantissas=mantissas,
        bits=np.full(grid, 4),
        signed=np.ones(grid, bool),
        scale_exponents=np.zeros(grid, int),
        row_exponents=rows,
    )
    assert (operand.steps == [1, 3, 5, 7]).all()
    np.testing.assert_array_equal(operand.codes, codes)
    packed = pack(operand, config)
    again = unpack(packed, operand.shape, config, row_exponents=rows)
    np.testing.assert_array_equal(again.mantissas, mantissas)
    headers = packed.words[1:].view(np.uint16)[: 16 if rows else 4]
    assert (headers >> 11 & 3).tolist() == np.repeat([0, 1, 2, 3], 4 if rows else 1).tolist()
    # Of six bits and more it is refused, in arrays and in words.
    with pytest.raises(OperandError, match=r"does not fit 6 signed bits: legal are -32 to 32$"):
        plain(
            mantissas=np.full((4, 1, 16), 33),
            bits=np.full(grid, 6),
            signed=np.ones(grid, bool),
            scale_exponents=np.zeros(grid, int),
            row_exponents=rows,
        )
    wide = packed.words.copy()
    wide[1] = (wide[1] & ~np.uint64(0xF)) | np.uint64(6) | np.uint64(1 << 11)
    with pytest.raises(OperandError, match="illegal header"):
        unpack(replace(packed, words=wide), operand.shape, config, row_exponents=rows)


def test_steps_are_the_least_that_will_do() -> None:
    grid = (1, 1, 3)
    mantissas = np.tile(np.array([3, -6, 3, 0, 15, 0, 0, 0, 9, -12, 0, 0], np.int16), (4, 1, 1))
    operand = plain(
        mantissas=mantissas,
        bits=np.array([[[4, 4, 3]]]),
        signed=np.ones(grid, bool),
        scale_exponents=np.zeros(grid, int),
    )
    # 3 and -6 are codes of four bits; 15 is 3 * 5, not a code; 9 and -12 are 3 * 3 and 3 * -4.
    assert operand.steps.tolist() == [[[1, 3, 3]]]


@pytest.mark.parametrize("rows", [False, True])
def test_split_codes_reach_one_end_or_the_other(rows: bool) -> None:
    config = GemmConfig()
    grid = (4 if rows else 1, 1, 2)
    mantissas = np.full((4, 1, 8), -7, np.int16)
    mantissas[1, 0, 1], mantissas[2, 0, 6] = -8, 8  # of the first block, and of the second
    operand = plain(
        mantissas=mantissas,
        bits=np.full(grid, 4),
        signed=np.ones(grid, bool),
        scale_exponents=np.zeros(grid, int),
        row_exponents=rows,
    )
    negated = np.zeros(grid, bool)
    negated[2 if rows else 0, 0, 1] = True
    np.testing.assert_array_equal(operand.negated, negated)
    packed = pack(operand, config)
    again = unpack(packed, operand.shape, config, row_exponents=rows)
    np.testing.assert_array_equal(again.mantissas, mantissas)
    headers = packed.words[1:].view(np.uint16)[: 8 if rows else 2]
    assert (headers >> 10 & 1).tolist() == ([0, 0, 0, 0, 0, 0, 1, 0] if rows else [0, 1])
    # Of unsigned blocks it is refused.
    wrong = packed.words.copy()
    wrong[1] = (wrong[1] & ~np.uint64(1 << 4)) | np.uint64(1 << 10)
    with pytest.raises(OperandError, match="illegal header"):
        unpack(replace(packed, words=wrong), operand.shape, config, row_exponents=rows)
    # A block may carry the flag without need: its planes are read as what they are.
    flagged = packed.words.copy()
    flagged[1] |= np.uint64(1 << 10)
    turned = unpack(replace(packed, words=flagged), operand.shape, config, row_exponents=rows)
    first = (slice(0, 1 if rows else 4), slice(None), slice(0, 4))
    np.testing.assert_array_equal(turned.mantissas[first], -mantissas[first])
