"""The core as a layer of hls4ml, equal to the bit to the C simulation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynasty_lightning.hardware.hls4ml.layer import DynamicGemm, register
from dynasty_lightning.hardware.hls4ml.types import FixedPoint
from fpga import GemmConfig, GemmJob, Geometry, Operand, open_device
from fpga.network.program import GemmLayer
from fpga.quantizer import ActivationRequest
from tests.waiting import HANG_S

# hls4ml leaves its list of boards open.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*supported_boards.json:pytest.PytestUnraisableExceptionWarning"
)

Array = np.ndarray[Any, Any]


def random_weight(
    rng: np.random.Generator, shape: tuple[int, int, int], edge: int, *, one_width: bool = False
) -> Operand:
    rows, taps, channels = shape
    grid = (-(-rows // edge), taps, -(-channels // edge))
    bits = rng.choice([4] if one_width else [0, 2, 3, 4, 6, 8], grid).astype(np.uint8)
    limit = np.repeat(
        np.repeat((1 << np.maximum(bits.astype(int) - 1, 0)) - 1, edge, 0)[:rows], edge, 2
    )[:, :, :channels]
    live = bits > 0
    # Half of the blocks reach the end that is stored as its negative.
    most = (
        limit
        + np.repeat(np.repeat(live & (rng.random(grid) < 0.5), edge, 0)[:rows], edge, 2)[
            :, :, :channels
        ]
    )
    mantissas = np.where(rng.random(limit.shape) < 0.2, most, rng.integers(-limit, limit + 1))
    mantissas = mantissas.astype(np.int16)
    return Operand(
        mantissas=mantissas,
        scale_exponents=np.where(live, rng.integers(-12, -6, grid), 0),
        bits=bits,
        signed=live,
        block_edge=edge,
    )


def random_request(
    rng: np.random.Generator, kind: str, positions: int, blocks: int
) -> ActivationRequest:
    if kind == "uniform":
        return ActivationRequest(values=np.full((1, 1, 1), 5), is_threshold=False)
    if kind == "widths":
        return ActivationRequest(
            values=rng.choice([0, 2, 3, 4, 5, 6, 7, 8], (1, positions, blocks)), is_threshold=False
        )
    if kind == "widths, split":
        return replace(random_request(rng, "widths", positions, blocks), code="split", scale_bits=2)
    if kind.startswith("thresholds, split"):
        return ActivationRequest(
            values=rng.integers(-8, 3, (1, 1, blocks)),
            is_threshold=True,
            least_bits=2 if kind.endswith("on offer") else 0,
            code="split",
            scale_bits=2 if kind.endswith("on offer") else 0,
            offered_bits=(4, 6, 8) if kind.endswith("on offer") else (),
        )
    least = 2 if kind == "thresholds, least 2" else 0
    return ActivationRequest(
        values=rng.integers(-8, 3, (1, 1, blocks)), is_threshold=True, least_bits=least, most_bits=7
    )


def random_inputs(rng: np.random.Generator, shape: tuple[int, ...], precision: FixedPoint) -> Array:
    """Values of the type, over its whole range of magnitudes, with zeros, the extremes, and samples
    without negative values.
    """
    unit = 2.0**precision.last_place
    largest = 2.0 ** (precision.integer - 1) - unit
    scale = 2.0 ** rng.integers(
        precision.last_place, precision.integer, (shape[0], *[1] * (len(shape) - 1))
    )
    x = np.round(rng.normal(size=shape) * scale * 2.0 ** rng.integers(-10, 1, shape) / unit) * unit
    x[rng.random(shape) < 0.2] = 0
    x[::3] = np.abs(x[::3])
    x[1, ..., :5] = 0
    x[2] = 0
    x = x.clip(-largest, largest)
    x[3].reshape(-1)[::7] = -(2.0 ** (precision.integer - 1))
    return x.astype(np.float32)


def simulate(
    network: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    types: dict[str, str],
    *,
    io_type: str,
    backend: str,
) -> Any:
    config = hls4ml.utils.config_from_pytorch_model(
        network,
        (None, *shape),
        granularity="name",
        backend=backend,
        channels_last_conversion="internal",
        transpose_outputs=False,
    )
    for name, precision in types.items():
        config["LayerName"][name]["Precision"]["result"] = precision
        config["LayerName"][name]["Trace"] = True
    model = hls4ml.converters.convert_from_pytorch_model(
        network,
        output_dir=str(folder),
        project_name="core",
        backend=backend,
        io_type=io_type,
        hls_config=config,
    )
    model.compile()
    return model


def by_csim(layer: DynamicGemm, x: Array) -> Array:
    """float32 [N, positions, out] of [N, in, *positions], on the C simulation."""
    operand = layer.layer.operand(x, layer.config)
    with open_device("csim", layer.config) as device:
        result = device.run(
            GemmJob(a=operand, b=layer.layer.weight, geometry=layer.geometry), timeout_s=HANG_S
        )
    return result.values + layer.bias_values


CASES = {
    "conv, thresholds, stream": (GemmConfig(), "thresholds", (21, 19), "io_stream", "Vitis"),
    "conv, widths, edge 8, tile 2": (
        GemmConfig(block_edge=8, tile=2, lanes=(2, 1)),
        "widths",
        (37, 18),
        "io_parallel",
        "Vitis",
    ),
    "conv, width groups, accelerator": (
        GemmConfig(width_group=(8, 16)),
        "thresholds, least 2",
        (40, 16),
        "io_stream",
        "VivadoAccelerator",
    ),
    "conv, edge 16, tile 1": (
        GemmConfig(block_edge=16, tile=1, lanes=(1, 1)),
        "widths",
        (20, 33),
        "io_parallel",
        "Vivado",
    ),
    "conv, split codes, edge 8": (
        GemmConfig(block_edge=8, lanes=(2, 1)),
        "thresholds, split, on offer",
        (21, 19),
        "io_stream",
        "Vitis",
    ),
    "conv, split codes of given widths": (
        GemmConfig(),
        "widths, split",
        (13, 8),
        "io_parallel",
        "Vivado",
    ),
    "linear, split codes": (GemmConfig(), "thresholds, split", (70, 33), "io_stream", "Vitis"),
    "linear, uniform": (GemmConfig(), "uniform", (150, 10), "io_parallel", "Vitis"),
    "linear, thresholds, stream": (GemmConfig(), "thresholds", (70, 33), "io_stream", "Vivado"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_hls4ml_equals_the_c_simulation_to_the_bit(name: str, tmp_path: Path) -> None:
    config, kind, (channels, out), io_type, backend = CASES[name]
    rng = np.random.default_rng(len(name))
    is_conv = name.startswith("conv")
    geometry = (
        Geometry(input=(7, 6), output=(4, 3), taps=(3, 3), stride=(2, 2), padding=(1, 1))
        if is_conv
        else None
    )
    positions, blocks = (
        (42, -(-channels // config.block_edge))
        if is_conv
        else (1, -(-channels // config.block_edge))
    )
    weight = random_weight(
        rng,
        (out, 9 if is_conv else 1, channels),
        config.block_edge,
        one_width=config.width_group is not None,
    )
    request = random_request(rng, kind, positions, blocks)
    bias = rng.normal(size=out).astype(np.float32)
    layer = DynamicGemm(
        GemmLayer("conv" if is_conv else "linear", weight, bias, request),
        geometry=geometry,
        config=config,
    )
    shape = (channels, 7, 6) if is_conv else (channels,)
    given = FixedPoint(20, 7, True)
    x = random_inputs(rng, (60, *shape), given)
    expected = by_csim(layer, x)
    assert len(np.unique(expected)) > 100, "the case computes something"
    with torch.no_grad():
        module = layer(torch.from_numpy(x)).numpy()
    assert np.array_equal(np.moveaxis(module.reshape(60, out, -1), 1, -1), expected), (
        "the module's own forward"
    )

    register(config)
    types = {"x": str(given), "core": "fixed<64,24>"}  # finer than any result here

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = layer

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.core(x)
            return result

    model = simulate(
        Network(), shape, tmp_path / "project", types, io_type=io_type, backend=backend
    )
    got = model.predict(np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    assert np.array_equal(got.reshape(expected.shape), expected)


def test_a_network_with_both_kinds_of_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    config = GemmConfig()
    geometry = Geometry(input=(6, 6), output=(6, 6), taps=(3, 3), stride=(1, 1), padding=(1, 1))
    request = ActivationRequest(values=np.full((1, 1, 1), -5), is_threshold=True)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = DynamicGemm(
                GemmLayer("conv", random_weight(rng, (12, 9, 3), 4), None, request),
                geometry=geometry,
                config=config,
            )
            self.rectify = nn.ReLU()
            self.pool = nn.AvgPool2d(6)
            self.flat = nn.Flatten()
            self.second = DynamicGemm(
                GemmLayer("linear", random_weight(rng, (9, 1, 12), 4), None, request),
                geometry=None,
                config=config,
            )
            self.last = nn.Linear(9, 5)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(
                self.second(self.flat(self.pool(self.rectify(self.first(x)))))
            )
            return result

    network = Network().eval()
    register(config)
    types = {
        "x": "fixed<16,4>",
        "first": "fixed<40,20>",
        "rectify": "ufixed<22,8,RND_CONV,SAT>",
        "pool": "ufixed<22,8,RND_CONV,SAT>",
        "flat": "ufixed<22,8,RND_CONV,SAT>",
        "second": "fixed<40,20>",
        "last": "fixed<32,16>",
    }
    model = simulate(
        network, (3, 6, 6), tmp_path / "project", types, io_type="io_stream", backend="Vitis"
    )
    x = random_inputs(rng, (20, 3, 6, 6), FixedPoint(16, 4, True))
    result, traced = model.trace(np.ascontiguousarray(np.moveaxis(x, 1, -1)))
    assert np.array_equal(traced["first"].reshape(20, 36, 12), by_csim(network.first, x))
    pooled = traced["pool"].reshape(20, 12).astype(np.float32)
    assert pooled.any()
    assert np.array_equal(traced["second"].reshape(20, 1, 9), by_csim(network.second, pooled))
    with torch.no_grad():
        expected = network.last(
            torch.from_numpy(traced["second"].reshape(20, 9).astype(np.float32))
        ).numpy()
    # hls4ml's own layer keeps its default weights here: close, not equal.
    assert np.abs(result.reshape(20, 5) - expected).max() < 0.02 * max(1.0, np.abs(expected).max())


def test_what_no_layer_can_be_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(rng, (8, 1, 8), 4)
    request = ActivationRequest(values=np.full((1, 1, 1), 8), is_threshold=False)
    wide = Operand(
        mantissas=np.full((4, 1, 1 << 16), 127, np.int16),
        scale_exponents=np.broadcast_to(
            np.array([0, *[24] * ((1 << 14) - 1)]), (1, 1, 1 << 14)
        ).astype(np.int32),
        bits=np.full((1, 1, 1 << 14), 8, np.uint8),
        signed=np.ones((1, 1, 1 << 14), np.bool_),
        block_edge=4,
    )
    with pytest.raises(ValueError, match=r"2\*\*47 or more: it cannot be a layer of hls4ml"):
        DynamicGemm(GemmLayer("linear", wide, None, request), geometry=None, config=GemmConfig())

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = DynamicGemm(
                GemmLayer("linear", weight, None, request), geometry=None, config=GemmConfig()
            )

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.core(x)
            return result

    with pytest.raises(ValueError, match="a linear layer takes no geometry"):
        DynamicGemm(
            GemmLayer("linear", weight, None, request), geometry=Geometry(), config=GemmConfig()
        )
    register(GemmConfig(tile=8))
    with pytest.raises(ValueError, match="call register"):
        simulate(
            Network(),
            (8,),
            tmp_path / "p",
            {"x": "fixed<20,8>", "core": "fixed<40,20>"},
            io_type="io_parallel",
            backend="Vitis",
        )
    register(GemmConfig())
    with pytest.raises(ValueError, match="takes fixed-point activations of up to 24 bits"):
        simulate(
            Network(),
            (8,),
            tmp_path / "p",
            {"x": "fixed<30,8>", "core": "fixed<40,20>"},
            io_type="io_parallel",
            backend="Vitis",
        )
