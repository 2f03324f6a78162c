# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning export`: a checkpoint and test images become a program that boards run,
compared with torch on the way.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
import torch

from fpga import open_device
from fpga.images import load_images, save_images
from fpga.network.program import Program
from fpga.network.runner import Runner

from ..hardware.checkpoint import load_converted
from ..hardware.program import ExportError, export_program
from ..tasks.data import TensorDataModule
from ..tasks.tasks import Task, build_task
from .report.run_folder import read_summary

_BATCH: Final = 50


def export_run(
    checkpoint: Path,
    out: Path,
    *,
    images: int = 500,
    data_dir: str | None = None,
    device: str = "reference",
    stream: TextIO,
) -> dict[str, Any]:
    """Export the network of a demo's checkpoint, with test images, and compare its classes with
    torch's own.

    Args:
        checkpoint: a file that `demo --checkpoints` left; the run folder's summary.json beside it
            names network and data.
        out: folder for program.json, program.npz and images.npz.
        images: test images to write and to compare.
        device: where the program's GEMMs run for the comparison.

    Returns:
        {"images", "agreement" (share of equal classes), "accuracy", "accuracy_torch",
        "values_equal" (share of logits equal to the bit)}.

    Raises:
        FileNotFoundError, ValueError: no such file, a damaged one, or not a checkpoint of a demo
            with DynastyPrecision.
        ExportError: a network that cannot be a program, such as a text model; names the operation.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"{checkpoint} does not exist: `dynasty-lightning demo --checkpoints` leaves "
            f"checkpoints in its run folder"
        )
    task, source = _trained(checkpoint, data_dir)
    module, data = task.module, task.data
    if not isinstance(data, TensorDataModule):
        # A program takes float32 samples: the operation that it lacks is named with its place.
        export_program(module, (task.facts["context"],))
        raise ExportError(f"{checkpoint} is of a text model: programs take images")
    shape, classes = tuple(data.test_images.shape[1:]), data.data.class_names
    program = export_program(module.network, shape, labels=classes, source=source)
    program.save(out)
    chosen, labels = data.test_images[:images], data.test_labels[:images].numpy()
    save_images(out, chosen.numpy(), labels)
    print(
        f"{out}: {len(program.steps)} steps, {sum(a.nbytes for a in program.arrays.values())} "
        f"bytes of weights and constants",
        file=stream,
    )
    with torch.no_grad():
        expected = torch.cat([module(part) for part in chosen.split(_BATCH)]).numpy()
    figures = compare(out, expected, labels, device=device)
    print(_line(figures), file=stream)
    return figures


def _trained(checkpoint: Path, data_dir: str | None) -> tuple[Task, dict[str, Any]]:
    """Data and network of a demo's checkpoint as they were trained, and what a program notes of
    where it comes from.
    """
    arguments = read_summary(checkpoint.parent)["args"]
    names = {name: arguments[name] for name in ("model", "data")}
    task = build_task(**names, data_dir=data_dir or arguments.get("data_dir"), batch_size=_BATCH)
    name = f"the {names['model']} that its summary names"
    state = load_converted(task.module, checkpoint, name=name)
    task.module.eval()
    step = int(state.get("global_step", 0))
    return task, {"checkpoint": checkpoint.name, **names, "step": step}


def _line(figures: Mapping[str, Any]) -> str:
    percent = {
        name: f"{100 * figures[name]:.2f} %"
        for name in ("agreement", "values_equal", "accuracy", "accuracy_torch")
    }
    return (
        f"{figures['images']} test images: {percent['agreement']} get torch's class "
        f"({percent['values_equal']} of logits to the bit); "
        f"accuracy {percent['accuracy']}, torch {percent['accuracy_torch']}"
    )


def compare(
    folder: Path,
    expected: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    *,
    device: str = "reference",
) -> dict[str, Any]:
    """Run an exported folder's images on a device and compare with logits [N, classes]."""
    program = Program.load(folder)
    images, _ = load_images(folder)
    with open_device(device, program.config) as opened:
        runner = Runner(program, opened)
        logits = np.concatenate(
            [runner(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
        )
    classes = logits.argmax(axis=1)
    return {
        "images": len(images),
        "device": device,
        "agreement": float((classes == expected.argmax(axis=1)).mean()),
        "values_equal": float((logits == expected).mean()),
        "accuracy": float((classes == labels).mean()),
        "accuracy_torch": float((expected.argmax(axis=1) == labels).mean()),
    }
