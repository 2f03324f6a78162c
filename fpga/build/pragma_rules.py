# SPDX-License-Identifier: Apache-2.0
"""Names, options and places of `#pragma HLS`, after UG1399 (Vitis HLS User Guide, "HLS
Pragmas").
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

Kind = Literal["number", "name"]


@dataclass(frozen=True)
class Rule:
    """Options of a pragma and where it may stand.

    Attributes:
        options: name=... -> kind of the value, or a tuple of the words allowed.
        words: options without a value; those of `modes` come first and exclude one another.
        needs: options that must be there.
        places: scopes that may hold it directly: "function", "loop", "top", "any".
        leads: must come before the first statement of its scope.
        finds: its `variable` (or `port`) must be known in the enclosing function.
    """

    options: Mapping[str, Kind | tuple[str, ...]] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    places: tuple[str, ...] = ("function", "loop")
    leads: bool = False
    finds: str = ""


_TRISTATE: Final = ("true", "false")
_PORTS: Final = (
    "m_axi",
    "s_axilite",
    "axis",
    "ap_ctrl_hs",
    "ap_ctrl_chain",
    "ap_ctrl_none",
    "ap_none",
    "ap_vld",
)
_PARTITIONS: Final = ("cyclic", "block", "complete")
_ARRAY_OPTIONS: Final[dict[str, Kind | tuple[str, ...]]] = {
    "variable": "name",
    "type": _PARTITIONS,
    "factor": "number",
    "dim": "number",
}
RULES: Final[dict[str, Rule]] = {
    "INTERFACE": Rule(
        options={
            "port": "name",
            "mode": _PORTS,
            "bundle": "name",
            "offset": ("off", "direct", "slave"),
            "depth": "number",
            "latency": "number",
            "num_read_outstanding": "number",
            "num_write_outstanding": "number",
            "max_read_burst_length": "number",
            "max_write_burst_length": "number",
            "max_widen_bitwidth": "number",
            "name": "name",
            "clock": "name",
            "storage_type": "name",
        },
        words=("register",),
        modes=_PORTS,
        needs=("port",),
        places=("top",),
        leads=True,
        finds="port",
    ),
    "TOP": Rule(options={"name": "name"}, places=("top",), leads=True),
    "PIPELINE": Rule(
        options={"II": "number", "style": ("stp", "frp", "flp")},
        words=("rewind", "off", "enable_flush"),
        leads=True,
    ),
    "UNROLL": Rule(
        options={"factor": "number"}, words=("skip_exit_check", "off"), places=("loop",), leads=True
    ),
    "LOOP_TRIPCOUNT": Rule(
        options={"min": "number", "max": "number", "avg": "number"},
        needs=("max",),
        places=("loop",),
        leads=True,
    ),
    "LOOP_FLATTEN": Rule(words=("off",), places=("loop",), leads=True),
    "LOOP_MERGE": Rule(words=("force",), leads=True),
    "DATAFLOW": Rule(words=("disable_start_propagation",), leads=True),
    "INLINE": Rule(words=("off", "recursive", "region"), places=("function",), leads=True),
    "ARRAY_PARTITION": Rule(
        options=_ARRAY_OPTIONS,
        words=("off",),
        modes=_PARTITIONS,
        needs=("variable",),
        finds="variable",
    ),
    "ARRAY_RESHAPE": Rule(
        options=_ARRAY_OPTIONS,
        words=("object", "off"),
        modes=_PARTITIONS,
        needs=("variable",),
        finds="variable",
    ),
    "STREAM": Rule(
        options={
            "variable": "name",
            "depth": "number",
            "type": ("fifo", "pipo", "shared", "unsync"),
        },
        words=("off",),
        needs=("variable",),
        finds="variable",
    ),
    "DEPENDENCE": Rule(
        options={
            "variable": "name",
            "class": ("array", "pointer"),
            "type": ("inter", "intra"),
            "direction": ("RAW", "WAR", "WAW"),
            "distance": "number",
            "dependent": _TRISTATE,
        },
        words=("true", "false", "inter", "intra", "RAW", "WAR", "WAW", "array", "pointer"),
        needs=("variable",),
        finds="variable",
    ),
    "BIND_STORAGE": Rule(
        options={
            "variable": "name",
            "type": (
                "fifo",
                "ram_1p",
                "ram_1wnr",
                "ram_2p",
                "ram_s2p",
                "ram_t2p",
                "rom_1p",
                "rom_2p",
                "rom_np",
            ),
            "impl": ("bram", "bram_ecc", "lutram", "uram", "uram_ecc", "srl", "memory", "auto"),
            "latency": "number",
        },
        needs=("variable", "type"),
        finds="variable",
    ),
    "BIND_OP": Rule(
        options={
            "variable": "name",
            "op": ("mul", "add", "sub", "fadd", "fsub", "fmul", "fdiv"),
            "impl": ("dsp", "fabric", "meddsp", "fulldsp", "maxdsp", "primitivedsp", "auto"),
            "latency": "number",
        },
        needs=("variable", "op"),
        finds="variable",
    ),
    "AGGREGATE": Rule(
        options={"variable": "name", "compact": ("auto", "bit", "byte", "none")},
        needs=("variable",),
        finds="variable",
    ),
    "DISAGGREGATE": Rule(options={"variable": "name"}, needs=("variable",), finds="variable"),
    "ALLOCATION": Rule(
        options={"instances": "name", "limit": "number"},
        words=("function", "operation"),
        needs=("instances", "limit"),
    ),
    "FUNCTION_INSTANTIATE": Rule(
        options={"variable": "name"}, needs=("variable",), places=("function",), finds="variable"
    ),
    "LATENCY": Rule(options={"min": "number", "max": "number"}),
    "EXPRESSION_BALANCE": Rule(words=("off",)),
    "OCCURRENCE": Rule(options={"cycle": "number"}, needs=("cycle",), places=("any",)),
    "PROTOCOL": Rule(
        options={"mode": ("floating", "fixed")}, words=("floating", "fixed"), places=("any",)
    ),
    "RESET": Rule(
        options={"variable": "name"}, words=("off",), needs=("variable",), finds="variable"
    ),
    "STABLE": Rule(options={"variable": "name"}, needs=("variable",), finds="variable"),
    "PERFORMANCE": Rule(
        options={
            "target_ti": "number",
            "target_tl": "number",
            "unit": ("cycle", "ns", "us", "ms", "s"),
        }
    ),
}
DEPRECATED: Final = {
    "DATA_PACK": "AGGREGATE",
    "RESOURCE": "BIND_OP or BIND_STORAGE",
    "INSTANTIATE": "FUNCTION_INSTANTIATE",
}
