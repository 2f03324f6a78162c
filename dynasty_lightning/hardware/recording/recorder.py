# SPDX-License-Identifier: Apache-2.0
"""Sees every operation of a run, and keeps those on what is computed from the input as nodes.

A tensor is known by the memory that it shows, so that what changes it in place is seen by whoever
reads it later under another name. What is not computed from the input is a constant.
"""

import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fpga import GemmConfig

from ...nn.layers import DynamicLayer
from .node import Array, ExportError, Node

_HARDWARE: Final = Path(__file__).parents[1]
_NO_USERS: Final = (
    str(Path(torch.__file__).parent),
    str(_HARDWARE.with_name("nn")),
    str(Path(__file__).parent),
    "<",
)
"""Where files lie that no user has written."""
VIEWS: Final = (
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
    "alias",
    "clone",
    "contiguous",
    "detach",
    "lift_fresh",
    "_to_copy",
)
"""Operations whose result shows the elements of x in their order: what x shows and no step can
read, they show too."""
SYMBOLS: Final = "no table that is read by symbols: a program's inputs are float32"

Call = Mapping[str, Any]
Key = tuple[Any, ...]
Handler = Callable[["Recorder", Call, Any, str], None]
"""Makes nodes of an operation: (recorder, its arguments, its result, its name)."""


class Recorder(TorchDispatchMode):
    """Turns operations on what is computed from the input into nodes.

    Args:
        batch: samples of the run.
        config: the core.
        handlers: what each operation of ATen becomes, by its name; one in place ends in "_" and has
            the handler of the other. Operations without one are refused.
    """

    def __init__(self, batch: int, config: GemmConfig, handlers: Mapping[str, Handler]) -> None:
        super().__init__()
        self.batch, self.config, self.handlers = batch, config, handlers
        self.nodes: list[Node] = []
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

    def mark_unreadable(self, tensor: Tensor, reason: str) -> None:
        """Whoever reads the tensor is refused."""
        self._storages.append(tensor.untyped_storage())
        self._unreadable[_key(tensor)] = reason

    def index_of(self, tensor: Tensor) -> int | None:
        """The node whose result a tensor is; None for a constant."""
        if (reason := self._unreadable.get(_key(tensor))) is not None:
            self.refuse(reason)
        return self._index.get(_key(tensor))

    def read(self, tensor: Tensor) -> int:
        """The node whose result a tensor is; a constant is refused."""
        index = self.index_of(tensor)
        if index is None:
            self.refuse("no such operation on a constant")
        return index

    def is_activation(self, value: Any) -> bool:
        """Whether a value is computed from the input."""
        return isinstance(value, Tensor) and self.index_of(value) is not None

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
        if (reason := self._unreadable.get(_key(tensors[0]))) is not None and name in VIEWS:
            result = func(*args, **kwargs)
            self.mark_unreadable(result, reason)
            return result
        handler = self.handlers.get(name) or self.handlers.get(name.removesuffix("_"))
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
        self, result: Tensor, op: str, *inputs: Tensor, arrays: Any = None, **fields: Any
    ) -> None:
        """A node that computes `result`."""
        self.chain(result, op, *(self.read(x) for x in inputs), arrays=arrays, **fields)

    def chain(
        self, result: Tensor, op: str, *inputs: int, arrays: Any = None, **fields: Any
    ) -> None:
        """As `add`, of nodes."""
        shape = tuple(result.shape)
        self.learn(result, self.node(shape, op, inputs, arrays or {}, fields, result.dtype))

    def same(self, result: Tensor, x: Tensor) -> None:
        """`result` holds what x does."""
        self.learn(result, self.read(x))

    def node(
        self,
        shape: tuple[int, ...],
        op: str,
        inputs: tuple[int, ...],
        arrays: Mapping[str, Array],
        fields: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """The index of a node whose result no tensor shows, as a step before another."""
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
            Node(
                op=op, inputs=inputs, shape=shape, hint=self._hint(op), fields=fields, arrays=arrays
            )
        )
        return len(self.nodes) - 1

    def scaled(self, x: Tensor, factor: float) -> int:
        """A node that multiplies x, as a step before another."""
        arrays = {"value": np.array(factor, np.float32)}
        return self.node(tuple(x.shape), "multiply_constant", (self.read(x),), arrays, {}, x.dtype)

    def reshaped(self, x: int, shape: tuple[int, ...]) -> int:
        """A node that gives a node's result another shape, as a step before another."""
        return self.node(shape, "reshape", (x,), {}, {"shape": list(shape[1:])})

    # -- names

    def enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A module is about to run: a forward pre-hook."""
        self.modules.append((name, module))
        # torch looks at the symbols' type before it shows the operation.
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and any(
            self.is_activation(x) for x in inputs
        ):
            self.refuse(SYMBOLS, "embedding")

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
            "fpga.network.program.STEP_KINDS, or export the network up to there"
        )


def _place() -> str:
    """The innermost frame of a user's file, as ", at file:line `source`,"; nothing where there is
    none.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NO_USERS):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or Path(frame.f_code.co_filename) == _HARDWARE / "program.py":
        return ""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f", at {Path(frame.f_code.co_filename).name}:{frame.f_lineno} `{line}`,"


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
