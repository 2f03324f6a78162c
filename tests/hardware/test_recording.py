"""Every form of every operation that a program knows, against torch; what is refused; random
networks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynasty_lightning.hardware.program import ExportError, export_program
from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Role
from fpga import open_device
from fpga.network.program import Program
from fpga.network.runner import Runner


def run(program: Program, images: Tensor) -> np.ndarray[Any, Any]:
    with open_device("reference", program.config) as device:
        return Runner(program, device)(images.numpy())


class Form(nn.Module):
    """A convolution, then an operation."""

    def __init__(self, operation: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        if isinstance(operation, nn.Module):
            self.module = operation
        self.operation = operation

    def forward(self, x: Tensor) -> Any:
        return self.operation(self.conv(x))


def in_place(*names: Any) -> Callable[[Tensor], Tensor]:
    """A method that changes the convolution's result, which is read afterwards under its old
    name.
    """

    def operation(x: Tensor) -> Tensor:
        getattr(x, names[0])(*names[1:])
        return x

    return operation


def twice(x: Tensor) -> Tensor:
    y = F.relu(x, inplace=True)
    return y + x  # x is y


def iadd(x: Tensor) -> Tensor:
    y = x
    y += x * 2
    return x


def clone_keeps(x: Tensor) -> Tensor:
    y = x.clone()
    y.relu_()
    return x - y


def flat_view_changes(x: Tensor) -> Tensor:
    flat = x.view(x.size(0), -1)
    flat.clamp_(max=0.1)
    return flat


EXACT: dict[str, Callable[[Tensor], Any]] = {
    "relu module": nn.ReLU(),
    "relu module in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "x.relu": lambda x: x.relu(),
    "x.relu_ and then x": in_place("relu_"),
    "an old name after a change in place": twice,
    "a clone is not changed": clone_keeps,
    "a view changed in place": flat_view_changes,
    "relu by keyword": lambda x: F.relu(input=x),
    "relu6 module": nn.ReLU6(),
    "relu6 module in place": nn.ReLU6(True),
    "F.relu6": F.relu6,
    "hardtanh": nn.Hardtanh(-0.5, 0.25),
    "F.hardtanh": lambda x: F.hardtanh(x, min_val=-0.25, max_val=0.5),
    "x.clamp": lambda x: x.clamp(-0.3, 0.3),
    "x.clamp min": lambda x: x.clamp(min=0.1),
    "torch.clamp max": lambda x: torch.clamp(input=x, max=0.1),
    "torch.clip": lambda x: torch.clip(x, -0.1, 0.2),
    "x.clamp_ and then x": in_place("clamp_", -0.1, 0.1),
    "x.clamp_min": lambda x: x.clamp_min(0.05),
    "+": lambda x: x + x.relu(),
    "torch.add by keywords": lambda x: torch.add(other=x.relu(), input=x),
    "x.add": lambda x: x.add(x.relu()),
    "x.add_ and then x": lambda x: x.add_(x.relu() * 3),
    "+=": iadd,
    "add a number": lambda x: 0.1 + x,
    "sub": lambda x: x - x.relu() * 0.5,
    "sub a number": lambda x: x - 0.1,
    "from a number": lambda x: 0.1 - x,
    "torch.rsub": lambda x: torch.rsub(x, 2),
    "broadcast over positions": lambda x: x + x[:, :, :1, :1],
    "mul a number": lambda x: x * 0.1,
    "mul_ and then x": in_place("mul_", 3),
    "torch.mul": lambda x: torch.mul(x, other=0.3),
    "mul tensors": lambda x: x * x.clamp(0, 1),
    "div a number": lambda x: x / 255,
    "torch.div": lambda x: torch.div(x, 3),
    "x.div_": in_place("div_", 7.0),
    "a constant tensor": lambda x: (
        (x - torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1))
        / torch.tensor([3.0, 7.0, 9.0, 11.0]).view(4, 1, 1)
    ),
    "neg": lambda x: -x,
    "max pool module": nn.MaxPool2d(2),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "torch.max_pool2d by keywords": lambda x: torch.max_pool2d(x, stride=1, kernel_size=(2, 3)),
    "max pool padded, dilated": nn.MaxPool2d(2, stride=1, padding=1, dilation=3),
    "max pool ceil": nn.MaxPool2d(3, stride=2, ceil_mode=True, padding=1),
    "max pool ceil that drops its last window": nn.MaxPool2d(
        2, stride=4, ceil_mode=True, padding=1
    ),
    "max pool with unused indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "F.adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (2, 3)),
    "adaptive pool to the same": nn.AdaptiveAvgPool2d((6, None)),
    "avg pool": nn.AvgPool2d(2),
    "F.avg_pool2d": lambda x: F.avg_pool2d(x, kernel_size=2, stride=1),
    "avg pool padded": nn.AvgPool2d(3, 2, 1),
    "avg pool not counting padding": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg pool ceil": nn.AvgPool2d(3, 2, ceil_mode=True),
    "avg pool ceil, padded": nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True),
    "avg pool ceil, padded, not counting": nn.AvgPool2d(
        (3, 2), 2, 1, ceil_mode=True, count_include_pad=False
    ),
    "avg pool with a divisor": nn.AvgPool2d(2, divisor_override=3),
    "pad": lambda x: F.pad(x, (1, 2, 0, 3)),
    "pad with a value": lambda x: F.pad(x, (1, 0), value=0.5),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "ZeroPad2d": nn.ZeroPad2d(1),
    "ReflectionPad2d": nn.ReflectionPad2d((1, 2, 3, 0)),
    "F.pad replicate": lambda x: F.pad(x, (1, 2, 3, 4), mode="replicate"),
    "flatten module": nn.Flatten(),
    "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
    "x.flatten": lambda x: x.flatten(1, -1),
    "flatten by two": lambda x: x.flatten(2).flatten(start_dim=1),
    "x.view(x.size(0), -1)": lambda x: x.view(x.size(0), -1),
    "x.view(-1, n)": lambda x: x.view(-1, 144),
    "reshape by shape": lambda x: x.reshape(x.shape[0], x.shape[1] * 36),
    "torch.reshape": lambda x: torch.reshape(x, (len(x), 2, 2, -1)),
    "unflatten": nn.Unflatten(1, (2, 2)),
    "unsqueeze, squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "squeeze of all": lambda x: x[:, 1:2].squeeze(),
    "permute, reshape": lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1),
    "permute of a tuple": lambda x: torch.permute(x, (0, 3, 1, 2)),
    "transpose": lambda x: x.transpose(-1, 1),
    "movedim": lambda x: x.movedim(1, -1).contiguous(),
    "channel shuffle": lambda x: (
        x.view(x.size(0), 2, 2, 6, 6).transpose(1, 2).contiguous().view(x.size(0), -1, 6, 6)
    ),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last).relu(),
    "cat": lambda x: torch.cat([x, x.relu()], 1),
    "cat by keyword": lambda x: torch.cat(tensors=(x, x * 2), dim=-1),
    "concat of one": lambda x: torch.concat([x], dim=1),
    "stack": lambda x: torch.stack([x, -x], dim=1),
    "chunk": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], dim=1),
    "split": lambda x: x.split([1, 3], dim=1)[1],
    "slice, select": lambda x: x[:, 1:3, 2:, 3],
    "identity": nn.Identity(),
    "dropout": nn.Dropout(0.5),
    "dropout in place": nn.Dropout(0.5, inplace=True),
    "dropout2d": nn.Dropout2d(),
    "alpha dropout": nn.AlphaDropout(),
    "F.dropout off": lambda x: F.dropout(x, 0.5, training=False),
    "float": lambda x: x.float().to(torch.float32).detach(),
}
CLOSE: dict[str, Callable[[Tensor], Any]] = {
    "batch norm": nn.BatchNorm2d(4),
    "F.batch_norm": lambda x: F.batch_norm(
        x,
        torch.tensor([0.1, 0.2, 0.3, 0.4]),
        bias=torch.ones(4),
        running_var=torch.tensor([1.0, 2, 3, 4]),
    ),
    "torch.mean by keyword": lambda x: torch.mean(input=x, dim=(2, 3)),
    "mean": lambda x: x.mean([-1, -2], keepdim=True),
    "mean one after the other": lambda x: x.mean(3).mean(2),
    "mean over channels": lambda x: x.mean(dim=1),
    "numpy's words": lambda x: x.mean(axis=(2, 3), keepdims=True),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1),
    "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "alpha": lambda x: torch.add(x, x.relu(), alpha=0.3).sub(F.relu6(x), alpha=2),
    "softmax": lambda x: x.mean((2, 3)).softmax(1),
    "log_softmax": lambda x: F.log_softmax(50 * x, dim=1),
    "softmax module": nn.Softmax(dim=-1),
}


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_every_form_of_an_operation_computes_what_torch_does(name: str) -> None:
    torch.manual_seed(0)
    operation = {**EXACT, **CLOSE}[name]
    network = Form(operation)
    network.train()
    network(torch.randn(8, 1, 6, 6))
    network.eval()
    convert(network, mode="exact")
    program = export_program(network, (1, 6, 6))
    images = torch.randn(5, 1, 6, 6)
    with torch.no_grad():
        expected = network(images).numpy()
    assert (5, *program.shapes[program.steps[-1]["name"]]) == expected.shape
    if name in EXACT:
        np.testing.assert_array_equal(run(program, images), expected)
    else:
        np.testing.assert_allclose(
            run(program, images), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max()
        )


def test_pooling_along_one_axis_is_one_step() -> None:
    torch.manual_seed(0)
    pools = (
        nn.MaxPool1d(3, 2, 1, ceil_mode=True),
        nn.AvgPool1d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool1d(1),
    )
    network = nn.Sequential(nn.Conv1d(2, 4, 3), *pools, nn.Flatten()).eval()
    convert(network, mode="exact")
    program = export_program(network, (2, 33))
    assert [s["op"] for s in program.steps] == [
        "conv",
        "max_pool",
        "average_pool",
        "mean",
        "flatten",
    ]
    images = torch.randn(5, 2, 33)
    with torch.no_grad():
        np.testing.assert_allclose(run(program, images), network(images).numpy(), rtol=1e-6)


def test_what_the_result_does_not_need_is_left_out_and_names_are_the_modules() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.act = nn.Conv2d(1, 4, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.input(x))
            _ = x.mean((2, 3))  # nobody reads it
            return self.act(x - 0.1)

    network = Network().eval()
    convert(network, mode="exact")
    program = export_program(network, (1, 6, 6))
    assert [s["name"] for s in program.steps] == ["input_1", "act", "add_constant", "act_1"]


def test_a_map_of_positions_is_exported_whole() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 4, 3)).eval()
    convert(network, mode="exact")
    layer = dynamic_layers(network)["0"]
    values = torch.randint(2, 9, (1, 2, 6, 1), dtype=torch.uint8)  # rows of the image, not columns
    layer.set_precision(Role.ACTIVATION, OperandPrecision(bits=values, least_bits=0, most_bits=8))
    program = export_program(network, (8, 6, 6))
    images = torch.randn(3, 8, 6, 6)
    with torch.no_grad():
        np.testing.assert_array_equal(run(program, images), network(images).numpy())


class Buffers(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.plain, self.act, self.what = (
            nn.Conv2d(1, 4, 3),
            nn.Conv2d(4, 4, 1),
            nn.GELU(),
            what,
        )
        self.seen = torch.zeros(())

    def forward(self, x: Tensor) -> Any:
        given, x = x, self.conv(x)
        match self.what:
            case "module":
                return self.act(x)
            case "not converted":
                return self.plain(x)
            case "two results":
                return x, x
            case "input":
                return given
            case "branch":
                return x if x.sum() > 0 else -x
            case "hidden":
                return torch.from_numpy(x.detach().numpy() * 2)
            case "hidden constant":
                return x + torch.from_numpy(x.detach().numpy()[:1] * 2)
            case "random":
                return x + torch.rand(4, 1, 1)
            case "batch":
                return x * len(x)
            case "view of a changed tensor":
                flat = x.flatten(1)
                x.relu_()
                return flat
            case "a buffer that changes":
                self.seen.add_(x.detach()[0, 0, 0, 0])
                return x
            case "nan":
                return x * float("nan")
        raise AssertionError(self.what)


REFUSED: dict[str, tuple[Any, str]] = {
    "module": (
        None,
        r"act \(GELU\), at test_recording\.py:\d+ `return self.act\(x\)`, calls gelu: "
        r"the runtime has no such operation",
    ),
    "not converted": (None, r"plain \(Conv2d\), at .*not converted"),
    "two results": (None, "must return one tensor, not tuple"),
    "input": (None, "returns its input"),
    "branch": (
        None,
        r"`return x if x.sum\(\) > 0 else -x`, calls sum: the runtime has no such operation",
    ),
    "hidden": (None, "not computed from it by operations that torch shows"),
    "hidden constant": (None, "numbers that change with the batch"),
    "random": (
        None,
        r"step 'add_constant' \(add_constant\) has numbers that change with the batch or with "
        r"its values, or that are drawn",
    ),
    "batch": (None, "numbers that change with the batch"),
    "view of a changed tensor": (None, "reads a view of a tensor that was changed in place since"),
    "a buffer that changes": (None, "no slice of the batch"),
    "nan": (None, "no value that holds NaN or Inf"),
    "sigmoid": (torch.sigmoid, "calls sigmoid: the runtime has no such operation"),
    "mean of all": (lambda x: torch.mean(input=x), "no mean over the batch, or over all axes"),
    "mean over the batch": (lambda x: x.mean(0), "no mean over the batch"),
    "indices": (
        lambda x: F.max_pool2d(x, 2, return_indices=True)[1],
        "the indices of a max pooling",
    ),
    "adaptive to no divisor": (
        nn.AdaptiveAvgPool2d(4),
        r"no adaptive pooling of \[6, 6\] to \[4, 4\] positions, which are no divisors",
    ),
    "dropout that is on": (
        lambda x: F.dropout(x),
        "dropout that is on in evaluation .*: pass training=self.training",
    ),
    "batch norm that is on": (
        lambda x: F.batch_norm(x, None, None, training=True),
        "no BatchNorm without running statistics",
    ),
    "value": (lambda x: x * float(x[0, 0, 0, 0]), "slice of the batch"),
    "double": (lambda x: x.double(), "no tensors of type torch.float64"),
    "integer": (lambda x: x.long(), "no tensors of type torch.int64"),
    "batch to positions": (
        lambda x: x.flatten(0, 1),
        r"no result of shape \[\d+, 6, 6\] for \d samples: the batch stays the first axis",
    ),
    "no batch": (lambda x: x.mean((2, 3)).unsqueeze(0), "the batch stays the first axis"),
    "batch of one": (lambda x: x[0], "no slice of the batch"),
    "batch moved": (lambda x: x.permute(1, 0, 2, 3), "no transposition that moves the batch"),
    "cat of batches": (lambda x: torch.cat([x, x]), "no concatenation along the batch"),
    "softmax of batches": (lambda x: x.softmax(0), "no softmax over the batch"),
    "a product of activations": (lambda x: x @ x, "no product of two activations"),
    "a quotient": (lambda x: x / (x + 1), "no division but by a constant"),
    "a reciprocal": (lambda x: 1 / x, "calls reciprocal: the runtime has no such operation"),
    "floor": (lambda x: torch.div(x, 2, rounding_mode="floor"), "no division that rounds"),
    "cut off": (lambda x: F.pad(x, (-1, 0)), "none that cuts off"),
    "circular": (
        lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
        r"`.*mode=\"circular\".*`, calls new_empty",
    ),
    "limits": (lambda x: x.clamp(torch.zeros(1)), "no limits that are tensors"),
    "a step": (lambda x: x[:, ::2], "none with a step"),
    "shapes": (lambda x: x + x.mean((2, 3)), "cannot be run on 2 float32 samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_program_can_be_is_named_with_its_place(name: str) -> None:
    operation, message = REFUSED[name]
    torch.manual_seed(0)
    network = Buffers(name) if operation is None else Form(operation)
    convert(network, mode="exact", exclude=["plain"] if operation is None else [])
    state = {k: v.clone() for k, v in network.state_dict().items()}
    before = torch.random.get_rng_state()
    with pytest.raises(ExportError, match=message):
        export_program(network, (1, 8, 8) if operation is None else (1, 6, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert network.training
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "multiply" in vars(m) for m in network.modules()
    )


def test_weights_that_are_not_finite_are_refused() -> None:
    for name in ("weight", "bias"):
        network = nn.Sequential(nn.Conv2d(1, 4, 3))
        convert(network, mode="exact")
        with torch.no_grad():
            getattr(network[0], name).view(-1)[3] = torch.nan
        with pytest.raises(ExportError, match="that hold"):
            export_program(network, (1, 6, 6))


class Random(nn.Module):
    """A network of a few layers and random operations between them, all of which torch computes in
    one defined way.
    """

    def __init__(self, choices: list[int]) -> None:
        super().__init__()
        self.choices = choices
        self.layers = nn.ModuleList()
        self.made = False

    def forward(self, x: Tensor) -> Tensor:
        numbers, layer = iter(self.choices), 0
        seen = [x]
        for code in numbers:
            pick = next(numbers, 0)
            y = seen[pick % len(seen)]
            z = self._operation(code, pick, x, y)
            if z is None:
                if not self.made:
                    self.layers.append(self._layer(x, code, pick))
                z = self.layers[layer](x)
                layer += 1
            x = z
            seen.append(x)
        x = x.flatten(1)
        if not self.made:
            self.layers.append(nn.Linear(x.shape[1], 3))
        self.made = True
        return self.layers[layer](x)

    @staticmethod
    def _layer(x: Tensor, code: int, pick: int) -> nn.Module:
        channels, size = x.shape[1], min(x.shape[2:])
        taps = 1 + pick % min(3, size)
        if code % 2 and channels > 1:
            return nn.Conv2d(channels, channels, taps, padding=taps // 2, groups=channels)
        mode = "replicate" if pick % 7 == 0 else "zeros"
        return nn.Conv2d(
            channels,
            1 + pick % 9,
            taps,
            stride=1 + pick % 2,
            padding=taps // 2,
            bias=pick % 5 > 0,
            padding_mode=mode,
        )

    @staticmethod
    def _operation(code: int, pick: int, x: Tensor, y: Tensor) -> Tensor | None:
        same, size = x.shape == y.shape, min(x.shape[2:])
        table: list[Callable[[], Tensor | None]] = [
            lambda: x + y if same else x.relu(),
            lambda: x - y if same else 0.25 - x,
            lambda: (
                torch.cat([x, y], 1)
                if x.shape[2:] == y.shape[2:] and x.shape[1] + y.shape[1] < 20
                else x[:, : 1 + pick % x.shape[1]]
            ),
            lambda: (
                F.max_pool2d(x, 2, stride=1 + pick % 3, padding=pick % 2, ceil_mode=pick % 5 > 2)
                if size > 2
                else F.relu6(x)
            ),
            lambda: (
                F.avg_pool2d(
                    x, 2, padding=pick % 2, ceil_mode=pick % 3 > 1, count_include_pad=pick % 5 > 1
                )
                if size > 1
                else x * 0.3
            ),
            lambda: x.relu_() if pick % 2 else x.clamp(-0.5, 1.5),
            lambda: x / (3 + pick % 5) + 0.125,
            lambda: F.pad(
                x,
                (pick % 2, 1, 0, pick % 3),
                mode=("constant", "reflect", "replicate")[pick % 3 if size > 2 else 0],
            ),
            lambda: x.transpose(2, 3),
            lambda: x.flatten(2).view(x.size(0), x.shape[1], *x.shape[2:]).permute(0, 1, 3, 2),
        ]
        return table[code]() if code < len(table) else None


@settings(max_examples=40)
@given(choices=st.lists(st.integers(0, 15), min_size=4, max_size=16), seed=st.integers(0, 1 << 20))
def test_random_networks_equal_torchs_exact_mode_to_the_bit(choices: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    network = Random(choices)
    images = torch.randn(3, 2, 7, 6) * torch.tensor([1.0, 1e-3, 30.0]).view(3, 1, 1, 1)
    network(images.clone())
    convert(network.eval(), mode="exact")
    for index, layer in enumerate(dynamic_layers(network).values()):
        layer.set_precision(
            Role.ACTIVATION,
            OperandPrecision(
                lsb_exponent=torch.tensor(-6 + index % 3), least_bits=index % 2 * 2, most_bits=8
            ),
        )
    program = export_program(network, (2, 7, 6))
    with torch.no_grad():
        expected = network(images.clone()).numpy()
    np.testing.assert_array_equal(run(program, images), expected)


class Table(nn.Module):
    """A layer, and rows of a table for symbols that are constants, or the input itself."""

    def __init__(self, *, of_input: bool, frozen: bool = False) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), nn.Embedding(8, 4)
        self.table.requires_grad_(not frozen)
        self.register_buffer("places", torch.arange(4))
        self.of_input = of_input

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.table(x if self.of_input else self.places)


def test_a_table_is_read_by_symbols_that_are_constants_alone() -> None:
    network = Table(of_input=False)
    convert(network, mode="exact")
    program, x = export_program(network, (4, 4)), torch.randn(2, 4, 4)
    assert [step["op"] for step in program.steps] == ["linear", "add_constant"]
    with torch.no_grad():
        np.testing.assert_array_equal(run(program, x), network.eval()(x).numpy())
    for frozen in (False, True):
        network = Table(of_input=True, frozen=frozen)
        convert(network)
        with pytest.raises(
            ExportError, match=r"table \(Embedding\), at .* calls embedding: .* read by symbols"
        ):
            export_program(network, (4, 4))
