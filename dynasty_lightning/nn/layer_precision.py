# SPDX-License-Identifier: Apache-2.0
"""The widths that a layer's operands are asked to have: one `OperandPrecision` a role, kept in the
form that an operator takes.
"""

from typing import Final

import torch
from torch import Tensor, nn

from ..numerics.formats import FP4
from ..numerics.fp4 import FP4_BITS
from ..numerics.geometry import LayerGeometry
from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import Gemm, Role
from .gemms import SETTINGS, role_settings, settings_of
from .plan import LayerPlan

_REQUESTS: Final = {
    Role.ACTIVATION: "_x_request",
    Role.WEIGHT: "_w_request",
    Role.ERROR: "_e_request",
}
_DEFAULT_BITS: Final = 8


class LayerPrecision(nn.Module):
    """That half of a converted layer (`nn.layers.DynamicLayer`) which knows what its map asks.

    Values are no buffers: whoever walks over those (averages of weights, `to_empty`, DDP) takes
    them for the user's. The plugin saves them, and they follow the operand's device when they are
    read.
    """

    weight: Tensor
    layer_name: str
    plan: LayerPlan

    @property
    def geometry(self) -> LayerGeometry:
        return self.plan.geometry

    def _ask_for_defaults(self) -> None:
        self._settings = [v for _ in Role for v in settings_of(None)]
        for role in Role:
            setattr(self, _REQUESTS[role], _saveable(default_request()))
        self._precision: dict[Role, OperandPrecision] = {}

    def set_precision(self, role: Role, precision: OperandPrecision | None) -> None:
        """Ask for an operand's widths from the next step on; None is 8 bits.

        Raises:
            ValueError: W's shape does not broadcast to its grid, or blocks that re-quantize are
                given more than one width.
        """
        if precision is not None:
            self._check_precision(role, precision)
            self._precision[role] = precision
        else:
            self._precision.pop(role, None)
        setattr(
            self,
            _REQUESTS[role],
            _saveable(default_request() if precision is None else precision.values),
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

    def _check_precision(self, role: Role, precision: OperandPrecision) -> None:
        values = precision.values
        if self.plan.format.scaling in FP4 and (
            values.numel() != 1 or precision.bits is None or int(values) != FP4_BITS
        ):
            raise ValueError(
                f"{self.layer_name}: elements of {self.plan.format.scaling} have {FP4_BITS} bits "
                f"each: DynastyCallback(policy='uniform', bits={FP4_BITS})"
            )
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
        precision.check_role(role, name=self.layer_name)

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


def default_request(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(_DEFAULT_BITS, dtype=torch.uint8, device=device)


def _saveable(request: Tensor) -> Tensor:
    """What was made in inference mode cannot be saved for a backward pass."""
    if not request.is_inference():
        return request
    with torch.inference_mode(False):
        return request.clone()


def _broadcasts(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    try:
        torch.broadcast_shapes(shape, grid)
    except RuntimeError:
        return False
    return True
