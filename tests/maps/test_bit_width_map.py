"""Bit-width maps: figures, what comes back, what is refused."""

import pytest
import torch

from dynasty_lightning import BitWidthMap, PrecisionMap
from dynasty_lightning.maps import file
from dynasty_lightning.maps.structure import ModelStructure
from tests.maps.examples import LAYERS, STRUCTURE, E, W, X, snapshot


def test_bit_width_map_figures():
    widths = snapshot()
    assert widths.histogram(X) == {0: 1, 2: 1, 3: 5, 4: 0, 5: 0, 6: 0, 7: 0, 8: 2}
    assert widths.mean_bits(X) == pytest.approx((0 + 2 + 8 + 8 + 5 * 3) / 9)
    assert widths.zero_share(X) == pytest.approx(1 / 9)
    assert (widths.mean_bits(W), widths.zero_share(W)) == (4.0, 0.0)
    assert (widths.mean_bits(E), widths.zero_share(E)) == (0.0, 0.0)


def test_bit_width_map_round_trip(tmp_path):
    original = snapshot()
    original.save(tmp_path / "widths")
    loaded = BitWidthMap.load(tmp_path / "widths", STRUCTURE)
    assert {n: set(r) for n, r in loaded.bits.items()} == {
        n: set(r) for n, r in original.bits.items()
    }
    assert all(
        torch.equal(g, loaded.bits[n][r])
        for n, roles in original.bits.items()
        for r, g in roles.items()
    )
    with pytest.raises(
        ValueError,
        match="holds 'dynasty-lightning/bit-width-map', not 'dynasty-lightning/precision-map'",
    ):
        PrecisionMap.load(tmp_path / "widths")
    with pytest.raises(ValueError, match="another model"):
        BitWidthMap.load(tmp_path / "widths", ModelStructure(layers={"head": LAYERS["head"]}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head/X/bits", torch.full((1, 5), 1, dtype=torch.uint8), "must hold uint8 widths"),
        ("head/X/bits", torch.full((1, 5), 9, dtype=torch.uint8), "must hold uint8 widths"),
        ("head/X/bits", torch.full((1, 5), 4, dtype=torch.int16), "not torch.int16"),
        ("head/X/bits", torch.full((1, 1), 4, dtype=torch.uint8), "does not fit its grid"),
        ("head/X/lsb_exponent", torch.full((1, 5), 4, dtype=torch.int16), "no grid of widths"),
        ("body/X/bits", torch.full((1, 5), 4, dtype=torch.uint8), "which the model lacks"),
    ],
)
def test_bad_bit_width_maps(tmp_path, key, value, message):
    path = tmp_path / "widths"
    file.write(path, {key: value}, file.render_header("dynasty-lightning/bit-width-map", STRUCTURE))
    with pytest.raises(ValueError, match=message) as caught:
        BitWidthMap.load(path)
    assert str(path) in str(caught.value)


def test_truncated_bit_width_map(tmp_path):
    path = tmp_path / "widths"
    snapshot().save(path)
    data = path.read_bytes()
    for size in range(0, len(data), 64):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError):
            BitWidthMap.load(path)
