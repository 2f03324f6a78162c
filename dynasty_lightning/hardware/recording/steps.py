# SPDX-License-Identifier: Apache-2.0
"""Nodes become the steps of a program: those that are needed, each with a name of its own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .node import INPUT, Array, Node


def pools_along_one_axis(nodes: Sequence[Node]) -> list[Node]:
    """torch pools along one axis as along two, the first of one position: reshape, pool, reshape.
    Makes one node of the three.
    """
    uses = Counter(index for node in nodes for index in node.inputs)
    return [_pool_along_one_axis(nodes, uses, node) or node for node in nodes]


def _pool_along_one_axis(nodes: Sequence[Node], uses: Mapping[int, int], last: Node) -> Node | None:
    """The pooling that three nodes are, of which `last` is the last; None if they are not."""
    if last.op not in ("reshape", "flatten") or last.inputs[0] == INPUT:
        return None
    pool = nodes[last.inputs[0]]
    if (
        pool.op not in ("max_pool", "average_pool", "mean")
        or uses[last.inputs[0]] != 1
        or pool.inputs[0] == INPUT
    ):
        return None
    first = nodes[pool.inputs[0]]
    if first.op != "reshape" or len(first.shape) != 4 or len(last.shape) != 3:
        return None
    if first.shape[2] != 1 or pool.shape[2] != 1:
        return None
    before, after = (*first.shape[:2], first.shape[3]), (*pool.shape[:2], pool.shape[3])
    source = first.inputs[0]
    if last.shape != after or source == INPUT or nodes[source].shape != before:
        return None
    fields = dict(pool.fields)
    if pool.op == "mean":
        if set(fields) != {"keepdims"}:
            return None
    else:
        fields = {k: v[1:] if isinstance(v, list) else v for k, v in fields.items()}
    return replace(last, op=pool.op, inputs=(source,), hint=pool.hint, fields=fields)


def named(nodes: Sequence[Node], last: int) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Steps that the last one needs, with names of their own, and the constants."""
    needed, waiting = set(), [last]
    while waiting:
        index = waiting.pop()
        if index != INPUT and index not in needed:
            needed.add(index)
            waiting += nodes[index].inputs
    names, taken = {INPUT: "input"}, {"input"}
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
            **node.fields,
        }
        if node.arrays:
            step["arrays"] = {kind: f"{name}/{kind}" for kind in node.arrays}
            arrays |= {f"{name}/{kind}": value for kind, value in node.arrays.items()}
        steps.append(step)
    return steps, arrays
