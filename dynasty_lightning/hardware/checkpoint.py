# SPDX-License-Identifier: Apache-2.0
"""A Trainer's checkpoint, read into a network outside of a Trainer."""

import glob
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..files import DamagedFile
from ..maps.precision_map import PrecisionMap
from ..nn.layers import CONVERTED_TYPES, check_module
from ..nn.plan import Mode
from ..numerics.formats import Scaling
from ..trainer.checkpoint_files import read_checkpoint
from ..trainer.precision import DynastyPrecision


def load_converted(
    module: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    mode: Mode = "exact",
    scaling: Scaling = "window",
    name: str = "this model",
) -> Mapping[str, Any]:
    """Give a module the weights and the widths that a Trainer with DynastyPrecision left it with.

    The module's layers are converted in place as the plugin converts them, with the map's blocks;
    layers that the plugin left out are left out. Modes of modules (`eval`) stay as they are.

    Args:
        module: the one that was trained, newly made and not converted.
        checkpoint: a file that `SealedCheckpointIO` wrote, or what `torch.load` reads of another.
        mode: of the GEMMs; exact mode has the bits that the core computes.
        scaling: as the plugin had it; a checkpoint does not hold it.
        name: what messages call the module.

    Returns:
        What the checkpoint holds: its epoch, its step.

    Raises:
        FileNotFoundError: no such file, or a folder.
        TypeError: `module` is no module, or `checkpoint` neither a path nor a mapping.
        DamagedFile, ValueError: cut off or damaged; not trained with DynastyPrecision; weights or a
            map of another model.

    >>> import torch, dynasty_lightning
    >>> from dynasty_lightning import DynastyPrecision, PrecisionMap, OperandPrecision, Role
    >>> trained, plugin = torch.nn.Sequential(torch.nn.Linear(8, 4)), DynastyPrecision()
    >>> _ = plugin.convert_module(trained)
    >>> four_bits = {"0": {Role.WEIGHT: OperandPrecision(bits=4)}}
    >>> plugin.apply_map(PrecisionMap(structure=plugin.structure, entries=four_bits))
    >>> saved = {"state_dict": trained.state_dict(), "DynastyPrecision": plugin.state_dict()}
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = load_converted(network, saved)
    >>> int(network[0].get_precision(Role.WEIGHT).bits), torch.equal(*(
    ...     n.eval()(torch.ones(2, 8)) for n in (network, trained)
    ... ))
    (4, True)
    """
    check_module(module)
    source, state = _read(checkpoint)
    precision_map = _map_in(state, source)
    try:
        module.load_state_dict(state["state_dict"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{source} holds no weights of {name} ({text})") from None
    structure = precision_map.structure
    plugin = DynastyPrecision(
        mode=mode,
        block_shape=structure.block_shape,
        width_group=structure.width_group,
        # Of integers it is the caller who knows.
        scaling=scaling if structure.scaling == "window" else structure.scaling,
        code=structure.code,
        scale_bits=structure.scale_bits,
        exclude=_left_out(module, structure.layers),
    )
    plugin.convert_module(module)
    plugin.apply_map(precision_map)
    return state


def _read(checkpoint: str | Path | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What messages call a checkpoint, and what it holds."""
    if isinstance(checkpoint, Mapping):
        return "the checkpoint", checkpoint
    if not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(
            f"checkpoint must be a file's path, or what torch.load gave, not {checkpoint!r}"
        )
    try:
        return str(checkpoint), read_checkpoint(Path(checkpoint))
    except FileNotFoundError:
        raise
    except DamagedFile as error:
        raise DamagedFile(
            f"{error}. Of a checkpoint that Lightning's own IO wrote give the content: "
            f"load_converted(module, torch.load(path))"
        ) from None
    except Exception as error:
        raise ValueError(f"{checkpoint} cannot be read as a checkpoint: {error}") from None


def _map_in(state: Mapping[str, Any], source: str) -> PrecisionMap:
    saved = state.get(DynastyPrecision.__qualname__)
    if not isinstance(saved, Mapping) or "map" not in saved:
        raise ValueError(f"{source} was not trained with DynastyPrecision: it holds no map")
    return PrecisionMap.from_state(saved["map"], source=f"the map in {source}")


def _left_out(module: nn.Module, converted: Collection[str]) -> list[str]:
    """Patterns of the layers that the plugin left as they were; none for a map of another model,
    whose first layer that differs is then named.
    """
    names = [n for n, m in module.named_modules() if type(m) in CONVERTED_TYPES]
    if not any(n in converted for n in names):
        return []
    return [glob.escape(n) for n in names if n not in converted]


__all__ = ["load_converted"]
