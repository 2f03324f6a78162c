# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning export`: a checkpoint and test images become a program that boards run,
compared with torch on the way.
"""

from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from fpga import open_device
from fpga.images import load_images, save_images
from fpga.runtime import Program, Runner

from ..files import DamagedFile
from ..hardware.program import export_program
from ..maps.precision_map import PrecisionMap
from ..nn.convert import convert
from ..nn.layers import dynamic_layers
from ..tasks.data import TensorDataModule, load_data
from ..tasks.models import Classifier, build_model
from ..tasks.tasks import TEXT_DATA, TEXT_MODELS
from ..trainer.checkpoint_files import read_checkpoint
from .report.run_folder import read_summary

_BATCH = 50


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
        ExportError: a network that cannot be a program.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"{checkpoint} does not exist: `dynasty-lightning demo --checkpoints` leaves "
            f"checkpoints in its run folder"
        )
    arguments = read_summary(checkpoint.parent)["args"]
    if arguments["data"] in TEXT_DATA or arguments["model"] in TEXT_MODELS:
        raise ValueError(
            f"{checkpoint} is of a text model, {arguments['model']}: programs take images, and "
            f"have no embedding and no attention"
        )
    try:
        state = read_checkpoint(checkpoint)
    except DamagedFile:
        raise
    except Exception as error:
        raise ValueError(f"{checkpoint} cannot be read as a checkpoint: {error}") from None
    plugin = state.get("DynastyPrecision")
    if not isinstance(plugin, dict) or "map" not in plugin:
        raise ValueError(
            f"{checkpoint} was not trained with DynastyPrecision: it holds no map to export"
        )
    precision_map = PrecisionMap.from_state(plugin["map"], source=f"the map in {checkpoint}")
    loaded = load_data(arguments["data"], data_dir or arguments.get("data_dir"))
    data = TensorDataModule(loaded, batch_size=_BATCH)
    shape = tuple(data.test_images.shape[1:])
    network = build_model(
        arguments["model"], in_channels=shape[0], image_size=shape[-1], classes=data.classes
    )
    module = Classifier(network, classes=data.classes)
    try:
        module.load_state_dict(state["state_dict"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{checkpoint} holds no weights of the {arguments['model']} that its summary names "
            f"({text})"
        ) from None
    structure = precision_map.structure
    convert(
        module, mode="exact", block_shape=structure.block_shape, width_group=structure.width_group
    )
    for name, roles in precision_map.entries.items():
        for role, precision in roles.items():
            dynamic_layers(module)[name].set_precision(role, precision)
    module.eval()

    source = {
        "checkpoint": checkpoint.name,
        "model": arguments["model"],
        "data": arguments["data"],
        "step": int(state.get("global_step", 0)),
    }
    program = export_program(network, shape, labels=loaded.class_names, source=source)
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
    percent = {
        name: f"{100 * figures[name]:.2f} %"
        for name in ("agreement", "values_equal", "accuracy", "accuracy_torch")
    }
    print(
        f"{figures['images']} test images: {percent['agreement']} get torch's class "
        f"({percent['values_equal']} of logits to the bit); "
        f"accuracy {percent['accuracy']}, torch {percent['accuracy_torch']}",
        file=stream,
    )
    return figures


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
