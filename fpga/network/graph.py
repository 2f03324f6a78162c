# SPDX-License-Identifier: Apache-2.0
"""A program's steps, checked against their kinds: shapes and constants that go together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import GemmConfig
from . import limits
from .checks import is_whole, short
from .limits import MAX_AXES, MAX_EXTENT
from .shapes import Shape, Step
from .steps import STEP_KINDS, ArraySpec

__all__ = ["ProgramError", "array_specs", "infer_shapes"]


class ProgramError(ValueError):
    """A program that is damaged, of another version, or not meant for what it is given.

    >>> infer_shapes([{"name": "a", "op": "fold", "inputs": ["input"]}], (3,))
    Traceback (most recent call last):
    fpga.network.graph.ProgramError: step 'a' ('fold') is of a kind which this runtime does not ...
    """


def infer_shapes(steps: Sequence[Any], input_shape: Shape) -> dict[str, Shape]:
    """One sample's shape of "input" and of each step's result. Raises ProgramError for a step that
    is not as its kind demands.

    >>> steps = [{"name": "flat", "op": "flatten", "inputs": ["input"]}]
    >>> infer_shapes(steps, (2, 4, 4))["flat"]
    (32,)
    """
    if not 1 <= len(input_shape) <= MAX_AXES or not all(
        is_whole(n, 1, MAX_EXTENT - 1) for n in input_shape
    ):
        raise ProgramError(
            f"input_shape must be 1 to {MAX_AXES} whole numbers from 1 on, not "
            f"{short(list(input_shape))}"
        )
    if not 1 <= len(steps) <= limits.MAX_STEPS:
        raise ProgramError(
            f"a program needs a step and may have {limits.MAX_STEPS}, not {len(steps)}"
        )
    shapes = {"input": input_shape}
    _check_size("the input", input_shape)
    for index, step in enumerate(steps):
        name = step.get("name") if isinstance(step, Mapping) else None
        if not isinstance(name, str) or not name or name in shapes:
            raise ProgramError(
                f"step {index} must be an object with a name of its own, not "
                f"{short(name if name else step)}"
            )
        try:
            shapes[name] = _step_shape(step, shapes)
        except ValueError as error:
            raise ProgramError(f"step {short(name)} ({short(step.get('op'))}) {error}") from None
        _check_size(f"step {short(name)}", shapes[name])
    return shapes


def _step_shape(step: Step, shapes: Mapping[str, Shape]) -> Shape:
    op, inputs = step.get("op"), step.get("inputs")
    kind = STEP_KINDS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise ValueError(
            f"is of a kind which this runtime does not know: {', '.join(sorted(STEP_KINDS))}"
        )
    least, most = kind.inputs
    if type(inputs) is not list or not least <= len(inputs) <= most:
        raise ValueError(
            f"must have {least}{f' to {most}' if most > least else ''} inputs, not {short(inputs)}"
        )
    for name in inputs:
        if not isinstance(name, str) or name not in shapes:
            raise ValueError(f"reads {short(name)}, which no earlier step makes")
    for name, check in {**kind.fields, **kind.optional}.items():
        if name not in step:
            if name in kind.fields:
                raise ValueError(f"has no {name}")
            continue
        try:
            check(step[name])
        except ValueError as error:
            raise ValueError(f"has a wrong {name}: it {error}") from None
    if unknown := sorted(
        set(step) - {"name", "op", "inputs", "arrays", *kind.fields, *kind.optional}
    ):
        raise ValueError(f"has a field {short(unknown[0])} that its kind does not know")
    return kind.shape(step, *(shapes[name] for name in inputs))


def _check_size(what: str, shape: Shape) -> None:
    if not 1 <= len(shape) <= MAX_AXES:
        raise ProgramError(f"{what} makes a sample of {len(shape)} axes; 1 to {MAX_AXES} are known")
    if math.prod(shape) > limits.MAX_ELEMENTS:
        raise ProgramError(
            f"{what} makes {list(shape)}, more than {limits.MAX_ELEMENTS} elements of one sample"
        )


def array_specs(
    steps: Sequence[Step], shapes: Mapping[str, Shape], config: GemmConfig
) -> dict[str, tuple[str, ArraySpec]]:
    """The step that reads each constant, and what the constant must be. Raises ProgramError for a
    step without its constants.

    >>> step = {"name": "a", "op": "affine", "inputs": ["input"]}
    >>> step |= {"arrays": {"scale": "s", "shift": "t"}}
    >>> specs = array_specs([step], {"input": (3, 8), "a": (3, 8)}, GemmConfig())
    >>> specs["s"][1].shape
    (3,)
    """
    specs: dict[str, tuple[str, ArraySpec]] = {}
    weights = sum(math.prod(step["weight_shape"]) for step in steps if "weight_shape" in step)
    if weights > limits.MAX_PROGRAM_WEIGHTS:
        raise ProgramError(
            f"its layers have {weights} weights together; {limits.MAX_PROGRAM_WEIGHTS} are the most"
        )
    for step in steps:
        kind, given = STEP_KINDS[step["op"]], step.get("arrays", {})
        wanted = kind.arrays(step, shapes[step["inputs"][0]], config)
        if not isinstance(given, Mapping) or not set(wanted) - kind.may_lack <= set(given) <= set(
            wanted
        ):
            raise ProgramError(
                f"step {short(step['name'])} must have the arrays "
                f"{', '.join(wanted) or 'none'}, not {short(given)}"
            )
        for what, name in given.items():
            if not isinstance(name, str) or name in specs:
                raise ProgramError(
                    f"step {short(step['name'])} names its {what} {short(name)}: it must be a "
                    f"name of its own"
                )
            specs[name] = (step["name"], wanted[what])
    return specs
