# SPDX-License-Identifier: Apache-2.0
"""Everything about a layer's GEMMs that does not change from step to step, in a form that an
operator argument can carry.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final, Literal
from weakref import WeakValueDictionary

import torch

from ..numerics.banded import BandedWeight
from ..numerics.formats import BlockFormat
from ..numerics.geometry import LayerGeometry
from ..numerics.layout import BlockLayout
from ..numerics.roles import Gemm, Role

Mode = Literal["fast", "exact"]
_LAYOUTS_KEPT: Final = 64


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Geometry, block format, mode and index of a converted layer. Hashable; `key` and `from_key`
    are inverse.

    `executor` names what computes the GEMMs instead of `mode` (`nn.gemms.EXECUTORS`); empty for
    none. `unquantized` has the letters of
    roles whose operands the GEMMs read as they are, in float32: for studies of what one role's
    rounding does. `control_variate`: whether dW is corrected for what is known of E's rounding
    (`nn.control_variate`).

    Raises:
        ValueError: an unknown mode or role.
    """

    geometry: LayerGeometry
    format: BlockFormat = field(default_factory=BlockFormat)
    mode: Mode = "fast"
    layer_index: int = 0
    executor: str = ""
    unquantized: tuple[str, ...] = ()
    control_variate: bool = False

    def __post_init__(self) -> None:
        for letter in self.unquantized:
            Role.from_letter(letter)
        if self.mode not in ("fast", "exact"):
            raise ValueError(f"mode must be 'fast' or 'exact', not {self.mode!r}")
        if not isinstance(self.control_variate, bool):
            raise ValueError(f"control_variate must be True or False, not {self.control_variate!r}")

    @cached_property
    def key(self) -> str:
        key = json.dumps(asdict(self), sort_keys=True)
        _PLANS.setdefault(key, self)
        return key

    @staticmethod
    def from_key(key: str) -> "LayerPlan":
        """The plan of a layer that lives, or a new one."""
        return _PLANS.get(key) or LayerPlan._parsed(key)

    @staticmethod
    def _parsed(key: str) -> "LayerPlan":
        data = json.loads(key)
        geometry: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data["geometry"].items()
        }
        block_format: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data["format"].items()
        }
        plan = LayerPlan(
            geometry=LayerGeometry(**geometry),
            format=BlockFormat(**block_format),
            mode=data["mode"],
            layer_index=data["layer_index"],
            executor=data["executor"],
            unquantized=tuple(data["unquantized"]),
            control_variate=data["control_variate"],
        )
        _ = plan.key
        return plan

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerPlan":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerPlan.from_key, (
            self.key,
        )  # what is derived from it (a band's indices) is made anew

    @cached_property
    def band(self) -> BandedWeight | None:
        """The embedding of a grouped weight; None without groups."""
        if self.geometry.groups == 1:
            return None
        # Neither on the meta device of a model that is built without memory, nor of those tensors
        # that no graph may keep.
        with torch.device("cpu"), torch.inference_mode(False):
            return BandedWeight(
                self.geometry.weight_shape,
                self.geometry.groups,
                self.format.block_shape,
                self.format.band_unit,
            )

    def block_shape(self, role: Role, gemm: Gemm, *, training: bool = True) -> tuple[int, int]:
        """Rows x channels of a block of `role` as `gemm` reads it."""
        rows, channels = self.format.block_shape
        if role is Role.WEIGHT and self.format.scaling == "nvfp4":
            return channels, channels  # which backward reads as forward does
        if self.format.requantizes and (gemm, role) in _ROWS_CONTRACTED:
            return channels, rows
        if not training and role is not Role.WEIGHT:
            return 1, channels
        return rows, channels

    def width_group(self, role: Role, *, training: bool = True) -> tuple[int, int] | None:
        if self.format.width_group is None or training or role is Role.WEIGHT:
            return self.format.width_group
        return 1, self.format.width_group[1]

    def layout(
        self, role: Role, shape: tuple[int, ...], gemm: Gemm, *, training: bool = True
    ) -> BlockLayout:
        """How an operand of `shape` (banded for a grouped W) is cut for `gemm`."""
        key = (role, shape, gemm, training)
        # While something traces with sizes that are not known, they are no keys.
        is_known = all(type(n) is int for n in shape)
        found = self._layouts.get(key) if is_known else None
        if found is None:
            axis = 1 if role is Role.WEIGHT else self.geometry.channel_axis % len(shape)
            found = BlockLayout(
                shape=shape,
                block_shape=self.block_shape(role, gemm, training=training),
                channel_axis=axis,
            )
            if len(self._layouts) >= _LAYOUTS_KEPT:  # inputs of ever new sizes
                self._layouts.clear()
            if is_known:
                self._layouts[key] = found
        return found

    @cached_property
    def _layouts(self) -> dict[Any, BlockLayout]:
        """Layouts met so far: a layer asks for the same few at every step."""
        return {}

    def weight_shape(self) -> tuple[int, ...]:
        """W's shape as it is cut into blocks."""
        return self.geometry.weight_shape if self.band is None else self.band.shape

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        g = self.geometry
        if g.kind == "linear":
            return (*input_shape[:-1], g.out_channels)
        spatial = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                input_shape[2:], g.padding, g.dilation, g.taps, g.stride, strict=True
            )
        )
        return (input_shape[0], g.out_channels, *spatial)


def plan_template(**options: Any) -> LayerPlan:
    """A plan of all layers' options, whose geometry is nobody's. Raises ValueError as `LayerPlan`.

    >>> plan_template(mode="exact", unquantized=["E"]).unquantized
    ('E',)
    """
    options["unquantized"] = tuple(options.get("unquantized", ()))
    nobodys = LayerGeometry(kind="linear", weight_shape=(1, 1))
    return LayerPlan(geometry=nobodys, **options)


# Plans in use, by key: an operator finds its layer's, with all that was derived from it. Weak, so
# that those of an offload end with it.
_PLANS: Final[WeakValueDictionary[str, LayerPlan]] = WeakValueDictionary()

# Where a GEMM contracts the operand's rows: W in DGRAD; X and E in WGRAD.
_ROWS_CONTRACTED = frozenset(
    {(Gemm.DGRAD, Role.WEIGHT), (Gemm.WGRAD, Role.ACTIVATION), (Gemm.WGRAD, Role.ERROR)}
)
