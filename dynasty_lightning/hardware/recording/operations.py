# SPDX-License-Identifier: Apache-2.0
"""What each operation of ATen becomes, and why some become nothing."""

from collections.abc import Mapping
from typing import Any, Final

from . import arithmetic, reductions, shapes
from .recorder import SYMBOLS, VIEWS, Call, Handler, Recorder

_NORMS: Final = (
    "native_batch_norm",
    "cudnn_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
)
_PADS: Final = (
    "constant_pad_nd",
    *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
)
_POOLS: Final = ("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d")
_ADAPTIVE_POOLS: Final = (
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
)
_PRODUCTS: Final = ("convolution", "addmm", "mm", "bmm", "baddbmm", "linear", "matmul")
_NEW_TENSORS: Final = (
    "empty_like",
    "rand_like",
    "randn_like",
    "native_dropout",
    "new_empty",
    "bernoulli",
)


def _refusing(what: str) -> Handler:
    def refuse(r: Recorder, call: Call, result: Any, name: str) -> None:
        r.refuse(what, name)

    return refuse


HANDLERS: Final[Mapping[str, Handler]] = {
    "relu": arithmetic.relu,
    **dict.fromkeys(
        ("clamp", "clamp_min", "clamp_max", "clip", "hardtanh", "relu6"), arithmetic.clip
    ),
    "add": arithmetic.add,
    **dict.fromkeys(("sub", "rsub"), arithmetic.subtract),
    "mul": arithmetic.multiply,
    "div": arithmetic.divide,
    "neg": arithmetic.negate,
    "mean": reductions.mean,
    **dict.fromkeys(_POOLS, reductions.pool),
    **dict.fromkeys(_ADAPTIVE_POOLS, reductions.adaptive_pool),
    **dict.fromkeys(_NORMS, reductions.norm),
    **dict.fromkeys(("_softmax", "_log_softmax"), reductions.softmax),
    **dict.fromkeys(VIEWS, shapes.view),
    **dict.fromkeys(("permute", "transpose", "t"), shapes.transpose),
    **dict.fromkeys(_PADS, shapes.pad),
    **dict.fromkeys(("cat", "stack"), shapes.concat),
    **dict.fromkeys(("slice", "select"), shapes.cut),
    **dict.fromkeys(("split", "split_with_sizes"), shapes.split),
    **dict.fromkeys(
        _PRODUCTS,
        _refusing(
            "no layer that was not converted to dynamic precision, and no product of two "
            "activations"
        ),
    ),
    **dict.fromkeys(
        _NEW_TENSORS,
        _refusing(
            "no random or empty tensor (dropout that is on in evaluation makes one: pass "
            "training=self.training)"
        ),
    ),
    "embedding": _refusing(SYMBOLS),
    **dict.fromkeys(
        ("_local_scalar_dense", "is_nonzero", "equal"),
        _refusing("no branch on values (if, float(), item())"),
    ),
}
