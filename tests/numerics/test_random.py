"""The random stream against the published vectors, a loop in Python, and committed numbers."""

import json
from pathlib import Path

import pytest
import torch

from dynasty_lightning.numerics.random import StreamPosition, philox4x32, stream_numbers
from tests import oracle

# Random123's kat_vectors, philox4x32-10.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "random_stream.json").read_text())


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter, key, words):
    assert tuple(philox4x32(torch.tensor([counter]), key)[0].tolist()) == words
    assert tuple(oracle.philox(counter, key)) == words


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"layer{v['layer']}-code{v['code']}")
def test_committed_stream_numbers(vector):
    fields = {k: vector[k] for k in ("seed", "rank", "backward_count", "call_index", "layer")}
    numbers = stream_numbers(StreamPosition(**fields), vector["code"], max(vector["indices"]) + 1)
    assert numbers[vector["indices"]].tolist() == vector["numbers"]
    assert [oracle.stream_number(i, vector["code"], **fields) for i in vector["indices"]] == vector[
        "numbers"
    ]


def test_a_number_depends_on_its_index_alone():
    position = StreamPosition(seed=3, layer=2)
    long = stream_numbers(position, 2, 300_000)
    assert torch.equal(long[:777], stream_numbers(position, 2, 777))
    torch.set_num_threads(2)
    assert torch.equal(long, stream_numbers(position, 2, 300_000))


@pytest.mark.parametrize("field", ["seed", "rank", "backward_count", "call_index", "layer"])
def test_every_field_changes_the_stream(field):
    base = stream_numbers(StreamPosition(), 2, 4096)
    other = stream_numbers(StreamPosition(**{field: 1}), 2, 4096)
    assert (base == other).float().mean() < 0.01
    with pytest.raises(ValueError, match=f"{field} must fit"):
        StreamPosition(**{field: -1})


def test_numbers_are_uniform():
    numbers = stream_numbers(StreamPosition(seed=11), 2, 1_000_000).double()
    # 4 standard errors of the mean and of each bit's frequency.
    assert abs(float(numbers.mean()) - 32767.5) < 4 * 65536 / 12**0.5 / 1000
    for bit in range(16):
        share = float(((numbers.long() >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 4 * 0.5 / 1000, bit
