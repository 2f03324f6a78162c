# SPDX-License-Identifier: Apache-2.0
"""One run of a demo, and the files that it leaves in the run folder."""

import hashlib
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from ..files import write_atomically
from ..hardware.check import check_on_core
from ..nn.inspect import activation_widths
from ..tasks.data import TensorDataModule
from ..tasks.models import Classifier, LanguageModel
from ..trainer.callback import DynastyCallback
from .config import RunConfig
from .environment import finite
from .method import Method
from .run import train

_IMAGES_SHOWN: Final = 4
# test images that the simulated core predicts, and images of the training step that it computes
_CORE_IMAGES: Final = 16


def train_run(
    run: RunConfig,
    data_dir: str | None = None,
    send: Callable[[dict[str, Any]], None] = lambda _: None,
    *,
    out: Path,
    checkpoint: bool = False,
    check_core: bool = False,
) -> dict[str, Any]:
    """Train and test one run of a demo; write its map, widths and history.

    >>> run = RunConfig(
    ...     data="digits", model="mlp", method="float32", seed=0, epochs=1, batch_size=64,
    ...     train_samples=64,
    ... )
    >>> entry = train_run(run, out=Path("."))
    >>> entry["name"], entry["seed"], entry["steps"]
    ('float32', 0, 1)

    Returns:
        Its entry in the summary; of a run that raised, its name, seed and error.
    """
    name = Method.parse(run.method).name
    record: dict[str, Any] = {"name": name, "seed": run.seed}
    try:
        done = train(run, data_dir, lambda message: send(message | {"name": name, "label": None}))
        module, data, callback = done.task.module, done.task.data, done.callback
        assert isinstance(data, TensorDataModule)  # a demo's data are images
        record |= done.figures
        if callback is not None:
            record |= write_run_files(out, callback, name, run.seed)
            if name == "dynasty":
                record |= {"warmup_steps": callback.schedule.warmup_steps}
                record |= _write_image_widths(out, module, data, run.seed)
        if check_core:
            record["core"] = _check_core(module, data)
        if checkpoint:
            record["checkpoint_file"] = f"checkpoint-{name}-{run.seed}.ckpt"
            done.trainer.save_checkpoint(out / record["checkpoint_file"])
    except Exception:
        return {"name": name, "seed": run.seed, "error": traceback.format_exc()}
    return cast(dict[str, Any], finite(record))


def _check_core(module: Classifier | LanguageModel, data: TensorDataModule) -> dict[str, Any]:
    """The trained network on the simulated core: real test images, and a training step on real
    training images.
    """
    images, labels = next(iter(data.train_dataloader()))
    return check_on_core(
        module.network,
        data.test_images[:_CORE_IMAGES],
        (images[:_CORE_IMAGES], labels[:_CORE_IMAGES]),
    )


def write_run_files(out: Path, callback: DynastyCallback, method: str, seed: int) -> dict[str, str]:
    """A run's map, widths and history; returns their names and the history's digest.

    >>> write_run_files(Path("."), DynastyCallback(target_speedup=5.0), "dynasty", 0)
    Traceback (most recent call last):
        ...
    RuntimeError: ...
    """
    names = {
        "map_file": f"map-{method}-{seed}.safetensors",
        "bit_widths_file": f"widths-{method}-{seed}.safetensors",
        "history_file": f"history-{method}-{seed}.jsonl",
    }
    callback.precision_map().save(out / names["map_file"])
    callback.bit_width_map().save(out / names["bit_widths_file"])
    lines = [json.dumps(finite(h), allow_nan=False) + "\n" for h in callback.history]
    history = "".join(lines).encode()
    write_atomically(out / names["history_file"], history)
    return names | {"history_sha256": hashlib.sha256(history).hexdigest()}


def _write_image_widths(
    out: Path, module: Classifier | LanguageModel, data: TensorDataModule, seed: int
) -> dict[str, str]:
    """Widths that a few test images of different classes get in every convolution; nothing for a
    network without one.
    """
    labels = data.test_labels.numpy()
    chosen = [int(np.flatnonzero(labels == label)[0]) for label in dict.fromkeys(labels.tolist())][
        :_IMAGES_SHOWN
    ]
    widths = {
        f"X/{n}": w.numpy()
        for n, w in activation_widths(module, data.test_images[chosen]).items()
        if w.ndim == 4
    }
    if not widths:
        return {}
    name = f"widths-image-{seed}.npz"
    arrays = {
        "images": data.data.test_images[chosen],
        "labels": np.array([data.data.class_names[labels[i]] for i in chosen]),
        **widths,
    }
    write_atomically(
        out / name, lambda file: np.savez_compressed(file, **cast(Any, arrays)), sealed=True
    )
    return {"image_widths_file": name}


__all__ = ["train_run", "write_run_files"]
