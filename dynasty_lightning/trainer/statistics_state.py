# SPDX-License-Identifier: Apache-2.0
"""`LayerStatistics` as plain values, for a checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final

from ..cost.law import BITS, cost_law
from ..numerics.geometry import LayerGeometry
from ..numerics.observation import ProbeRecord
from ..numerics.roles import Gemm, Role
from ..policy.statistics import LayerStatistics

_BY_ROLE: Final = ("mean_bits", "backward_bits", "unlimited")
_HISTOGRAMS: Final = ("histogram", "backward_histogram")
"""By role too; files of before cost laws have none."""


def to_state(s: LayerStatistics) -> dict[str, Any]:
    """What `from_state` makes the statistics from again."""
    state = {f.name: getattr(s, f.name) for f in fields(s)}
    if s.law == BITS:  # a file as before there were others
        del state["law"], state["histogram"], state["backward_histogram"]
    else:
        state["law"] = s.law.name
    if not s.scale_bits:
        del state["scale_bits"]
    by_gemm = {"macs": {int(g): m for g, m in s.macs.items()}}
    names: list[str] = [name for name in (*_BY_ROLE, *_HISTOGRAMS) if name in state]
    by_role = {name: {int(r): v for r, v in state[name].items()} for name in names}
    probe = None if s.probe is None else ProbeRecord.flat(s.probe, present=True)
    return {**state, **by_gemm, **by_role, "geometry": asdict(s.geometry), "probe": probe}


def from_state(state: Mapping[str, Any]) -> LayerStatistics:
    """The inverse of `to_state`."""
    geometry: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in state["geometry"].items()
    }
    by_role = {name: {Role(r): v for r, v in state[name].items()} for name in _BY_ROLE}
    histograms = {
        name: {Role(r): tuple(v) for r, v in state.get(name, {}).items()} for name in _HISTOGRAMS
    }
    return LayerStatistics(
        **{
            **state,
            **by_role,
            **histograms,
            "law": cost_law(state.get("law", BITS.name)),
            "macs": {Gemm(g): m for g, m in state["macs"].items()},
            "geometry": LayerGeometry(**geometry),
            "probe": None if state["probe"] is None else ProbeRecord.from_flat(state["probe"]),
            "positions": None if state["positions"] is None else tuple(state["positions"]),
        }
    )
