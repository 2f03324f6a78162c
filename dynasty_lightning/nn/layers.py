# SPDX-License-Identifier: Apache-2.0
"""Converted layers: nn.Linear and nn.Conv1d/2d/3d whose three GEMMs read quantized operands.

A layer becomes one by `module.__class__ = ...`, so parameters, ties, `isinstance` and `state_dict`
keys stay as they are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..numerics.formats import MAX_BITS, BlockFormat
from ..numerics.geometry import LayerGeometry
from ..numerics.operand_precision import OperandPrecision
from ..numerics.quantized import header_bits, header_occupied, header_signed, make_headers
from ..numerics.roles import SHARED, Gemm, Role
from .gemms import SETTINGS, has_limit, role_settings, settings_of
from .ops import apply_layer, refuse_torchscript, refuse_transforms
from .plan import LayerPlan, Mode
from .probe import ProbeRecord
from .records import COUNT_ONLY, HEADERS_ONLY, PROBING, ObservationSlot, StepRecord, weight_squares

_REQUESTS: Final = {
    Role.ACTIVATION: "_x_request",
    Role.WEIGHT: "_w_request",
    Role.ERROR: "_e_request",
}
_DEFAULT_BITS: Final = 8
_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def check_seed(seed: Any) -> int:
    """Raises TypeError or ValueError unless it is a whole number of 32 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, not {seed!r}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must fit 32 unsigned bits, not {seed}")
    return seed


class StreamState:
    """Where the random stream of a model stands: seed, rank, backward passes so far, forward calls
    of each layer since the last.

    One object is shared by all layers of a model; `advance` belongs after each backward (the
    precision plugin calls it). A loop that never
    calls it draws no number twice: calls are counted on.

    Attributes:
        watch: called before each layer's own work, but not in compiled networks; the precision
            plugin looks there whether it is still the Trainer's. It belongs to one model: copies
            and pickles have none.
    """

    watch: Callable[[], None] | None = None

    def __init__(self, seed: int = 0, rank: int = 0, layers: int = 0) -> None:
        check_seed(seed)
        # On the CPU even inside `with torch.device("meta")`, where models are built without memory;
        # and to be counted on.
        with torch.inference_mode(False):
            self.counters = torch.tensor([seed, rank, 0], dtype=torch.int64, device="cpu")
            self.calls = torch.zeros(layers, dtype=torch.int64, device="cpu")

    @property
    def backward_count(self) -> int:
        return int(self.counters[2])

    def add_layer(self) -> int:
        """Count a layer, and say its index."""
        with torch.inference_mode(False):
            self.calls = torch.cat([self.calls, self.calls.new_zeros(1)])
        return len(self.calls) - 1

    def position(self, layer_index: int) -> Tensor:
        """int64 [seed, rank, backward_count, call_index] of a layer's next call, which it
        counts.
        """
        position = torch.cat([self.counters, self.calls[layer_index : layer_index + 1]])
        self.calls[layer_index] += 1
        return position

    def advance(self) -> None:
        """Count a backward pass."""
        self.counters[2] += 1
        self.calls.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Seed and counts; the rank belongs to the process, not to the checkpoint."""
        return {
            "seed": int(self.counters[0]),
            "backward_count": self.backward_count,
            "calls": self.calls.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counters[0], self.counters[2] = state["seed"], state["backward_count"]
        self.calls.zero_()
        calls = torch.tensor(state["calls"], dtype=torch.int64)[
            : len(self.calls)
        ]  # more where layers have come and gone
        self.calls[: len(calls)] = calls

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "watch"}


@dataclass(frozen=True, kw_only=True)
class LayerObservation:
    """What one training step of a layer showed; grids and maps as in docs/architecture.md.
    `x_unsigned`: share of X's nonzero blocks.

    `has_dgrad`, `has_wgrad`: whether a gradient of X, and of W, was wanted. `order` is larger the
    later the layer's backward ran.

    `bits` has the widths of X and W in FORWARD and of E; `backward_bits` those of X in WGRAD and of
    W in DGRAD, where they are limited. `squares` has the second moments x_square, e_square,
    dx_square, w_square and dw_square; nothing if the step was to show widths only, and no dw_square
    where dW is summed over calls or ranks first (`DynamicLayer.gradient`).
    """

    geometry: LayerGeometry
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    has_dgrad: bool
    has_wgrad: bool
    order: int
    bits: Mapping[Role, Tensor]
    backward_bits: Mapping[Role, Tensor]
    occupied: Mapping[Role, Tensor]
    nonfinite: Mapping[Role, int]
    x_unsigned: float
    squares: Mapping[str, Tensor]
    first_columns: Tensor | None
    probe: ProbeRecord | None = None
    gradient_energy: float = 0.0


class DynamicLayer(nn.Module):
    """What every converted layer has beside its own class. Made by `adopt`, never constructed."""

    weight: Tensor
    layer_name: str
    plan: LayerPlan
    stream: StreamState
    observing: bool
    headers_only: bool
    probing: bool
    exact_errors: bool

    def adopt(self, *, name: str, plan: LayerPlan, stream: StreamState) -> None:
        """Give a freshly swapped layer its state.

        Requests are no buffers: whoever walks over those (averages of weights, `to_empty`, DDP)
        takes them for the user's. The plugin saves them, and they follow the operand's device when
        they are read.
        """
        self.join(name=name, plan=plan, stream=stream)
        self._observe_nothing()
        self._slot = ObservationSlot()
        self._converted_options = self._options()
        self._settings = [v for _ in Role for v in settings_of(None)]
        for role in Role:
            setattr(self, _REQUESTS[role], _saveable(_default_request()))
        self._precision: dict[Role, OperandPrecision] = {}

    def join(self, *, name: str, plan: LayerPlan, stream: StreamState) -> None:
        """Make the layer one of a model's: its name and index there, and the stream that all of its
        layers share.
        """
        self.layer_name, self.plan, self.stream = name, plan, stream
        _ = (
            plan.key,
            plan.band,
        )  # computed here: torch.compile cannot trace the lock of a cached property

    def _observe_nothing(self) -> None:
        self.observing = self.headers_only = self.probing = self.exact_errors = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # a copy that is made within an analysed step: nobody would ever collect its records
        self._observe_nothing()

    @property
    def geometry(self) -> LayerGeometry:
        return self.plan.geometry

    @property
    def format(self) -> BlockFormat:
        return self.plan.format

    @property
    def mode(self) -> Mode:
        return self.plan.mode

    @property
    def layer_index(self) -> int:
        return self.plan.layer_index

    def set_precision(self, role: Role, precision: OperandPrecision | None) -> None:
        """Ask for an operand's widths from the next step on; None is 8 bits.

        Raises:
            ValueError: W's shape does not broadcast to its grid, or blocks that re-quantize are
                given more than one width.
        """
        if precision is not None:
            values = precision.values
            if self.plan.format.requantizes and (values.numel() != 1 or precision.bits is None):
                raise ValueError(
                    f"blocks {self.plan.format.block_shape} re-quantize for each GEMM and take "
                    f"one fixed width, not a map"
                )
            if role is Role.WEIGHT:
                grid = self.grid_shape(Role.WEIGHT)
                if (
                    torch.broadcast_shapes(values.shape, grid) != grid
                    if _broadcasts(values.shape, grid)
                    else True
                ):
                    raise ValueError(
                        f"{self.layer_name}: W's map of shape {tuple(values.shape)} does not "
                        f"broadcast to its grid {grid}"
                    )
            elif values.ndim and not self._fits(role, tuple(values.shape)):
                raise ValueError(
                    f"{self.layer_name}: {role.letter}'s map has shape {tuple(values.shape)}, "
                    f"not row axis 1, any positions and "
                    f"{self._channel_blocks(role)} channel blocks on axis "
                    f"{self.geometry.channel_axis}"
                )
            if role not in SHARED and precision.backward_bits < MAX_BITS:
                raise ValueError(
                    f"backward_bits limits what backward reads of X and W: {role.letter} takes "
                    f"none, not {precision.backward_bits}"
                )
            self._precision[role] = precision
        else:
            self._precision.pop(role, None)
        setattr(
            self,
            _REQUESTS[role],
            _saveable(_default_request() if precision is None else precision.values),
        )
        self._settings[SETTINGS * role : SETTINGS * (role + 1)] = settings_of(precision)

    def get_precision(self, role: Role) -> OperandPrecision | None:
        """What `set_precision` was given last."""
        return self._precision.get(role)

    def grid_shape(self, role: Role, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Grid of an operand of `shape` in training; W's shape is known."""
        shape = self.plan.weight_shape() if role is Role.WEIGHT else shape
        if shape is None:
            raise ValueError(f"the grid of {role.letter} needs the operand's shape")
        return self.plan.layout(role, shape, Gemm.FORWARD).grid_shape

    @property
    def keeps_gradient(self) -> bool:
        """Whether recorded calls keep dW from the first on, to be summed over micro-batches or
        ranks; set before the step.
        """
        return self._slot.keeps_gradient

    @keeps_gradient.setter
    def keeps_gradient(self, keeps: bool) -> None:
        self._slot.keeps_gradient = keeps

    @property
    def gradient(self) -> Tensor | None:
        """dW summed over the calls recorded since `clear_observation` that kept theirs; None if
        none did.
        """
        return self._slot.gradient

    def gradient_squares(self, gradient: Tensor) -> Tensor:
        """Mean squares of a dW on W's grid, as an observation's dw_square."""
        return weight_squares(self.plan, gradient)

    def observations(self) -> list[LayerObservation]:
        """All calls recorded while `observing` was true since `clear_observation`, in the order of
        their backward.
        """
        return [self._observation(record) for record in self._slot.records]

    def observation(self) -> LayerObservation | None:
        """The last call recorded while `observing` was true, with the dw_square of all; None if
        none was since `clear_observation`.
        """
        record = self._slot.latest
        if record is None:
            return None
        if record.squares and self.gradient is not None:
            record = replace(
                record,
                squares={**record.squares, "dw_square": self.gradient_squares(self.gradient)},
            )
        return self._observation(record)

    def _observation(self, record: StepRecord) -> LayerObservation:
        headers = dict(zip(Role, record.headers[: len(Role)], strict=True))
        backward = dict(zip(SHARED, record.headers[len(Role) :], strict=True))
        # Where backward reads other blocks than FORWARD, beside those that are cut anew anyway:
        # fewer bits, or a layer in eval mode.
        copies = [
            r
            for r in SHARED
            if has_limit(self._settings, r)
            or (not self.format.requantizes and backward[r].data_ptr() != headers[r].data_ptr())
        ]
        grid = self.grid_shape(Role.ACTIVATION, record.input_shape)
        x_unsigned = _unsigned_share(headers[Role.ACTIVATION])
        if headers[Role.ACTIVATION].numel() != math.prod(grid):
            headers[Role.ACTIVATION] = _rows_together(
                headers[Role.ACTIVATION], self.format.block_shape[0]
            )
        return LayerObservation(
            geometry=self.geometry,
            input_shape=record.input_shape,
            output_shape=self.plan.output_shape(record.input_shape),
            has_dgrad=record.has_dgrad,
            has_wgrad=record.has_wgrad,
            order=record.order,
            bits={r: header_bits(h) for r, h in headers.items()},
            backward_bits={
                r: self._backward_bits(r, header_bits(headers[r]), header_bits(backward[r]))
                for r in copies
            },
            occupied={r: header_occupied(h) for r, h in headers.items()},
            nonfinite=dict(zip(Role, record.nonfinite, strict=True)),
            x_unsigned=x_unsigned,
            squares=record.squares,
            probe=record.probe,
            gradient_energy=record.gradient_energy,
            first_columns=None if self.plan.band is None else self.plan.band.first_columns,
        )

    def _backward_bits(self, role: Role, forward: Tensor, backward: Tensor) -> Tensor:
        """On FORWARD's grid; blocks that are cut anew for each GEMM have one width, which a limit
        cuts alike.
        """
        return (
            forward.clamp(max=role_settings(self._settings, role)[3])
            if self.plan.format.requantizes
            else backward
        )

    @property
    def has_records(self) -> bool:
        """Whether anything was recorded since `clear_observation`."""
        return bool(self._slot.records)

    def clear_observation(self) -> None:
        """Forget what was recorded."""
        self._slot.clear()

    def take_uses(self) -> tuple[int, ...]:
        """How often each GEMM has run with a backward pass since this was asked last, by `Gemm`;
        FORWARD's without one do not count.
        """
        uses, self._slot.uses = tuple(self._slot.uses), [0] * len(Gemm)
        return uses

    @property
    def uses(self) -> tuple[int, ...]:
        """What `take_uses` would say."""
        return tuple(self._slot.uses)

    def admit(self, x: Tensor) -> None:
        """What every call looks at first.

        Raises:
            RuntimeError: a transform that reads no memory (torch.func), or a layer that was changed
                after its conversion.
            TypeError: an input or a weight of another kind than strided float32, bfloat16 or
                float16.
            ValueError: another number of channels.
        """
        if not torch.compiler.is_compiling() and self.stream.watch is not None:
            self.stream.watch()
        refuse_transforms(self.layer_name)
        weight, plan = self.weight, self.plan
        for name, t in (("input", x), ("weight", weight)):
            if (
                (type(t) is not Tensor and type(t) is not nn.Parameter)
                or t.layout is not torch.strided
                or t.is_nested
                or t.dtype not in _TYPES
            ):
                _check_kind(f"{self.layer_name}: the {name}", t)
        if weight.shape != plan.geometry.weight_shape or self._options() != self._converted_options:
            raise RuntimeError(
                f"{self.layer_name} was changed after its conversion: its weight is "
                f"{tuple(weight.shape)} and its options are "
                f"{self._options()}, not {plan.geometry.weight_shape} and "
                f"{self._converted_options}; change a layer before it is converted"
            )
        if x.ndim < 2:
            raise ValueError(
                f"{self.layer_name} takes one axis of features at least, not a single number"
            )
        channels = x.shape[plan.geometry.channel_axis]
        if channels != plan.geometry.in_channels:
            raise ValueError(
                f"{self.layer_name} reads {plan.geometry.in_channels} channels, not {channels} "
                f"(input {tuple(x.shape)})"
            )

    def __prepare_scriptable__(self) -> Never:
        refuse_torchscript(self.layer_name)  # torch.jit.script asks here first

    def _options(self) -> tuple[Any, ...]:
        """What the geometry was made from, beside the weight."""
        return ()

    def _plainly(self, x: Tensor) -> Tensor:
        """torch's own result for the master weights."""
        raise NotImplementedError

    def _of_nothing(self, x: Tensor) -> Tensor:
        """An empty batch (of an expert, a detection head) has nothing to quantize: torch's empty
        result and its gradients of zeros.
        """
        with torch.autocast(x.device.type, enabled=False):
            return self._plainly(x.to(self.weight.dtype)).to(_result_type(x))

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wt + bias of a batch that is padded as far as it must be, in x's type, or autocast's
        where that is on.
        """
        weight, plan, device = self.weight, self.plan, x.device
        shape = tuple(x.shape)
        output_shape = plan.output_shape(shape)
        if any(n < 1 for n in output_shape):
            raise ValueError(
                f"{self.layer_name}: the kernel does not fit an input of {shape}: the output "
                f"would be {output_shape}"
            )
        # A network that is exported in eval mode is to predict: what a backward pass would keep has
        # as many blocks as there are fours in the batch, which ties the graph to batches of so
        # many.
        wants_gradients = torch.is_grad_enabled() and (
            self.training or not torch.compiler.is_exporting()
        )
        needs = [wants_gradients and t is not None and t.requires_grad for t in (x, weight, bias)]
        observing = any(needs) and self.observing
        return apply_layer(
            x,
            weight,
            bias,
            self._request(Role.ACTIVATION, shape, device),
            self._request_on(Role.WEIGHT, device),
            self._request(Role.ERROR, output_shape, device)
            if not self.exact_errors
            else _default_request(device),
            self.stream.position(self.layer_index) if any(needs) else self.stream.counters,
            [*self._settings[:-SETTINGS], *settings_of(None)]
            if self.exact_errors
            else self._settings,
            plan.key,
            self._slot_key
            if any(needs) and not torch.compiler.is_exporting()
            else "",  # another process has other slots
            self.training,
            needs[1] or observing,  # WGRAD reads X
            needs[0] or observing,  # DGRAD reads W
            _result_type(x),
        )

    @property
    def _slot_key(self) -> str:
        """Where to record, and what; harm is measured where every operand has thresholds that can
        be shifted.
        """
        if not self.observing:
            return self._slot.key + COUNT_ONLY
        if self.headers_only:
            return self._slot.key + HEADERS_ONLY
        return self._slot.key + (
            PROBING if self.probing and all(self._settings[::SETTINGS]) else ""
        )

    def activation_request(self, shape: tuple[int, ...]) -> tuple[Tensor, bool, int, int]:
        """What X of `shape` is asked to have: the map, whether it holds thresholds, least and most
        bits.
        """
        thresholds, least, most, _ = role_settings(self._settings, Role.ACTIVATION)
        return self._request(Role.ACTIVATION, shape, self.weight.device), thresholds, least, most

    def _request_on(self, role: Role, device: torch.device) -> Tensor:
        request: Tensor = getattr(self, _REQUESTS[role])
        if request.device != device:
            request = _saveable(request.to(device))
            if device.type != "meta":  # which holds no values to come back from
                setattr(self, _REQUESTS[role], request)
        return request

    def _request(self, role: Role, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The map for an operand of `shape`; one value for each channel block where the positions
        are not those of the map.
        """
        request = self._request_on(role, device)
        if request.ndim == 0:
            return request
        positions = [
            a for a in range(1, request.ndim) if a != self.geometry.channel_axis % request.ndim
        ]
        if request.ndim == len(shape) and all(request.shape[a] in (1, shape[a]) for a in positions):
            return request
        channel_first = request.movedim(self.geometry.channel_axis, 0).flatten(1)
        coarse = channel_first.amin(1) if self._settings[SETTINGS * role] else channel_first.amax(1)
        axis = self.geometry.channel_axis % len(shape)
        return coarse.view([-1 if a == axis else 1 for a in range(len(shape))])

    def _channel_blocks(self, role: Role) -> int:
        channels = (
            self.geometry.in_channels if role is Role.ACTIVATION else self.geometry.out_channels
        )
        return -(-channels // self.plan.format.block_shape[1])

    def _fits(self, role: Role, shape: tuple[int, ...]) -> bool:
        axis = self.geometry.channel_axis
        return len(shape) >= 2 and shape[0] == 1 and shape[axis] in (1, self._channel_blocks(role))


def _check_kind(name: str, tensor: Tensor) -> None:
    """Raises TypeError for what is not memory of the kernels' types: other layouts and types, and
    subclasses that hold something else.
    """
    kind = type(tensor)
    holds_memory = kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or issubclass(
        kind, FakeTensor | FunctionalTensor
    )
    if not holds_memory or tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(
            f"{name} is a {kind.__name__} ({layout}): converted layers take plain, dense "
            f"tensors; exclude the layer"
        )
    if tensor.dtype not in _TYPES:
        raise TypeError(
            f"{name} is {tensor.dtype}: converted layers take float32, bfloat16 or float16, not "
            f"{tensor.dtype}"
        )


def _result_type(x: Tensor) -> torch.dtype:
    """x's, or autocast's where that is on."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _default_request(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(_DEFAULT_BITS, dtype=torch.uint8, device=device)


def _saveable(request: Tensor) -> Tensor:
    """What was made in inference mode cannot be saved for a backward pass."""
    if not request.is_inference():
        return request
    with torch.inference_mode(False):
        return request.clone()


def _rows_together(headers: Tensor, rows: int) -> Tensor:
    """Headers of blocks of one row, as eval mode has them -> those of whole blocks: the core keeps
    the most bits that a row has.
    """
    groups = headers.split(rows)
    bits = torch.stack([header_bits(g).amax(0) for g in groups])
    occupied = torch.stack([header_occupied(g).amax(0) for g in groups])
    return make_headers(bits, torch.stack([header_signed(g).amax(0) for g in groups]), occupied)


def _unsigned_share(headers: Tensor) -> float:
    """Of the blocks that are not zero; 0 without any."""
    nonzero = header_bits(headers) > 0
    return (
        1.0 - int(header_signed(headers).sum()) / int(nonzero.sum()) if bool(nonzero.any()) else 0.0
    )


def _broadcasts(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    try:
        torch.broadcast_shapes(shape, grid)
    except RuntimeError:
        return False
    return True


class BlockLinear(DynamicLayer, nn.Linear):
    """nn.Linear in dynamic precision; blocks are rows of the batch x features at one token."""

    def forward(self, input: Tensor) -> Tensor:
        batch = input.unsqueeze(0) if input.ndim == 1 else input
        self.admit(batch)
        output = self.multiply(batch, self.bias) if batch.numel() else self._of_nothing(batch)
        return output.squeeze(0) if input.ndim == 1 else output

    def _plainly(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _BlockConv(DynamicLayer, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        spatial = len(self.kernel_size)
        batch = input.unsqueeze(0) if input.ndim == spatial + 1 else input
        if batch.ndim != spatial + 2:
            raise ValueError(
                f"{self.layer_name} takes {spatial + 1} or {spatial + 2} axes, not {input.ndim} "
                f"(input {tuple(input.shape)})"
            )
        self.admit(batch)
        if not batch.numel():
            return self._of_nothing(batch)
        if pads_explicitly(self):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            batch = F.pad(batch, self._reversed_padding_repeated_twice, mode=mode)
        output = self.multiply(batch, self.bias)
        return output.squeeze(0) if input.ndim == spatial + 1 else output

    def _plainly(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)  # type: ignore[no-any-return, operator]

    def _options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups, self.padding_mode


class BlockConv1d(_BlockConv, nn.Conv1d):
    """nn.Conv1d in dynamic precision; blocks are samples x channels at one position."""


class BlockConv2d(_BlockConv, nn.Conv2d):
    """nn.Conv2d in dynamic precision; blocks are samples x channels at one pixel."""


class BlockConv3d(_BlockConv, nn.Conv3d):
    """nn.Conv3d in dynamic precision; blocks are samples x channels at one voxel."""


CONVERTED_TYPES: Final[Mapping[type[nn.Module], type[DynamicLayer]]] = {
    nn.Linear: BlockLinear,
    nn.Conv1d: BlockConv1d,
    nn.Conv2d: BlockConv2d,
    nn.Conv3d: BlockConv3d,
}


def pads_explicitly(conv: nn.modules.conv._ConvNd) -> bool:
    """True where the input is padded before it is quantized: not with zeros, or not alike on both
    sides.
    """
    if conv.padding_mode != "zeros":
        return True
    pairs = conv._reversed_padding_repeated_twice
    return conv.padding == "same" and any(pairs[i] != pairs[i + 1] for i in range(0, len(pairs), 2))


def geometry_of(module: nn.Module) -> LayerGeometry:
    """The geometry of an nn.Linear or nn.Conv, explicit padding taken out."""
    if isinstance(module, nn.Linear):
        return LayerGeometry(kind="linear", weight_shape=tuple(module.weight.shape))
    assert isinstance(module, nn.modules.conv._ConvNd)
    spatial = len(module.kernel_size)
    padding: tuple[int, ...] = (0,) * spatial
    if not pads_explicitly(module):
        # Last axis first, each side; alike on both sides here.
        padding = tuple(module._reversed_padding_repeated_twice[::2])[::-1]
        if module.padding == "valid":
            padding = (0,) * spatial
    return LayerGeometry(
        kind="conv",
        weight_shape=tuple(module.weight.shape),
        stride=tuple(module.stride),
        padding=padding,
        dilation=tuple(module.dilation),
        groups=module.groups,
    )


def dynamic_layers(model: nn.Module) -> dict[str, DynamicLayer]:
    """Converted layers by name, in the order of conversion; a layer used under two names stands
    once.
    """
    found = {m.layer_name: m for m in model.modules() if isinstance(m, DynamicLayer)}
    return dict(sorted(found.items(), key=lambda item: item[1].layer_index))


__all__ = [
    "CONVERTED_TYPES",
    "BlockConv1d",
    "BlockConv2d",
    "BlockConv3d",
    "BlockLinear",
    "DynamicLayer",
    "LayerObservation",
    "StreamState",
    "check_seed",
    "dynamic_layers",
    "geometry_of",
]
