# SPDX-License-Identifier: Apache-2.0
"""Turns a trained network into a program for `fpga.network`: recorded from a run, weights packed,
BatchNorm as scale and shift.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from fpga import GemmConfig
from fpga.network.program import Program, ProgramError

from ..nn.convert import check_names
from ..nn.layers import dynamic_layers
from .operands import config_for
from .recording import ExportError, recorded_steps

Steps = list[dict[str, Any]]
Array = np.ndarray[Any, Any]
_BATCHES: Final = (2, 3)
"""What does not depend on the batch is the same for both."""


def export_program(
    network: nn.Module,
    input_shape: Sequence[int],
    *,
    config: GemmConfig | None = None,
    labels: Sequence[str] = (),
    source: Mapping[str, Any] | None = None,
) -> Program:
    """The program of a converted network in eval mode.

    The network runs twice, on random samples, and its operations become steps in whichever form
    they are called: module, function, method, operator, in place. What a step may be:
    `fpga.network.program.STEP_KINDS`. A softmax or log_softmax is a step like any other
    (docs/architecture.md).

    Args:
        network: with converted layers, one float32 tensor in, one tensor out; both begin with the
            batch. It is not changed.
        input_shape: of one sample, without the batch.
        config: the core; None for the default one of the network's blocks.
        labels: names of the classes.
        source: what the program was made from, as JSON.

    Raises:
        ExportError: an operation that the runtime does not have, named with its place; a layer that
            was not converted; no converted layer at all; a result that depends on the batch as a
            whole; a network that cannot be run on such samples.
        TypeError, ValueError: what is no module, no shape of whole numbers above 0, no
            configuration, or one string in place of names.

    >>> import torch, dynasty_lightning
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    >>> _ = dynasty_lightning.convert(network, mode="exact")
    >>> program = export_program(network, (8,), labels=["a", "b", "c", "d"])
    >>> [step["op"] for step in program.steps]  # program.save(folder) writes it
    ['linear', 'relu']
    """
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    layers = dynamic_layers(network)
    if not layers:
        raise ExportError(
            "the network has no converted layer: train it with DynastyPrecision, or call "
            "dynasty_lightning.convert(network)"
        )
    default = config_for(next(iter(layers.values())).format)
    config = default if config is None else config
    if not isinstance(config, GemmConfig):
        raise TypeError(f"config must be an fpga.GemmConfig, not {config!r}")
    check_names("labels", labels)
    shape = _checked_shape(input_shape)
    with _evaluating(network):
        (steps, arrays), again = (_recorded(network, shape, n, config) for n in _BATCHES)
    _check_same(steps, arrays, *again)
    try:
        return Program(
            steps=steps,
            arrays=arrays,
            input_shape=shape,
            config=config,
            labels=list(labels),
            source=dict(source or {}),
        )
    except ProgramError as error:
        raise ExportError(f"the network cannot be a program: {error}") from error


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, Sequence | np.ndarray) or isinstance(shape, str | bytes):
        raise TypeError(
            f"input_shape is one sample's, without the batch, e.g. (3, 32, 32), not {shape!r}"
        )
    shape = tuple(np.atleast_1d(shape)) if isinstance(shape, np.ndarray) else shape
    if not all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n > 0 for n in shape
    ):
        raise ValueError(
            f"input_shape must hold whole numbers above 0, e.g. (3, 32, 32), not {tuple(shape)}"
        )
    return tuple(map(int, shape))


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = {m: m.training for m in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def _check_same(
    steps: Steps, arrays: Mapping[str, Array], steps_again: Steps, arrays_again: Mapping[str, Array]
) -> None:
    """Raise ExportError where two runs of other batches are not the same program."""
    if len(steps) != len(steps_again):
        raise ExportError(
            "the network computes differently for batches of 2 and of 3 samples, or at random: "
            "a program does not"
        )
    for step, again in zip(steps, steps_again, strict=True):
        constants = step.get("arrays", {}).values()
        if step != again or any(
            not np.array_equal(arrays[name], arrays_again[name]) for name in constants
        ):
            raise ExportError(
                f"step {step['name']!r} ({step['op']}) has numbers that change with the batch "
                f"or with its values, or that are drawn at "
                "random: a program's are constants"
            )


def _recorded(
    network: nn.Module, shape: tuple[int, ...], batch: int, config: GemmConfig
) -> tuple[Steps, dict[str, Array]]:
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(batch)
            return recorded_steps(network, shape, batch, config)
    except ExportError:
        raise
    except Exception as error:
        text = f"{type(network).__name__} cannot be run on {batch} float32 samples of shape {shape}"
        raise ExportError(f"{text} ({type(error).__name__}: {error})") from error


__all__ = ["ExportError", "export_program"]
