"""hls4ml both ways: the core as its layer, equal to the bit to the C simulation, and networks as
its projects.
"""

import ctypes
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynasty_lightning.cli import main
from dynasty_lightning.hardware.hls4ml import project as hls4ml_export
from dynasty_lightning.hardware.hls4ml.layer import DynamicGemm, register
from dynasty_lightning.hardware.hls4ml.project import (
    FixedPoint,
    Hls4mlExportError,
    choose_types,
    export_hls4ml,
    last_place_of,
    plain_network,
    trace_apart,
)
from dynasty_lightning.hardware.program import export_program
from dynasty_lightning.nn.convert import convert
from fpga import GemmConfig, GemmJob, Geometry, Operand, open_device
from fpga.network.program import GemmLayer, Program
from fpga.network.runner import Runner
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
    mantissas = rng.integers(-limit, limit + 1).astype(np.int16)
    live = bits > 0
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
    types = {"x": str(given), "core": "fixed<64,32>"}

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


def program_of(network: nn.Module, shape: tuple[int, ...]) -> Program:
    convert(network, mode="exact")
    return export_program(network.eval(), shape)


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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained residual network on real digits, with images."""
    folder = tmp_path_factory.mktemp("hls4ml") / "run"
    arguments = [
        "demo",
        "--epochs",
        "3",
        "--methods",
        "dynasty",
        "--seeds",
        "1",
        "--checkpoints",
        "--no-csim",
        "--threads",
        "1",
    ]
    assert main([*arguments, "--out", str(folder)]) == 0
    program = folder / "program"
    assert (
        main(
            [
                "export",
                "--checkpoint",
                str(folder / "checkpoint-dynasty-0.ckpt"),
                "--out",
                str(program),
                "--images",
                "100",
            ]
        )
        == 0
    )
    return program


def test_the_plain_network_computes_with_our_weights(exported: Path) -> None:
    program = Program.load(exported)
    images = np.load(exported / "images.npz")["images"][:50]
    with open_device("reference", program.config) as device:
        runner = Runner(program, device)
        # a program whose activations have 8 bits everywhere is close to the plain network, which
        # does not quantize them
        for name, layer in runner.layers.items():
            request = ActivationRequest(values=np.full((1, 1, 1), 8), is_threshold=False)
            runner.layers[name] = replace(layer, request=request)
        network, _ = plain_network(program, runner)
        ours = runner(images)
    with torch.no_grad():
        plain = network(torch.from_numpy(images)).numpy()
    assert np.abs(plain - ours).max() < 0.05 * np.abs(ours).max()
    assert (plain.argmax(1) == ours.argmax(1)).all()


def test_projects_classify_as_our_program_does(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export-hls4ml", "--program", str(exported), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["backends"]) == {"vitis", "vivado-accelerator"}
    program = Program.load(exported)
    for backend, result in report["backends"].items():
        assert f"{backend}: 100 test images, accuracy" in text
        assert result["agreement"] >= 0.9
        assert abs(result["accuracy"] - report["accuracy"]) <= 0.05
        assert [layer["name"] for layer in result["layers"]] == [
            step["name"] for step in program.steps
        ]
        assert all(layer["signal_to_difference_db"] > 8 for layer in result["layers"])
        project = tmp_path / backend
        assert (project / "firmware/network.cpp").is_file()
        assert (project / "build_prj.tcl").is_file()
    board = (tmp_path / "vivado-accelerator/project.tcl").read_text()
    assert "xc7z020clg400-1" in board, "the part of the PYNQ-Z2"
    assert (
        report["backends"]["vitis"]["layers"] == report["backends"]["vivado-accelerator"]["layers"]
    )


def test_the_network_runs_on_the_core_inside_hls4ml_and_coarser_percentiles_differ_more(
    exported: Path, tmp_path: Path
) -> None:
    program = Program.load(exported)
    archive = np.load(exported / "images.npz")
    images, labels = archive["images"][:40], archive["labels"][:40]
    with (tmp_path / "text").open("w") as stream:
        settings: Any = {"backends": ("vitis",), "stream": stream}
        fine = export_hls4ml(program, images, labels, tmp_path / "fine", core=("all",), **settings)
        coarse = export_hls4ml(
            program, images, labels, tmp_path / "coarse", percentile=20, **settings
        )
    layers = fine["backends"]["vitis"]["layers"]
    assert all(layer["on_core"] for layer in layers if layer["op"] in ("conv", "linear"))
    assert fine["backends"]["vitis"]["agreement"] >= 0.9
    first = layers[0]["signal_to_difference_db"]
    assert first is None or first > 30, "the first layer differs by its result's rounding only"
    assert coarse["backends"]["vitis"]["layers"][0]["signal_to_difference_db"] < 30


@pytest.mark.parametrize(
    ("between", "features"),
    [((nn.AdaptiveAvgPool2d(1),), 4), ((nn.MaxPool2d(2),), 36)],
    ids=["pooled", "map"],
)
def test_a_head_behind_a_flatten_reads_the_feature_map_in_torchs_order(
    between: tuple[nn.Module, ...], features: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), *between, nn.Flatten(), nn.Linear(features, 5)
    )
    program = program_of(network, (1, 8, 8))
    images = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        labels = network(images).numpy().argmax(axis=1)
    with (tmp_path / "text").open("w") as stream:
        report = export_hls4ml(
            program, images.numpy(), labels, tmp_path / "out", backends=("vitis",), stream=stream
        )
    layers = report["backends"]["vitis"]["layers"]
    assert [layer["op"] for layer in layers][-2:] == ["flatten", "linear"]
    assert all(layer["signal_to_difference_db"] > 30 for layer in layers)


@pytest.mark.parametrize("on_core", [True, False], ids=["core", "plain"])
@pytest.mark.parametrize("groups", [4, 1], ids=["grouped", "whole"])
def test_a_convolution_is_exact_for_the_input_that_hls4ml_stores(
    groups: int, on_core: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grouped ones, whose weights have zeros between groups, as others: to the bit. What differs
    from ours is that hls4ml rounds the image
    first: on the core that is a second rounding, which moves those that it puts half-way between
        two steps of a coarser block."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=groups),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    program = program_of(network, (8, 6, 6))
    images = torch.randn(4, 8, 6, 6).numpy()
    with open_device("reference", program.config) as device:
        runner = Runner(program, device)
        input_type, types = choose_types(runner, images, percentile=100.0)
        stored = input_type.stored(images)
        ours, again = runner.trace(images)["0"], runner.trace(stored.astype(np.float32))["0"]
        weight, bias = (
            types["0"].constants[k].stored(v)
            for k, v in (("weight", full_weight(runner)), ("bias", runner.layers["0"].bias))
        )
    exact = nn.functional.conv2d(
        *(torch.from_numpy(a) for a in (stored, weight, bias)), padding=1
    ).numpy()
    kept = []
    monkeypatch.setattr(
        hls4ml_export,
        "trace_apart",
        lambda *arguments: kept.append(trace_apart(*arguments)) or kept[0],
    )
    with (tmp_path / "t").open("w") as stream:
        settings: Any = {
            "core": ("0",) if on_core else (),
            "backends": ("vitis",),
            "stream": stream,
        }
        report = export_hls4ml(program, images, np.zeros(4, np.int64), tmp_path / "out", **settings)
    theirs = np.moveaxis(kept[0][1]["conv0"].reshape(4, 6, 6, 8), -1, 1)
    assert np.array_equal(theirs, types["0"].result.stored(again if on_core else exact))
    assert 40 < report["backends"]["vitis"]["layers"][0]["signal_to_difference_db"] < 60
    assert not np.array_equal(ours, again), "the second rounding"


def full_weight(runner: Runner) -> Array:
    """The first layer's weight as a convolution of all channels."""
    return np.ascontiguousarray(
        np.moveaxis(runner.layers["0"].weight.values(), 2, 1).reshape(8, 8, 3, 3)
    )


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        (nn.Conv3d(2, 4, 3), (2, 5, 5, 5), "works on 3 axes"),
        (nn.Conv2d(2, 4, 3, dilation=2), (2, 9, 9), r"dilated by \[2, 2\]"),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.MaxPool2d(3, 2, 1)), (2, 8, 8), "pads a max pooling"),
        (nn.Linear(4, 4), (3, 4), "a linear layer over 2 axes"),
        (
            nn.Sequential(nn.Conv2d(2, 4, 1), nn.MaxPool2d(3, 2)),
            (2, 9, 9),
            r"pools \[3, 3\] at stride \[2, 2\]; hls4ml's streams need them equal",
        ),
        (nn.Sequential(nn.Conv2d(2, 4, 1), nn.AvgPool2d(2, 2, 1)), (2, 8, 8), "pools with padding"),
        (
            nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU6()),
            (2, 8, 8),
            "is a clip, which has no layer of hls4ml here",
        ),
    ],
)
def test_steps_without_a_layer_in_hls4ml_are_named(
    network: nn.Module, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    program = program_of(nn.Sequential(network), shape)
    images = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    with (tmp_path / "t").open("w") as stream, pytest.raises(Hls4mlExportError, match=message):
        export_hls4ml(program, images, np.zeros(4, np.int64), tmp_path / "out", stream=stream)


class Aborts:
    """As a compiled model of hls4ml whose C++ meets an assertion."""

    def trace(self, images: Array) -> Array:
        if images.any():
            ctypes.CDLL(None).abort()
        raise ValueError("no image")


def test_an_assertion_of_the_tools_code_ends_its_own_process_alone(tmp_path: Path) -> None:
    log = tmp_path / "vitis.log"
    log.write_text("nnet_pooling.h:309: Assertion `stride == pool' failed.\n")
    with pytest.raises(
        Hls4mlExportError,
        match=r"ended with SIGABRT: .*Assertion `stride == pool' failed.*vitis\.log",
    ):
        trace_apart(Aborts(), np.ones(1), log)
    with pytest.raises(Hls4mlExportError, match="simulation failed: no image"):
        trace_apart(Aborts(), np.zeros(1), log)


def test_without_a_compiler_the_way_out_is_named(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program.load(exported)
    images = np.zeros((1, *program.input_shape), np.float32)
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        (tmp_path / "t").open("w") as stream,
        pytest.raises(Hls4mlExportError, match=r"apt-get install g\+\+"),
    ):
        export_hls4ml(program, images, np.zeros(1, np.int64), tmp_path / "out", stream=stream)


def test_wrong_arguments_name_the_way_out(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["export-hls4ml", "--program", str(exported), "--out", str(tmp_path / "o")]
    for wrong, message in (
        (["--percentile", "0"], "percentile must lie in (0, 100], not 0.0"),
        (["--core", "nothing"], "no conv or linear step 'nothing' to run on the core: stem,"),
        (["--images", "0"], "--images must be at least 1"),
        (["--backend", "quartus"], "invalid choice: 'quartus'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*base, *wrong])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export-hls4ml", "--program", str(tmp_path), "--out", str(tmp_path / "o")])
    assert "name a folder that `dynasty-lightning export` wrote" in capsys.readouterr().err
