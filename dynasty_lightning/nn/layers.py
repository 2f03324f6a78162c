# SPDX-License-Identifier: Apache-2.0
"""Converted layers: nn.Linear and nn.Conv1d/2d/3d whose three GEMMs read quantized operands.

A layer becomes one by `module.__class__ = ...`, so parameters, ties, `isinstance` and `state_dict`
keys stay as they are.
"""

from collections.abc import Mapping
from typing import Any, Final, Never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..numerics.formats import BlockFormat
from ..numerics.geometry import LayerGeometry
from ..numerics.observation import LayerObservation as LayerObservation
from ..numerics.roles import Role
from .gemms import SETTINGS, settings_of
from .layer_precision import LayerPrecision, default_request
from .observe import ObservationSlot, Observe
from .observed import ObservedLayer
from .ops import apply_layer
from .plan import LayerPlan, Mode
from .refusals import refuse_torchscript, refuse_transforms
from .stream import StreamState as StreamState
from .stream import check_seed as check_seed

_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


class DynamicLayer(LayerPrecision, ObservedLayer):
    """What every converted layer has beside its own class. Made by `adopt`, never constructed.

    >>> from dynasty_lightning import OperandPrecision, convert
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> _ = convert(model)
    >>> layer = model[0]
    >>> isinstance(layer, DynamicLayer), layer.layer_name, layer.grid_shape(Role.WEIGHT)
    (True, '0', (1, 2))
    >>> layer.set_precision(Role.WEIGHT, OperandPrecision(bits=4))
    >>> layer.get_precision(Role.WEIGHT).bits
    tensor(4, dtype=torch.uint8)
    """

    stream: StreamState

    def adopt(self, *, name: str, plan: LayerPlan, stream: StreamState) -> None:
        """Give a freshly swapped layer its state."""
        self.join(name=name, plan=plan, stream=stream)
        self.observe(Observe.NOTHING)
        self.slot = ObservationSlot()
        self._converted_options = self._options()
        self._ask_for_defaults()

    def join(self, *, name: str, plan: LayerPlan, stream: StreamState) -> None:
        """Make the layer one of a model's: its name and index there, and the stream that all of its
        layers share.
        """
        self.layer_name, self.plan, self.stream = name, plan, stream
        _ = (
            plan.key,
            plan.band,
        )  # computed here: torch.compile cannot trace the lock of a cached property

    @property
    def format(self) -> BlockFormat:
        return self.plan.format

    @property
    def mode(self) -> Mode:
        return self.plan.mode

    @property
    def layer_index(self) -> int:
        return self.plan.layer_index

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
            else default_request(device),
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


class BlockLinear(DynamicLayer, nn.Linear):
    """nn.Linear in dynamic precision; blocks are rows of the batch x features at one token.

    >>> from dynasty_lightning import convert
    >>> model = nn.Sequential(nn.Linear(8, 4, bias=False))
    >>> _ = convert(model)
    >>> type(model[0]).__name__, tuple(model(torch.ones(2, 5, 8)).shape)
    ('BlockLinear', (2, 5, 4))
    """

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
    """nn.Conv1d in dynamic precision; blocks are samples x channels at one position.

    >>> from dynasty_lightning import convert
    >>> model = nn.Sequential(nn.Conv1d(4, 8, 3))
    >>> _ = convert(model)
    >>> type(model[0]).__name__, tuple(model(torch.ones(2, 4, 5)).shape)
    ('BlockConv1d', (2, 8, 3))
    """


class BlockConv2d(_BlockConv, nn.Conv2d):
    """nn.Conv2d in dynamic precision; blocks are samples x channels at one pixel.

    >>> from dynasty_lightning import convert
    >>> model = nn.Sequential(nn.Conv2d(4, 8, 3))
    >>> _ = convert(model)
    >>> type(model[0]).__name__, tuple(model(torch.ones(2, 4, 5, 5)).shape)
    ('BlockConv2d', (2, 8, 3, 3))
    """


class BlockConv3d(_BlockConv, nn.Conv3d):
    """nn.Conv3d in dynamic precision; blocks are samples x channels at one voxel.

    >>> from dynasty_lightning import convert
    >>> model = nn.Sequential(nn.Conv3d(4, 8, 3))
    >>> _ = convert(model)
    >>> type(model[0]).__name__, tuple(model(torch.ones(2, 4, 5, 5, 5)).shape)
    ('BlockConv3d', (2, 8, 3, 3, 3))
    """


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
    """The geometry of an nn.Linear or nn.Conv, explicit padding taken out.

    >>> geometry_of(nn.Conv2d(4, 8, 3, stride=2, padding=1)).stride
    (2, 2)
    """
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


def check_module(model: Any) -> None:
    """Raises TypeError for what is no module, a class too.

    >>> check_module(nn.Linear)
    Traceback (most recent call last):
    TypeError: needs a torch.nn.Module, not <class 'torch.nn.modules.linear.Linear'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"needs a torch.nn.Module, not {model!r}")


def dynamic_layers(model: nn.Module) -> dict[str, DynamicLayer]:
    """Converted layers by name, in the order of conversion; a layer used under two names stands
    once.

    Raises:
        TypeError: no module.

    >>> from dynasty_lightning import convert
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> _ = convert(model)
    >>> list(dynamic_layers(model))
    ['0', '2']
    """
    check_module(model)
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
