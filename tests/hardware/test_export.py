"""Network programs: the NumPy quantizer against torch's, exported networks against the Trainer's
own, and what is refused.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynasty_lightning import DynastyPrecision, SealedCheckpointIO
from dynasty_lightning.cli import main
from dynasty_lightning.hardware.operands import operand_of
from dynasty_lightning.hardware.program import ExportError, export_program
from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.gemms import Requests, quantize_operand
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics import formats
from dynasty_lightning.numerics.formats import raised_widths
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Gemm, Role
from dynasty_lightning.study.export import export_run
from dynasty_lightning.study.report.run_folder import read_summary
from dynasty_lightning.tasks.data import load_data
from dynasty_lightning.tasks.models import build_model
from dynasty_lightning.tasks.tasks import build_task
from fpga import Operand, open_device, quantizer
from fpga.boards import load_board
from fpga.devices.overlay import bit_bytes, write_overlay
from fpga.images import load_images, save_images
from fpga.network.deploy import DeployError, deploy
from fpga.network.program import Program, ProgramError
from fpga.network.runner import Runner
from fpga.quantizer import ActivationRequest, quantize_activations
from tests.numerics.native_cases import FINE, OFFERS


def same(a: Operand, b: Operand) -> bool:
    return all(
        np.array_equal(getattr(a, n), getattr(b, n))
        for n in ("mantissas", "scale_exponents", "bits", "signed")
    )


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize(
    "request_kind", ["uniform", "map of widths", "threshold", "thresholds, least 2"]
)
@pytest.mark.parametrize(("block", "group"), [(4, None), (8, None), (4, (8, 16))])
@pytest.mark.parametrize(("code", "scale_bits"), [("symmetric", 0), *FINE])
def test_the_numpy_quantizer_is_torchs_to_the_bit(
    kind: str,
    request_kind: str,
    block: int,
    group: tuple[int, int] | None,
    code: str,
    scale_bits: int,
) -> None:
    layer = nn.Conv2d(21, 4, 3) if kind == "conv" else nn.Linear(21, 4)
    model = nn.Sequential(layer)
    convert(model, block_shape=(block, block), width_group=group, code=code, scale_bits=scale_bits)
    converted = dynamic_layers(model)["0"]
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(5, 21, 3, 4) if kind == "conv" else torch.randn(5, 21)
        x = x * torch.tensor([1.0, 1e-3, 1e30, 1e-38, 0.0]).view(-1, *[1] * (x.ndim - 1))
        x = x.relu() if seed % 2 else x
        x[0].view(-1)[::7] *= 2.0**-12  # far below the window
        blocks = -(-21 // block)
        grid = (1, blocks, 3, 4) if kind == "conv" else (1, blocks)
        if request_kind == "uniform":
            values, thresholds, least = torch.tensor(4), False, 0
        elif request_kind == "map of widths":
            values, thresholds, least = (
                torch.tensor([0, 2, 3, 4, 5, 6, 7, 8])[torch.randint(0, 8, grid)],
                False,
                0,
            )
        else:
            values, thresholds, least = (
                torch.randint(-6, 3, grid),
                True,
                2 if "least" in request_kind else 0,
            )
        offered = OFFERS[seed % len(OFFERS)] if thresholds else ()
        table = raised_widths(offered)
        requests = Requests(values, values, values, [int(thresholds), least, 8, 8, table] * 3)
        quantized = quantize_operand(
            x, converted.plan, Role.ACTIVATION, Gemm.FORWARD, requests, training=False
        )
        expected = operand_of(quantized, Role.ACTIVATION, converted.plan)
        flat = x.movedim(1, -1).reshape(5, -1, 21).numpy() if kind == "conv" else x.numpy()[:, None]
        asked = (
            values.view(1, 1, 1)
            if values.ndim == 0
            else values.movedim(1, -1).reshape(1, -1, blocks)
        )
        request = ActivationRequest(
            values=asked.numpy(),
            is_threshold=thresholds,
            least_bits=least,
            offered_bits=offered,
            code=code,
            scale_bits=scale_bits,
        )
        scope = "sample" if kind == "conv" else "row"
        assert same(
            quantize_activations(
                np.ascontiguousarray(flat), request, edge=block, scope=scope, width_group=group
            ),
            expected,
        )


def test_both_packages_have_the_same_constants() -> None:
    for name in ("WINDOW", "SLACK", "MAX_SCALED_BITS"):
        assert getattr(quantizer, name) == getattr(formats, name), name
    assert quantizer._FAR_THRESHOLDS == formats.FAR_THRESHOLDS


def test_requests_and_operands_out_of_range_are_refused() -> None:
    request = ActivationRequest(values=np.full((1, 1, 1), 4), is_threshold=False)
    x = np.ones((2, 1, 8), np.float32)
    for values, message in (
        (np.full((1, 1, 1), 1), "widths must be in"),
        (np.full((1, 1), 4), "integers"),
        (np.ones((1, 1, 1)), "not float64"),
    ):
        with pytest.raises(ValueError, match=message):
            ActivationRequest(values=values, is_threshold=False)
    with pytest.raises(ValueError, match="least_bits 5 and most_bits 4"):
        ActivationRequest(
            values=np.full((1, 1, 1), 0), is_threshold=True, least_bits=5, most_bits=4
        )
    for wrong, message in (
        (x.astype(np.float64), "must be float32"),
        (x * np.float32(np.nan), "NaN or Inf"),
        (x[:, 0], "rows, positions"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_activations(wrong, request, edge=4)
    with pytest.raises(ValueError, match="does not broadcast"):
        quantize_activations(
            x, ActivationRequest(values=np.full((1, 1, 3), 4), is_threshold=False), edge=4
        )


class Everything(nn.Module):
    """Each operation that the runtime knows, grouped and strided convolutions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5)
        )
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.maximum, self.average = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2)
        self.down = nn.Conv2d(8, 12, 3, stride=2, dilation=2, padding=2)
        self.global_average, self.identity = nn.AdaptiveAvgPool2d(1), nn.Identity()
        self.flat, self.head = nn.Flatten(), nn.Linear(12, 7)
        self.last = nn.Linear(7, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(self.depthwise(x) + x)
        x = self.average(self.maximum(x))
        x = self.identity(self.down(x)).relu()
        return self.last(self.head(self.flat(self.global_average(x))))


def trained(network: nn.Module, shape: tuple[int, ...], **options: object) -> nn.Module:
    """With running statistics, a map, and in exact mode."""
    torch.manual_seed(0)
    network.train()
    for _ in range(3):
        network(torch.randn(16, *shape))
    convert(network, mode="exact", **options)
    for index, layer in enumerate(dynamic_layers(network).values()):
        layer.set_precision(
            Role.ACTIVATION,
            OperandPrecision(lsb_exponent=torch.tensor(-4 - index % 3), least_bits=0, most_bits=8),
        )
        layer.set_precision(
            Role.WEIGHT, OperandPrecision(bits=torch.tensor(5), least_bits=0, most_bits=8)
        )
    return network.eval()


NETWORKS = {
    "everything": (Everything, (3, 16, 16)),
    "resnet8": (lambda: build_model("resnet8", in_channels=1, image_size=8, classes=10), (1, 8, 8)),
    "mlp": (lambda: build_model("mlp", in_channels=1, image_size=8, classes=10), (1, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_exported_network_gives_torchs_classes_and_the_same_bits_on_every_device(
    name: str, tmp_path: Path
) -> None:
    make, shape = NETWORKS[name]
    network = trained(make(), shape)
    export_program(network, shape).save(tmp_path)
    program = Program.load(tmp_path)
    images = torch.randn(24, *shape)
    with torch.no_grad():
        expected = network(images).numpy()
    logits = {}
    devices = ["reference", "csim"]
    if name == "resnet8":
        pytest.importorskip("pynq", reason="needs pynq")
        devices.append("pynq-sim")
    for device in devices:
        with open_device(device, program.config) as opened:
            runner = Runner(program, opened)
            logits[device] = np.concatenate(
                [runner(images[i : i + 7].numpy()) for i in range(0, 24, 7)]
            )
            assert all(step.calls == 4 and step.cycles > 0 for step in runner.report.values())
    assert all(
        np.array_equal(v.view(np.int32), logits["reference"].view(np.int32))
        for v in logits.values()
    )
    assert np.allclose(logits["reference"], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert (logits["reference"].argmax(1) == expected.argmax(1)).all()
    assert network.training is False


@pytest.mark.parametrize(
    "options",
    [
        {"block_shape": (8, 8)},
        {"width_group": (16, 16)},
        {"block_shape": (8, 8), "code": "split"},
        {"code": "split", "width_group": (8, 8)},
        {"block_shape": (8, 8), "code": "split", "scale_bits": 2},
    ],
)
def test_other_blocks_export_too(options: dict[str, Any], tmp_path: Path) -> None:
    network = trained(
        build_model("resnet8", in_channels=1, image_size=8, classes=10), (1, 8, 8), **options
    )
    first = next(iter(dynamic_layers(network).values()))
    if options.get("code"):
        first.set_precision(
            Role.ACTIVATION,
            OperandPrecision(lsb_exponent=-3, least_bits=2, offered_bits=(4, 8)),
        )
    export_program(network, (1, 8, 8)).save(tmp_path)
    program = Program.load(tmp_path)
    images = torch.randn(5, 1, 8, 8)
    with open_device("reference", program.config) as device, torch.no_grad():
        assert (
            Runner(program, device)(images.numpy()).argmax(1) == network(images).argmax(1).numpy()
        ).all()


def test_a_network_without_converted_layers_is_refused() -> None:
    with pytest.raises(ExportError, match="no converted layer"):
        export_program(nn.Linear(3, 3), (3,))


@pytest.fixture(scope="module")
def program_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    network = trained(build_model("mlp", in_channels=1, image_size=4, classes=3), (1, 4, 4))
    export_program(network, (1, 4, 4), labels=["x", "y", "z"]).save(folder)
    images = np.random.default_rng(0).standard_normal((20, 1, 4, 4)).astype(np.float32)
    save_images(folder, images, np.zeros(20, np.int64))
    return folder


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (8, {}, "input_shape is one sample's, without the batch"),
        ("8", {}, "input_shape is one sample's, without the batch"),
        ((-8,), {}, r"whole numbers above 0, e\.g\. \(3, 32, 32\), not \(-8,\)"),
        ((8.5,), {}, "whole numbers above 0"),
        ((True,), {}, "whole numbers above 0"),
        ((8,), {"labels": "abcd"}, "labels is a collection of names, not the string 'abcd'"),
        ((8,), {"config": "small"}, r"config must be an fpga\.GemmConfig, not 'small'"),
    ],
)
def test_wrong_arguments_are_named(shape: Any, options: dict[str, Any], message: str) -> None:
    network = nn.Sequential(nn.Linear(8, 4))
    convert(network, mode="exact")
    with pytest.raises((TypeError, ValueError), match=message):
        export_program(network, shape, **options)


def test_a_network_is_a_module_and_a_folder_may_be_text(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, not 'x'"):
        export_program("x", (8,))
    network = nn.Sequential(nn.Linear(8, 4))
    convert(network, mode="exact")
    export_program(network, np.array([8])).save(str(tmp_path))
    images = np.zeros((2, 8), np.float32)
    save_images(str(tmp_path), images, np.array([1, 0]))
    assert Program.load(str(tmp_path)).input_shape == (8,)
    assert load_images(str(tmp_path))[1].tolist() == [1, 0]


def test_images_and_devices_that_do_not_fit_are_refused(program_folder: Path) -> None:
    program = Program.load(program_folder)
    with open_device("reference", program.config) as device:
        runner = Runner(program, device)
        for images in (
            np.zeros((2, 1, 5, 4), np.float32),
            np.zeros((2, 1, 4, 4)),
            np.zeros((0, 1, 4, 4), np.float32),
        ):
            with pytest.raises(ProgramError, match="images must be float32"):
                runner(images)
        with pytest.raises(ProgramError, match=r"step '1' \(linear\): x holds NaN or Inf"):
            runner(np.full((1, 1, 4, 4), np.nan, np.float32))
        with pytest.raises(
            ProgramError, match=r"images must be float32 \[N, 1, 4, 4\], not float32 \(0, 1, 4, 4\)"
        ):
            runner.classify(np.zeros((0, 1, 4, 4), np.float32))
        with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
            runner.classify(np.zeros((1, 1, 4, 4), np.float32), batch=0)
    with pytest.raises(ProgramError, match="packed for the core"):
        Runner(program, open_device("reference", type(program.config)(tile=8)))


def test_a_deploy_folder_runs_by_itself(program_folder: Path, tmp_path: Path) -> None:
    out = deploy(program_folder, load_board("pynq-z2"), tmp_path / "deploy")
    assert {p.name for p in out.iterdir()} == {
        "fpga",
        "program",
        "build",
        "classify.py",
        "classify.ipynb",
        "README.md",
        "deploy.json",
    }
    assert "$" not in (out / "README.md").read_text()
    # NumPy alone: the folder's own package, not this one, and no torch.
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['classify.py', 'reference']\n"
    code += (
        f"import runpy; runpy.run_path({str(out / 'classify.py')!r}, "
        f"run_name='__main__')\nimport fpga; print(fpga.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of 20 images right" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == str(out / "fpga" / "__init__.py")
    notebook = json.loads((out / "classify.ipynb").read_text())
    assert "DEVICE = 'pynq-sim'" in "".join("".join(c["source"]) for c in notebook["cells"])
    # An earlier deploy folder is replaced; somebody else's is not.
    deploy(program_folder, load_board("pynq-z2"), out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DeployError, match="was not written by `deploy`"):
        deploy(program_folder, load_board("pynq-z2"), tmp_path / "mine")


def test_an_overlay_goes_along_if_it_is_for_the_board(program_folder: Path, tmp_path: Path) -> None:
    overlay = write_overlay(tmp_path / "overlay", load_board("pynq-z2"))
    out = deploy(program_folder, load_board("pynq-z2"), tmp_path / "deploy", overlay=overlay)
    assert sorted(p.name for p in (out / "overlay").iterdir()) == ["dpgemm.bit", "dpgemm.hwh"]
    assert not (out / "build").exists()
    overlay.write_bytes(bit_bytes("xc7z010clg400-1"))
    with pytest.raises(DeployError, match="was built for xc7z010clg400-1"):
        deploy(program_folder, load_board("pynq-z2"), out, overlay=overlay)
    overlay.with_suffix(".hwh").unlink()
    with pytest.raises(FileNotFoundError, match=r"dpgemm\.hwh does not exist"):
        deploy(program_folder, load_board("pynq-z2"), out, overlay=overlay)


def test_export_and_deploy_from_a_demos_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert (
        main(
            [
                "demo",
                "--seeds",
                "1",
                "--epochs",
                "2",
                "--methods",
                "dynasty,float32",
                "--checkpoints",
                "--no-csim",
                "--threads",
                "1",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert (
        main(
            [
                "export",
                "--checkpoint",
                str(run / "checkpoint-dynasty-0.ckpt"),
                "--out",
                str(tmp_path / "program"),
                "--images",
                "60",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "60 test images: 100.00 % get torch's class" in printed
    program = Program.load(tmp_path / "program")
    assert program.source["model"] == "resnet8"
    assert program.labels == list(load_data("digits").class_names)
    for arguments, message in (
        (
            ["--checkpoint", str(run / "checkpoint-float32-0.ckpt")],
            "was not trained with DynastyPrecision",
        ),
        (["--checkpoint", str(run / "nothing.ckpt")], "does not exist"),
        (["--checkpoint", str(run / "summary.json")], "summary.json has no digest at its end"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["export", *arguments, "--out", str(tmp_path / "other")])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    summary = read_summary(run)  # without its digest, so that a changed one is taken
    for changed, message in (
        ({"model": "mlp"}, "holds no weights of the mlp that its summary names"),
        (
            {"model": "chartransformer", "data": "stdlib-docs"},
            "holds no weights of the chartransformer that its summary names",
        ),
    ):
        (run / "summary.json").write_text(json.dumps(summary | {"args": summary["args"] | changed}))
        with pytest.raises(ValueError, match=message):
            export_run(run / "checkpoint-dynasty-0.ckpt", tmp_path / "other", stream=sys.stdout)
    (run / "summary.json").write_text(json.dumps(summary | {"args": {}}))
    with pytest.raises(ValueError, match="args lacks 'data'"):
        export_run(run / "checkpoint-dynasty-0.ckpt", tmp_path / "other", stream=sys.stdout)


def test_a_text_model_is_refused_for_the_operation_that_a_program_lacks(tmp_path: Path) -> None:
    task = build_task(data="stdlib-docs", model="chartransformer")
    plugin = DynastyPrecision()
    plugin.convert_module(task.module)
    state = {"state_dict": task.module.state_dict(), "DynastyPrecision": plugin.state_dict()}
    checkpoint = tmp_path / "checkpoint-dynasty-0.ckpt"
    SealedCheckpointIO().save_checkpoint(state, checkpoint)
    arguments = {"data": "stdlib-docs", "model": "chartransformer"}
    (tmp_path / "summary.json").write_text(json.dumps({"args": arguments, "runs": []}))
    with pytest.raises(
        ExportError,
        match=r"network\.embedding \(Embedding\), at chartransformer\.py:\d+ .*, "
        r"calls embedding: the runtime has no table that is read by symbols",
    ):
        export_run(checkpoint, tmp_path / "out", stream=sys.stdout)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_five_hundred_real_images_get_the_same_classes_on_the_simulated_board(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pynq", reason="needs pynq")
    try:
        load_data("fashion-mnist")
    except FileNotFoundError:
        pytest.skip(
            "needs Fashion-MNIST: apt-get install dataset-fashion-mnist, or its files in "
            "DYNASTY_DATA"
        )
    run = tmp_path / "run"
    arguments = [
        "--data",
        "fashion-mnist",
        "--train-images",
        "4000",
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--methods",
        "dynasty",
        "--threads",
        "1",
    ]
    assert main(["demo", *arguments, "--checkpoints", "--no-csim", "--out", str(run)]) == 0
    assert (
        main(
            [
                "export",
                "--checkpoint",
                str(run / "checkpoint-dynasty-0.ckpt"),
                "--out",
                str(tmp_path / "program"),
                "--images",
                "500",
            ]
        )
        == 0
    )
    program = Program.load(tmp_path / "program")
    images, labels = load_images(tmp_path / "program")
    classes = {}
    for name in ("csim", "pynq-sim"):
        with open_device(name, program.config) as device:
            classes[name] = Runner(program, device).classify(images)
    assert len(classes["csim"]) == 500
    assert np.array_equal(classes["csim"], classes["pynq-sim"])
    assert (classes["csim"] == labels).mean() > 0.5
    capsys.readouterr()
