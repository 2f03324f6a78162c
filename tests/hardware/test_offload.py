"""Training and predicting through the C simulation, against exact mode, bit for bit."""

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.hardware.offload import DeviceOffload, offload
from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.nn.plan import LayerPlan
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Gemm, Role
from fpga import DeviceError, DeviceTimeout, GemmConfig, open_device


class SmallResidual(nn.Module):
    """3x3 with stride 1 and 2, a 1x1 shortcut with stride 2, BatchNorm, a Linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(c) for c in (6, 6, 9, 9)])
        self.same1 = nn.Conv2d(6, 6, 3, padding=1)
        self.down1 = nn.Conv2d(6, 9, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(9, 9, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 9, 1, stride=2)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.stem(x)).relu()
        x = (self.norms[1](self.same1(x)) + x).relu()
        y = self.norms[2](self.down1(x)).relu()
        x = (self.norms[3](self.down2(y)) + self.shortcut(x)).relu()
        return self.head(x.mean((2, 3)))


class Module(L.LightningModule):
    def __init__(self, network: Callable[[], nn.Module] = SmallResidual) -> None:
        super().__init__()
        self.network = network()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.network(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loader(images: int = 44, batch: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(
        torch.randn(images, 1, 7, 7, generator=generator),
        torch.randint(0, 5, (images,), generator=generator),
    )
    return DataLoader(data, batch_size=batch)


def fit_and_predict(
    device: str | None, steps: int, **options: Any
) -> tuple[Module, list[Tensor], DeviceOffload | None]:
    torch.manual_seed(0)
    module = Module()
    extra = [DeviceOffload(device)] if device else []
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[DynastyPrecision(mode="exact", seed=3, **options)],
        callbacks=[
            DynastyCallback(
                target_speedup=4.0 if not options else 3.0,
                cost="core" if options else "bits",
                interval=4,
                table=False,
            ),
            *extra,
        ],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader())
        fitted = extra[0].report if extra else None
        predictions = trainer.predict(module, loader(9, 4))
    if extra:
        assert fitted is not None
        extra[0].fitted = fitted
    return module, predictions, extra[0] if extra else None


@pytest.mark.parametrize(
    "options", [{}, {"block_shape": (8, 8), "code": "split", "scale_bits": 2}], ids=str
)
def test_a_residual_network_trains_through_the_simulation_with_the_bits_of_exact_mode(
    options: dict[str, Any],
) -> None:
    expected, expected_predictions, _ = fit_and_predict(None, 24, **options)
    module, predictions, callback = fit_and_predict("csim", 24, **options)
    assert len(module.losses) == 24
    assert module.losses == expected.losses
    for (name, got), want in zip(
        module.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(got, want), name
    assert all(torch.equal(a, b) for a, b in zip(predictions, expected_predictions, strict=True))
    assert callback is not None
    report = callback.fitted
    gemms = {name: {g for n, g in report.uses if n == name} for name, _ in report.uses}
    assert gemms["network.same1"] == set(Gemm)
    for (name, gemm), use in report.uses.items():
        # The stem's dX is computed in the steps that the analysis looks at, for its statistics.
        assert (
            use.calls == 24 if (name, gemm) != ("network.stem", Gemm.DGRAD) else 0 < use.calls < 24
        )
        assert use.values > 0
        assert use.cycles > 0
        assert use.bytes_moved > 0
        assert use.host_calls == 0
    assert {g for _, g in callback.report.uses} == {Gemm.FORWARD}
    # Widths moved: the map was at work, not 8 bits everywhere.
    widths = {
        (layer.layer_name, r): layer.get_precision(r)
        for layer in dynamic_layers(module).values()
        for r in Role
    }
    assert any(w is not None for w in widths.values())


def test_offloading_again_and_again_keeps_nothing() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(24, 4))
    convert(model, mode="exact")
    kept = []
    for _ in range(4):
        with offload(model, "reference"):
            model(torch.randn(4, 8, 5)).sum().backward()
        model.zero_grad()
        gc.collect()
        found = gc.get_objects()
        kept.append(
            (
                sum(type(o) is LayerPlan for o in found),
                sum(o.numel() for o in found if type(o) is Tensor),
            )
        )
    assert kept[1:] == kept[:1] * 3


def test_a_gemm_of_a_closed_offload_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    convert(model, mode="exact")
    with offload(model, "reference"):
        twin = copy.deepcopy(model)
        output = model(torch.randn(4, 8))
    with pytest.raises(RuntimeError, match="is closed"):
        output.sum().backward()
    with pytest.raises(RuntimeError, match="is closed"):
        twin(torch.randn(4, 8))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d, dilation": (lambda: nn.Conv1d(5, 7, 5, padding=2, dilation=2), (6, 5, 13)),
    "Conv3d": (lambda: nn.Conv3d(3, 5, 3, stride=2, padding=1), (5, 3, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(10, 10, 3, padding=1, groups=10), (5, 10, 7, 7)),
    "groups that cut blocks": (lambda: nn.Conv2d(18, 12, 3, stride=2, groups=3), (6, 18, 7, 7)),
    "reflected padding": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (4, 4, 6, 6),
    ),
    "Linear on tokens": (lambda: nn.Linear(11, 6), (5, 3, 2, 11)),
    "Linear": (lambda: nn.Linear(9, 17, bias=False), (7, 9)),
}


@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_has_the_bits_of_exact_mode(name: str, block: int) -> None:
    make, shape = LAYERS[name]
    model = nn.Sequential(make())
    convert(model, mode="exact", block_shape=(block, block))
    layer = next(iter(dynamic_layers(model).values()))
    for role, threshold in zip(Role, (-4, -6, -5), strict=True):
        limit = 8 if role is Role.ERROR else 3
        layer.set_precision(
            role,
            OperandPrecision(
                lsb_exponent=torch.tensor(threshold), least_bits=0, most_bits=8, backward_bits=limit
            ),
        )
    x = torch.randn(shape).requires_grad_()
    outcomes = []
    for device in (None, "csim"):
        layer.stream.counters.zero_()
        layer.stream.calls.zero_()
        with offload(model, device, verify=True) if device else torch.enable_grad() as run:
            model.train()
            y = model(x)
            grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
            model.eval()
            outcomes.append([y, *grads, model(x)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    report = run.report()
    assert report.total("unequal") == 0
    padded = 4 * 4 * 8 * 8 if name == "reflected padding" else x.numel()
    assert report.total("values") == y.numel() * 2 + padded + layer.weight.numel()


def test_evaluation_keeps_samples_of_very_different_size_apart() -> None:
    model = nn.Sequential(nn.Conv2d(5, 6, 3, padding=1), nn.Flatten(), nn.Linear(6 * 16, 4))
    convert(model, mode="exact")
    model.eval()
    x = torch.randn(6, 5, 4, 4) * torch.tensor([1e-30, 1.0, 1e20, 0.0, 1e-3, 7.0]).view(-1, 1, 1, 1)
    expected = model(x)
    with offload(model, "csim", verify=True) as run:
        assert torch.equal(model(x), expected)
    assert run.report().total("unequal") == 0


def test_a_verified_run_sees_a_device_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, mode="exact")
    device = open_device("reference")
    honest = device.run

    def dishonest(job: object, **options: object) -> object:
        result = honest(job, **options)
        result.values[0, 0, 0] += 1
        return result

    monkeypatch.setattr(device, "run", dishonest)
    with offload(model, device, verify=True) as run:
        model(torch.randn(4, 8))
    assert run.report().total("unequal") == 1
    assert "1 DIFFER" in str(run.report())


def test_an_operand_with_nan_runs_on_the_host_and_is_reported() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    convert(model, mode="exact")
    x = torch.randn(4, 8)
    x[1, 2] = float("nan")
    expected = model(x)
    with offload(model, "reference") as run:
        y = model(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    ((_, use),) = run.report().uses.items()
    assert (use.calls, use.host_calls) == (0, 1)
    assert "on the host" in str(run.report())


def test_closing_gives_the_layers_their_own_gemms_back() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    convert(model)
    plan = dynamic_layers(model)["0"].plan
    device = open_device("reference")
    with offload(model, device) as run:
        assert dynamic_layers(model)["0"].plan != plan
        with pytest.raises(ValueError, match="offloaded already"):
            offload(model, device)
        convert(model)  # a Trainer converts again at each start
    assert dynamic_layers(model)["0"].plan == plan
    model(torch.randn(2, 8))
    assert run.report().total("calls") == 0
    device.close()
    with offload(model, device), pytest.raises(DeviceError, match="closed"):
        model(torch.randn(2, 8))


def test_uniform_8_bits_have_a_speedup_of_one_and_narrow_blocks_more() -> None:
    speedups = []
    for bits in (8, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
        convert(model)
        for role in Role:
            dynamic_layers(model)["0"].set_precision(
                role, OperandPrecision(bits=torch.tensor(bits), least_bits=bits, most_bits=bits)
            )
        with offload(model, "reference", bytes_per_cycle=21.0) as run:
            model(torch.randn(8, 16, 8, 8).requires_grad_()).sum().backward()
        speedups.append((run.report().speedup_core, run.report().speedup_cycles))
    assert speedups[0] == (1.0, 1.0)
    assert 2.0 < speedups[1][0] <= 4.0
    assert 3.0 < speedups[1][1] <= 4.0


@pytest.mark.parametrize(
    ("block_shape", "message"),
    [
        ((1, 16), "1 x 16 are for emulation only"),
        ((8, 8), "blocks are 8 x 8, the device's core takes 4 x 4"),
    ],
)
def test_blocks_that_the_core_does_not_compute_are_refused(
    block_shape: tuple[int, int], message: str
) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    convert(model, block_shape=block_shape)
    with pytest.raises(ValueError, match=message):
        offload(
            model, open_device("reference", GemmConfig()) if block_shape == (8, 8) else "reference"
        )


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="no converted layer"):
        offload(nn.Linear(3, 3), "reference")
    model = nn.Sequential(nn.Linear(3, 3))
    convert(model)
    with pytest.raises(
        ValueError, match=r"unknown device 'fpga': known are reference, csim, pynq-sim, pynq"
    ):
        offload(model, "fpga")
    with pytest.raises(ValueError, match="unknown device 'fpga': known are reference"):
        DeviceOffload("fpga")
    for wrong in (None, nn.Linear):
        with pytest.raises(TypeError, match=r"a device is a name, of reference, .*, not"):
            DeviceOffload(wrong)
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, not 'x'"):
        offload("x", "reference")
    with pytest.raises(ValueError, match="takes no options"):
        offload(model, open_device("reference"), sanitizer="undefined")
    with offload(model, "csim", timeout_s=1e-9), pytest.raises(DeviceTimeout):
        model(torch.randn(2, 3))
