"""Networks as projects of hls4ml, against the program that they are made of."""

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dynasty_lightning.cli import main
from dynasty_lightning.hardware.hls4ml import project as hls4ml_project
from dynasty_lightning.hardware.hls4ml.network import plain_network
from dynasty_lightning.hardware.hls4ml.project import export_hls4ml, trace_apart
from dynasty_lightning.hardware.hls4ml.types import Hls4mlExportError, choose_types
from dynasty_lightning.hardware.program import export_program
from dynasty_lightning.nn.convert import convert
from fpga import open_device
from fpga.network.runner import Program, Runner
from fpga.quantizer import ActivationRequest

# hls4ml leaves its list of boards open.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*supported_boards.json:pytest.PytestUnraisableExceptionWarning"
)

Array = np.ndarray[Any, Any]


def program_of(network: nn.Module, shape: tuple[int, ...]) -> Program:
    convert(network, mode="exact")
    return export_program(network.eval(), shape)


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
        own = runner(images)
    with torch.no_grad():
        plain = network(torch.from_numpy(images)).numpy()
    assert np.abs(plain - own).max() < 0.05 * np.abs(own).max()
    assert (plain.argmax(1) == own.argmax(1)).all()


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
    from own is that hls4ml rounds the image
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
        own, again = runner.trace(images)["0"], runner.trace(stored.astype(np.float32))["0"]
        weight, bias = (
            types["0"].constants[k].stored(v)
            for k, v in (("weight", full_weight(runner)), ("bias", runner.layers["0"].bias))
        )
    exact = nn.functional.conv2d(
        *(torch.from_numpy(a) for a in (stored, weight, bias)), padding=1
    ).numpy()
    kept = []
    monkeypatch.setattr(
        hls4ml_project,
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
    assert not np.array_equal(own, again), "the second rounding"


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


def test_without_hls4ml_the_extra_is_named_and_the_rest_works() -> None:
    code = (
        "import sys; sys.modules['hls4ml'] = None\n"
        "from dynasty_lightning.hardware.hls4ml.types import FixedPoint\n"
        "from dynasty_lightning.hardware.hls4ml.network import plain_network\n"
        "from dynasty_lightning.hardware.hls4ml.project import export_hls4ml\n"
        "def refused():\n"
        "    import dynasty_lightning.hardware.hls4ml.layer\n"
        "for call in (refused, lambda: export_hls4ml(None, 0, 0, 0, stream=None)):\n"
        "    try:\n"
        "        call()\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout
    assert all("pip install 'dynasty-lightning[fpga]'" in line for line in lines)


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
