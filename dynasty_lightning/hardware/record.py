# SPDX-License-Identifier: Apache-2.0
"""Records a run of a network as steps of a program.

A network is run, not read: torch reduces functions, methods, modules and operators in all their
forms to the same operations (ATen's), with arguments named and defaults filled in, and these are
what becomes a step. A tensor is known by the memory that it shows, so that what changes it in place
is seen by whoever reads it later under another name. What is not computed from the input is a
constant.
"""

import functools
import linecache
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fpga import GemmConfig, Operand
from fpga.operand import pack

from ..nn.gemms import EXECUTORS
from ..nn.layers import DynamicLayer, dynamic_layers
from ..nn.plan import LayerPlan
from ..numerics.quantize import QuantizedBlocks
from ..numerics.roles import Gemm, Role
from .operands import operand_of

_EXECUTOR: Final = "export"
_INPUT: Final = -1
_TORCH: Final = str(Path(torch.__file__).parent)
_LAYERS: Final = str(Path(__file__).parents[1] / "nn")

Array = np.ndarray[Any, Any]
Call = Mapping[str, Any]
Key = tuple[Any, ...]


class ExportError(ValueError):
    """A network that cannot be a program; the message names the operation and its place."""


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A step before it has its name. `inputs` are indices of earlier nodes; `shape` is the
    result's, with the batch.
    """

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    hint: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)


def recorded_steps(
    network: nn.Module, shape: tuple[int, ...], batch: int, config: GemmConfig
) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Steps and constants of a run in eval mode on a batch of random samples. Raises ExportError,
    or what the network raises.
    """
    device = next(iter(dynamic_layers(network).values())).weight.device
    recorder = _Recorder(batch, config)
    # Max pooling along one axis shows what it does only where gradients are wanted; a leaf may not
    # be changed in place.
    with torch.enable_grad():
        example = torch.randn(batch, *shape, device=device, requires_grad=True).clone()
    recorder.learn(example, _INPUT)
    with _listening(network, recorder), torch.enable_grad(), recorder:
        result = network(example)
    if not isinstance(result, Tensor):
        raise ExportError(f"the network must return one tensor, not {type(result).__name__}")
    last = recorder.index_of(result)
    if last is None or last == _INPUT:
        raise ExportError(
            "the network returns its input, or what is not computed from it by operations that "
            "torch shows"
        )
    return _named(_pools_along_one_axis(recorder.nodes), last)


class _Recorder(TorchDispatchMode):
    """Turns operations on what is computed from the input into nodes."""

    def __init__(self, batch: int, config: GemmConfig) -> None:
        super().__init__()
        self.batch, self.config = batch, config
        self.nodes: list[_Node] = []
        self.modules: list[tuple[str, nn.Module]] = []  # that are running, innermost last
        self.paused = False
        self._index: dict[Key, int] = {}
        self._unreadable: dict[Key, str] = {}
        self._storages: list[Any] = []  # kept, so that no address is used twice

    # -- tensors

    def learn(self, tensor: Tensor, index: int) -> None:
        """The tensor's memory holds the result of a node from now on."""
        self._storages.append(tensor.untyped_storage())
        self._index[_key(tensor)] = index
        self._unreadable.pop(_key(tensor), None)

    def index_of(self, tensor: Tensor) -> int | None:
        """The node whose result a tensor is; None for a constant."""
        if (reason := self._unreadable.get(_key(tensor))) is not None:
            self.refuse(reason)
        return self._index.get(_key(tensor))

    def _is_known(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._index or _key(tensor) in self._unreadable

    def _changed_in_place(self, tensor: Tensor) -> None:
        """Other views of the memory are no longer what their nodes computed."""
        for key in [k for k in self._index if k[0] == _key(tensor)[0] and k != _key(tensor)]:
            del self._index[key]
            self._unreadable[key] = (
                "a view of a tensor that was changed in place since: change a copy, or read it anew"
            )

    # -- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [] if self.paused else _tensors((*args, *kwargs.values()))
        if not any(self._is_known(t) for t in tensors):
            return func(*args, **kwargs)
        call = _bound(func._schema, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        if (reason := self._unreadable.get(_key(tensors[0]))) is not None and _HANDLERS.get(
            name
        ) is _view:
            result = func(*args, **kwargs)
            self.mark_unreadable(result, reason)
            return result
        handler = _HANDLERS.get(name) or _HANDLERS.get(name.removesuffix("_"))
        if handler is None:
            self.refuse("no such operation", name)
        result = func(*args, **kwargs)
        changed = [
            call[a.name]
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write
        ]
        if changed and self.index_of(changed[0]) is None:
            self.refuse("no constants that change", name)
        handler(self, call, result, name)
        for tensor in changed:
            self._changed_in_place(tensor)
        return result

    def add(
        self, result: Tensor, op: str, *inputs: Tensor, arrays: Any = None, **settings: Any
    ) -> None:
        """A node that computes `result`."""
        self.chain(result, op, *(self._read(x) for x in inputs), arrays=arrays, **settings)

    def _node(
        self,
        shape: tuple[int, ...],
        op: str,
        inputs: tuple[int, ...],
        arrays: Mapping[str, Array],
        settings: Mapping[str, Any],
        dtype: Any,
    ) -> int:
        if dtype is not torch.float32:
            self.refuse(f"no tensors of type {dtype}, float32 alone", op)
        if len(shape) < 2 or shape[0] != self.batch:
            self.refuse(
                f"no result of shape {list(shape)} for {self.batch} samples: the batch stays "
                f"the first axis of two or more",
                op,
            )
        for what, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                self.refuse(f"no {what} that holds NaN or Inf", op)
        self.nodes.append(
            _Node(
                op=op,
                inputs=inputs,
                shape=shape,
                hint=self._hint(op),
                settings=settings,
                arrays=arrays,
            )
        )
        return len(self.nodes) - 1

    def _read(self, tensor: Tensor) -> int:
        index = self.index_of(tensor)
        if index is None:
            self.refuse("no such operation on a constant")
        return index

    def same(self, result: Tensor, x: Tensor) -> None:
        """`result` holds what x does."""
        self.learn(result, self._read(x))

    def scaled(self, x: Tensor, factor: float) -> int:
        """A node that multiplies x, as a step before another."""
        return self._node(
            tuple(x.shape),
            "multiply_constant",
            (self._read(x),),
            {"value": np.array(factor, np.float32)},
            {},
            x.dtype,
        )

    def chain(
        self, result: Tensor, op: str, *inputs: int, arrays: Any = None, **settings: Any
    ) -> None:
        """As `add`, of nodes."""
        self.learn(
            result,
            self._node(tuple(result.shape), op, inputs, arrays or {}, settings, result.dtype),
        )

    def reshaped(self, x: int, shape: tuple[int, ...]) -> int:
        """A node that gives a node's result another shape, as a step before another."""
        return self._node(shape, "reshape", (x,), {}, {"shape": list(shape[1:])}, torch.float32)

    def mark_unreadable(self, tensor: Tensor, reason: str) -> None:
        self._storages.append(tensor.untyped_storage())
        self._unreadable[_key(tensor)] = reason

    # -- layers

    def layer(
        self, name: str, layer: DynamicLayer, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """In place of a layer's multiplication: a step, and random numbers for its result."""
        index = self.index_of(x)
        if index is None:
            self.refuse("no layer that reads a constant", name)
        weight, output = self._weight(layer, x)
        shape = tuple(x.shape)
        request, thresholds, least, most = layer.activation_request(shape)
        geometry = layer.geometry
        packed = pack(weight, self.config)
        arrays = {
            "weight": packed.words,
            "weight_base": packed.bases,
            "request": _positions_channels(request, geometry.channel_axis, shape),
        }
        if bias is not None:
            arrays["bias"] = _numpy(bias.float())
        settings: dict[str, Any] = {
            "weight_shape": list(weight.shape),
            "is_threshold": thresholds,
            "least_bits": least,
            "most_bits": most,
        }
        if geometry.kind == "conv":
            settings |= {
                "taps": list(geometry.taps),
                "stride": list(geometry.stride),
                "padding": list(geometry.padding),
            }
            settings |= {"dilation": list(geometry.dilation), "output": list(output.shape[2:])}
        elif arrays["request"].shape[1] != 1:
            self.refuse("no Linear whose activations have a map for each token", name)
        self.learn(
            output,
            self._node(
                tuple(output.shape), geometry.kind, (index,), arrays, settings, output.dtype
            ),
        )
        return output

    def _weight(self, layer: DynamicLayer, x: Tensor) -> tuple[Operand, Tensor]:
        """Quantized W as the core takes it, and a tensor of the result's shape."""
        weights: list[Operand] = []

        def execute(
            gemm: Gemm,
            left: QuantizedBlocks,
            right: QuantizedBlocks,
            plan: LayerPlan,
            input_shape: tuple[int, ...],
        ) -> Tensor:
            if right.passthrough is not None:
                self.refuse("no weights that hold NaN or Inf", layer.layer_name)
            weights.append(operand_of(right, Role.WEIGHT, plan))
            return torch.zeros(plan.output_shape(input_shape), device=x.device)

        plan, self.paused = layer.plan, True
        EXECUTORS[_EXECUTOR] = execute
        try:
            layer.plan = replace(plan, executor=_EXECUTOR)
            with torch.no_grad():
                result = type(layer).multiply(layer, x)
            output = torch.randn_like(result, requires_grad=True).clone()
        finally:
            layer.plan, self.paused = plan, False
            del EXECUTORS[_EXECUTOR]
        return weights[0], output

    # -- words

    def leave(self, module: nn.Module, inputs: Any, result: Any) -> None:
        """A module has run: a forward hook."""
        self.modules.pop()

    def _hint(self, op: str) -> str:
        """A step's name: its module's, or what it does."""
        if not self.modules:
            return op
        name, module = self.modules[-1]
        if isinstance(module, DynamicLayer):
            return name if op in ("conv", "linear") else f"{name}.{op}"
        is_leaf = not any(True for _ in module.children()) and type(module).__module__.startswith(
            "torch.nn."
        )
        return name if is_leaf and name else op

    def refuse(self, what: str, name: str = "") -> NoReturn:
        """Raise ExportError: what runs calls the operation `name`, for which the runtime has
        `what`; without a name, it reads `what`.
        """
        path, module = self.modules[-1] if self.modules else ("", None)
        subject = f"{path} ({type(module).__name__})" if path else "the network"
        if not name:
            raise ExportError(f"{subject}{_place()} reads {what}")
        raise ExportError(
            f"{subject}{_place()} calls {name}: the runtime has {what}. Replace it by an "
            f"operation of "
            "fpga.program.STEP_KINDS, or export the network up to there"
        )


def _place() -> str:
    """The innermost frame that is neither torch's nor ours, as ", at file:line `source`,"; nothing
    where there is none.
    """
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((_TORCH, _LAYERS, "<")) and path != __file__:
            break
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or Path(frame.f_code.co_filename) == Path(__file__).with_name("program.py"):
        return ""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f", at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} `{line}`,"


@contextmanager
def _listening(network: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tells the recorder which module runs, and has it multiply in the layers' place."""
    handles: list[Any] = []
    layers = dynamic_layers(network)
    try:
        for name, module in network.named_modules():
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, _, name=name: recorder.modules.append((name, m))
                )
            )
            handles.append(module.register_forward_hook(recorder.leave, always_call=True))
            if isinstance(module, DynamicLayer):
                vars(module)["multiply"] = functools.partial(recorder.layer, name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.__dict__.pop("multiply", None)


# -- what operations become

Handler = Callable[[_Recorder, Call, Any, str], None]


def _relu(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    r.add(result, "relu", call["self"])


def _clip(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    low, high = (call.get(a, call.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        r.refuse("no limits that are tensors", name)
    r.add(result, "clip", call["self"], low=_limit(low), high=_limit(high))


def _limit(value: Any) -> float | None:
    """A clamp to infinity is none."""
    return None if value is None or math.isinf(value) else float(value)


def _add(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x, y, alpha = call["self"], call["other"], call.get("alpha", 1)
    if not _is_activation(r, x):  # a constant less a tensor
        x, y, alpha, scale = y, x, 1, alpha
        _plus_constant(r, result, x, r.scaled(x, scale) if scale != 1 else None, y, 1, name)
    elif not _is_activation(r, y):
        _plus_constant(r, result, x, None, y, alpha, name)
    else:
        _check_ranks(r, x, y, name)
        r.chain(result, "add", r._read(x), r._read(y) if alpha == 1 else r.scaled(y, alpha))


def _subtract(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x, y, alpha = call["self"], call["other"], call.get("alpha", 1)
    if name.startswith("rsub"):
        x, y = y, x
        if alpha != 1:
            r.refuse("no alpha in rsub", name)
    if not _is_activation(r, x):
        # c - x = -x + c, to the bit
        _plus_constant(r, result, y, r.scaled(y, -alpha), x, 1, name)
    elif not _is_activation(r, y):
        _plus_constant(r, result, x, None, y, -alpha, name)
    else:
        _check_ranks(r, x, y, name)
        r.chain(result, "subtract", r._read(x), r._read(y) if alpha == 1 else r.scaled(y, alpha))


def _plus_constant(
    r: _Recorder,
    result: Tensor,
    x: Tensor,
    scaled: int | None,
    constant: Any,
    alpha: float,
    name: str,
) -> None:
    value = _constant(r, constant, x, name) * np.float32(alpha)
    r.chain(
        result, "add_constant", r._read(x) if scaled is None else scaled, arrays={"value": value}
    )


def _multiply(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x, y = call["self"], call["other"]
    if not _is_activation(r, x):
        x, y = y, x
    if _is_activation(r, y):
        _check_ranks(r, x, y, name)
        r.add(result, "multiply", x, y)
    else:
        r.add(result, "multiply_constant", x, arrays={"value": _constant(r, y, x, name)})


def _divide(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x, y = call["self"], call["other"]
    if call.get("rounding_mode") is not None:
        r.refuse("no division that rounds", name)
    if not _is_activation(r, x) or _is_activation(r, y):
        r.refuse("no division but by a constant", name)
    r.add(result, "divide_constant", x, arrays={"value": _constant(r, y, x, name)})


def _negate(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    r.chain(
        result,
        "multiply_constant",
        r._read(call["self"]),
        arrays={"value": np.array(-1, np.float32)},
    )


def _is_activation(r: _Recorder, value: Any) -> bool:
    return isinstance(value, Tensor) and r.index_of(value) is not None


def _check_ranks(r: _Recorder, x: Tensor, y: Tensor, name: str) -> None:
    if x.ndim != y.ndim or x.shape[0] != y.shape[0]:
        r.refuse(
            f"no such operation on shapes {list(x.shape)} and {list(y.shape)}, which do not "
            f"begin with the same batch",
            name,
        )


def _constant(r: _Recorder, value: Any, x: Tensor, name: str) -> Array:
    """A number or a tensor that goes with each sample of x, float32: without axes, or with a
    sample's, each whole or 1.
    """
    if not isinstance(value, Tensor):
        return np.array(value, np.float32)
    shape = (*[1] * (x.ndim - value.ndim), *value.shape)
    if (
        value.ndim > x.ndim
        or shape[0] != 1
        or any(n not in (1, m) for n, m in zip(shape, x.shape, strict=True))
    ):
        r.refuse(
            f"no constant of shape {list(value.shape)} beside a tensor of shape {list(x.shape)}",
            name,
        )
    array = _numpy(value.float())
    return array.reshape(()) if array.size == 1 else array.reshape(shape[1:])


def _mean(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x, given = call["self"], call.get("dim")
    axes = list(range(x.ndim)) if not given else sorted(a % x.ndim for a in given)
    if 0 in axes:
        r.refuse("no mean over the batch, or over all axes", name)
    own = {} if axes == list(range(2, x.ndim)) else {"axes": axes}
    r.add(result, "mean", x, keepdims=bool(call.get("keepdim")), **own)


def _pool(r: _Recorder, call: Call, result: Any, name: str) -> None:
    x = call["self"]
    axes = int(name[name.index("d_") - 1] if "d_" in name else name[-2])
    if x.ndim != axes + 2:
        r.refuse(
            f"no pooling along {axes} axes of a tensor of shape {list(x.shape)}: batch, "
            f"channels, positions",
            name,
        )
    taps, padding = (_whole(call[n], axes) for n in ("kernel_size", "padding"))
    settings: dict[str, Any] = {
        "taps": taps,
        "stride": _whole(call["stride"] or taps, axes),
        "padding": padding,
    }
    if call["ceil_mode"]:
        settings["ceil"] = True
    if name.startswith("max"):
        dilation = _whole(call["dilation"], axes)
        r.add(
            result[0],
            "max_pool",
            x,
            **settings,
            **({"dilation": dilation} if set(dilation) != {1} else {}),
        )
        r.mark_unreadable(
            result[1], "the indices of a max pooling, which the runtime does not have"
        )
        return
    if call["divisor_override"] is not None:
        settings["divisor"] = call["divisor_override"]
    if not call["count_include_pad"]:
        settings["count_padding"] = False
    r.add(result, "average_pool", x, **settings)


def _adaptive_pool(r: _Recorder, call: Call, result: Any, name: str) -> None:
    x = call["self"]
    positions, output = list(x.shape[2:]), list(call["output_size"])
    if x.ndim != len(output) + 2 or any(n % o for n, o in zip(positions, output, strict=True)):
        r.refuse(
            f"no adaptive pooling of {positions} to {output} positions, which are no divisors", name
        )
    taps = [n // o for n, o in zip(positions, output, strict=True)]
    settings: dict[str, Any] = {"taps": taps, "stride": taps, "padding": [0] * len(taps)}
    if "max" in name:
        r.mark_unreadable(
            result[1], "the indices of a max pooling, which the runtime does not have"
        )
        result = result[0]
    if set(taps) == {1}:
        r.same(result, x)
    else:
        r.add(result, "max_pool" if "max" in name else "average_pool", x, **settings)


def _norm(r: _Recorder, call: Call, result: Any, name: str) -> None:
    mean, variance = call["running_mean"], call["running_var"]
    if call.get("training") or mean is None or variance is None:
        r.refuse("no BatchNorm without running statistics", name)
    scale = 1 / torch.sqrt(variance.double() + call["eps"])
    if call["weight"] is not None:
        scale = scale * call["weight"].double()
    shift = -mean.double() * scale
    if call["bias"] is not None:
        shift = shift + call["bias"].double()
    r.add(
        result[0],
        "affine",
        call["input"],
        arrays={"scale": _numpy(scale.float()), "shift": _numpy(shift.float())},
    )


def _view(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    """Whatever keeps all elements in their order."""
    x = call.get("self", call.get("input"))
    if result.dtype is not torch.float32:
        r.refuse(f"no tensors of type {result.dtype}, float32 alone", name)
    if result.shape == x.shape:
        r.same(result, x)
    elif result.ndim == 2:
        r.add(result, "flatten", x)
    else:
        r.add(result, "reshape", x, shape=list(result.shape[1:]))


def _transpose(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x = call["self"]
    axes = list(range(x.ndim))
    if "dims" in call:
        axes = [a % x.ndim for a in call["dims"]]
    else:
        a, b = (call.get(n, d) % x.ndim for n, d in (("dim0", 0), ("dim1", 1)))
        axes[a], axes[b] = axes[b], axes[a]
    if axes[0] != 0:
        r.refuse("no transposition that moves the batch", name)
    if axes == list(range(x.ndim)):
        r.same(result, x)
    else:
        r.add(result, "transpose", x, axes=axes[1:])


def _pad(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x, given = call["self"], list(call.get("pad", call.get("padding")))
    pairs = [list(p) for p in zip(given[::2], given[1::2], strict=True)][::-1]  # last axis first
    pairs = [[0, 0]] * (x.ndim - len(pairs)) + pairs
    if any(pairs[0]) or min(map(min, pairs)) < 0:
        r.refuse("no padding of the batch, and none that cuts off", name)
    mode = {"c": "constant", "ref": "reflect", "rep": "edge"}[
        name[0] if name[0] == "c" else name[:3]
    ]
    value = {"value": float(call["value"])} if mode == "constant" and call["value"] else {}
    r.add(result, "pad", x, padding=pairs[1:], mode=mode, **value)


def _concat(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    inputs = list(call["tensors"])
    axis = call["dim"] % result.ndim
    if axis == 0 or not all(_is_activation(r, x) for x in inputs):
        r.refuse("no concatenation along the batch, or with constants", name)
    indices = [r._read(x) for x in inputs]
    if name == "stack":
        shape = (*result.shape[:axis], 1, *result.shape[axis + 1 :])
        indices = [r.reshaped(i, shape) for i in indices]
    r.chain(result, "concat", *indices, axis=axis)


def _slice(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x, step = call["self"], call.get("step", 1)
    axis = call["dim"] % x.ndim
    size = x.shape[axis]
    if name == "select":
        begin = call["index"] % size
        end = begin + 1
    else:
        begin, end, _ = slice(call["start"], call["end"]).indices(size)
    if (begin, end, step) == (0, size, 1) and name != "select":
        r.same(result, x)
        return
    if axis == 0 or step != 1 or end <= begin:
        r.refuse("no slice of the batch, none with a step, and no empty one", name)
    if name == "select":
        whole = r._node(
            (*x.shape[:axis], 1, *x.shape[axis + 1 :]),
            "slice",
            (r._read(x),),
            {},
            _cut(axis, begin, end),
            x.dtype,
        )
        r.chain(result, "reshape", whole, shape=list(result.shape[1:]))
    else:
        r.add(result, "slice", x, **_cut(axis, begin, end))


def _split(r: _Recorder, call: Call, result: Sequence[Tensor], name: str) -> None:
    x = call["self"]
    axis = call.get("dim", 0) % x.ndim
    if axis == 0:
        r.refuse("no slice of the batch", name)
    begin = 0
    for part in result:
        end = begin + part.shape[axis]
        r.add(part, "slice", x, **_cut(axis, begin, end))
        begin = end


def _cut(axis: int, begin: int, end: int) -> dict[str, Any]:
    return {"axis": axis, "begin": begin, "end": end}


def _softmax(r: _Recorder, call: Call, result: Tensor, name: str) -> None:
    x = call["self"]
    axis = call["dim"] % x.ndim
    if axis == 0:
        r.refuse("no softmax over the batch", name)
    r.add(result, "softmax", x, axis=axis, **({"log": True} if "log" in name else {}))


def _unconverted(r: _Recorder, call: Call, result: Any, name: str) -> None:
    r.refuse(
        "no layer that was not converted to dynamic precision, and no product of two activations",
        name,
    )


def _new_tensor(r: _Recorder, call: Call, result: Any, name: str) -> None:
    r.refuse(
        "no random or empty tensor (dropout that is on in evaluation makes one: pass "
        "training=self.training)",
        name,
    )


def _read_value(r: _Recorder, call: Call, result: Any, name: str) -> None:
    r.refuse("no branch on values (if, float(), item())", name)


_HANDLERS: Final[Mapping[str, Handler]] = {
    "relu": _relu,
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "relu6"), _clip),
    "add": _add,
    **dict.fromkeys(("sub", "rsub"), _subtract),
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
    "mean": _mean,
    **dict.fromkeys(
        ("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"), _pool
    ),
    **dict.fromkeys(
        (
            "_adaptive_avg_pool2d",
            "_adaptive_avg_pool3d",
            "adaptive_max_pool2d",
            "adaptive_max_pool3d",
        ),
        _adaptive_pool,
    ),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "cudnn_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
        ),
        _norm,
    ),
    **dict.fromkeys(
        (
            "view",
            "_unsafe_view",
            "reshape",
            "_reshape_alias",
            "_reshape_copy",
            "squeeze",
            "unsqueeze",
            "flatten",
            "unflatten",
            "expand",
        ),
        _view,
    ),
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "lift_fresh", "_to_copy"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _transpose),
    "constant_pad_nd": _pad,
    **dict.fromkeys(
        [f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)], _pad
    ),
    **dict.fromkeys(("cat", "stack"), _concat),
    **dict.fromkeys(("slice", "select"), _slice),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(
        ("convolution", "addmm", "mm", "bmm", "baddbmm", "linear", "matmul"), _unconverted
    ),
    **dict.fromkeys(
        ("empty_like", "rand_like", "randn_like", "native_dropout", "new_empty", "bernoulli"),
        _new_tensor,
    ),
    **dict.fromkeys(("_local_scalar_dense", "is_nonzero", "equal"), _read_value),
}


# -- steps


def _pools_along_one_axis(nodes: Sequence[_Node]) -> list[_Node]:
    """torch pools along one axis as along two, the first of one position: reshape, pool, reshape.
    Makes one node of the three.
    """
    uses = [0] * len(nodes)
    for node in nodes:
        for index in node.inputs:
            if index != _INPUT:
                uses[index] += 1
    result = list(nodes)
    for place, last in enumerate(nodes):
        if last.op not in ("reshape", "flatten") or last.inputs[0] == _INPUT:
            continue
        pool = nodes[last.inputs[0]]
        if (
            pool.op not in ("max_pool", "average_pool", "mean")
            or uses[last.inputs[0]] != 1
            or pool.inputs[0] == _INPUT
        ):
            continue
        first = nodes[pool.inputs[0]]
        if (
            first.op != "reshape"
            or len(first.shape) != 4
            or first.shape[2] != 1
            or len(last.shape) != 3
            or pool.shape[2] != 1
        ):
            continue
        before = (*first.shape[:2], first.shape[3])
        if last.shape != (*pool.shape[:2], pool.shape[3]) or math.prod(before) != math.prod(
            first.shape
        ):
            continue
        source = first.inputs[0]
        if source == _INPUT or nodes[source].shape != before:
            continue
        settings = dict(pool.settings)
        if pool.op == "mean":
            if set(settings) != {"keepdims"}:
                continue
        else:
            settings = {k: v[1:] if isinstance(v, list) else v for k, v in settings.items()}
        result[place] = replace(
            last, op=pool.op, inputs=(source,), hint=pool.hint, settings=settings
        )
    return result


def _named(nodes: Sequence[_Node], last: int) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Steps that the last one needs, with names of their own, and the constants."""
    needed, waiting = set(), [last]
    while waiting:
        index = waiting.pop()
        if index != _INPUT and index not in needed:
            needed.add(index)
            waiting += nodes[index].inputs
    names, taken = {_INPUT: "input"}, {"input"}
    steps: list[dict[str, Any]] = []
    arrays: dict[str, Array] = {}
    for index in sorted(needed):
        node = nodes[index]
        name, number = node.hint, 0
        while name in taken:
            number += 1
            name = f"{node.hint}_{number}"
        taken.add(name)
        names[index] = name
        step: dict[str, Any] = {
            "name": name,
            "op": node.op,
            "inputs": [names[i] for i in node.inputs],
            **node.settings,
        }
        if node.arrays:
            step["arrays"] = {kind: f"{name}/{kind}" for kind in node.arrays}
            arrays |= {f"{name}/{kind}": value for kind, value in node.arrays.items()}
        steps.append(step)
    return steps, arrays


# -- helpers


def _key(tensor: Tensor) -> Key:
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _bound(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    call = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    call |= {a.name: value for a, value in zip(schema.arguments, args, strict=False)}
    return call | dict(kwargs)


def _whole(value: Any, axes: int) -> list[int]:
    """A number for each axis; one number is for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * axes if len(values) == 1 else values


def _positions_channels(request: Tensor, channel_axis: int, shape: tuple[int, ...]) -> Array:
    """A request of X's grid, or one number, as [1, positions, channel blocks] with whole axes or
    1.
    """
    if request.ndim == 0:
        return _numpy(request.view(1, 1, 1)).astype(np.int16)
    last = request.movedim(channel_axis % len(shape), -1)
    if math.prod(last.shape[1:-1]) > 1:
        positions = [
            n for axis, n in enumerate(shape) if axis not in (0, channel_axis % len(shape))
        ]
        last = last.expand(last.shape[0], *positions, last.shape[-1])
    # Thresholds far outside float32's exponents ask the same wherever they lie.
    return _numpy(last.reshape(1, -1, last.shape[-1]).int().clamp(-(1 << 14), 1 << 14)).astype(
        np.int16
    )


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array


__all__ = ["ExportError", "recorded_steps"]
