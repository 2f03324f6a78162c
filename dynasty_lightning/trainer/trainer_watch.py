# SPDX-License-Identifier: Apache-2.0
"""What the plugin asks of the Trainer around a module."""

from typing import Any, Final
from weakref import ref

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

_REFUSED: Final = ("FSDP", "DeepSpeed", "XLA")


def checkpoint_of(module: nn.Module) -> str:
    """The file that its Trainer is about to load, for messages."""
    return str(getattr(getattr(module, "_trainer", None), "ckpt_path", None) or "the checkpoint")


def refuse_strategy(module: nn.Module) -> None:
    """Raises ValueError where the module's Trainer has a strategy that is not supported."""
    trainer = getattr(module, "_trainer", None)
    strategy = getattr(trainer, "strategy", None)
    kind = type(strategy).__name__
    if any(name in kind for name in _REFUSED):
        raise ValueError(
            f"DynastyPrecision does not support {kind}: it brings its own precision handling; "
            "use strategy='auto', 'ddp', a single device, or ModelParallelStrategy with "
            "fully_shard (FSDP2)"
        )
    parts = (
        strategy.device_mesh["tensor_parallel"].size()
        if isinstance(strategy, ModelParallelStrategy)
        else 1
    )
    if parts > 1:
        raise ValueError(
            f"DynastyPrecision does not support tensor parallelism ({kind} with "
            f"tensor_parallel_size={parts}; by default it is all devices "
            "of a node): blocks, statistics and maps are those of whole weights. Use "
            "tensor_parallel_size=1, data_parallel_size=devices "
            "and fully_shard in configure_model"
        )


class TrainerWatch:
    """Warns once for each Trainer without the plugin that the layers it runs are quantized all the
    same.
    """

    def __init__(self, module: nn.Module, plugin: type) -> None:
        self._module, self._plugin = ref(module), plugin
        self._seen: ref[Any] | None = None

    def __call__(self) -> None:
        trainer = getattr(self._module(), "_trainer", None)
        if trainer is None or (self._seen is not None and self._seen() is trainer):
            return
        self._seen = ref(trainer)
        if not isinstance(trainer.precision_plugin, self._plugin):
            rank_zero_warn(
                "this Trainer has no DynastyPrecision, but the model was converted by one and "
                "stays so: its layers run quantized at the "
                "widths that they had last. Add plugins=[DynastyPrecision()], or use a model "
                "that was not converted "
                "(load_from_checkpoint makes one)"
            )
