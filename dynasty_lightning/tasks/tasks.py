# SPDX-License-Identifier: Apache-2.0
"""A data set and a network by name, as the pair that a Trainer takes: whoever trains them needs no
case for images or text.
"""

import functools
import os
from dataclasses import dataclass
from typing import Any, Final

import lightning.pytorch as pl
import torch

from .data import DATASETS, TensorDataModule, TextDataModule, load_data, stdlib_docs
from .data.files import ImageData
from .models import MODELS, CharTransformer, Classifier, LanguageModel, build_model
from .models.decay import DECAYS, Decay

TEXT_DATA: Final = ("stdlib-docs",)
TEXT_MODELS: Final = ("chartransformer",)
TASK_DATA: Final = (*DATASETS, *TEXT_DATA)
TASK_MODELS: Final = (*MODELS, *TEXT_MODELS)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What `Trainer.fit(task.module, task.data)` and `Trainer.test(task.module, task.data)` take.

    >>> task = build_task(data="digits", model="mlp", train_samples=64)
    >>> task.facts["train_samples"], task.facts["test_samples"]
    (64, 360)

    Both modules have the attributes `network` and `learning_rate`, and both log `train_loss`,
    `val_loss`, `val_accuracy`, `test_loss` and `test_accuracy`: of images, or of the next character
    (losses in nats). Without validation samples there is no validation loader, of which Lightning
    warns unless it gets `limit_val_batches=0`.

    Attributes:
        facts: what a record of figures has about the pair, ready for JSON: `parameters`,
            `train_samples` (an epoch's), `validation_samples`, `test_samples`; for text also
            `context` and the text's `sha256`.
    """

    module: Classifier | LanguageModel
    data: TensorDataModule | TextDataModule
    facts: dict[str, Any]


def check_pair(*, data: str, model: str) -> None:
    """Raises ValueError for an unknown name and for a model that does not go with the data; reads
    no file.

    >>> check_pair(data="digits", model="resnet8")
    """
    for what, value, known in (("data", data, TASK_DATA), ("model", model, TASK_MODELS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")
    fitting = TEXT_MODELS if data in TEXT_DATA else MODELS
    if model not in fitting:
        raise ValueError(
            f"model {model!r} does not go with data {data!r}: choose one of {', '.join(fitting)}"
        )


def check_decay(*, data: str, decay: str) -> None:
    """Raises ValueError for a decay of the learning rate that the data's module does not have.

    >>> check_decay(data="digits", decay="steps")
    """
    if decay not in DECAYS:
        raise ValueError(f"unknown decay {decay!r}: choose one of {', '.join(DECAYS)}")
    if data in TEXT_DATA and decay != "cosine":
        raise ValueError(f"{data} is trained with decay 'cosine' only, not {decay!r}")


def build_task(
    *,
    data: str,
    model: str,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 128,
    train_samples: int | None = None,
    validation_samples: int = 0,
    learning_rate: float | None = None,
    decay: Decay = "cosine",
    augment: bool | None = None,
    seed: int = 0,
) -> Task:
    """A network, the module that trains it and its data.

    >>> task = build_task(data="digits", model="resnet8", batch_size=32)
    >>> [tuple(part.shape) for part in next(iter(task.data.train_dataloader()))]
    [(32, 1, 8, 8), (32,)]

    Args:
        data: of `TASK_DATA`.
        model: of `TASK_MODELS`.
        data_dir: folder of the image files, as in `load_data`; digits and stdlib-docs need none.
        train_samples: images to train on, or windows in an epoch; None for all.
        validation_samples: training images held back, or windows of the text's own validation part.
        learning_rate: highest of the run; None for the module's own.
        decay: of the learning rate, as `Classifier` has it; text has "cosine" only.
        augment: crop and flip training images; None for CIFAR-100 only. Of text there is none.
        seed: of the network's initial weights and the order of the samples. The state of torch's
            own generator stays as it is.

    Raises:
        ValueError: an unknown name, a model that does not go with the data, or more samples than
            there are.
        FileNotFoundError: missing data files.
    """
    check_pair(data=data, model=model)
    check_decay(data=data, decay=decay)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if data in TEXT_DATA:
            return _text_task(batch_size, train_samples, validation_samples, learning_rate, seed)
        images = TensorDataModule(
            _images(data, None if data_dir is None else os.fspath(data_dir)),
            batch_size=batch_size,
            train_images=train_samples,
            validation_images=validation_samples,
            augment=augment,
            seed=seed,
        )
        network = build_model(
            model,
            in_channels=images.in_channels,
            image_size=images.data.train_images.shape[-1],
            classes=images.classes,
        )
        module = Classifier(
            network, classes=images.classes, decay=decay, **_given(learning_rate=learning_rate)
        )
        return Task(module=module, data=images, facts=_facts(module, images, validation_samples))


def _text_task(
    batch_size: int, train: int | None, validation: int, learning_rate: float | None, seed: int
) -> Task:
    text = stdlib_docs()
    data = TextDataModule(
        text, batch_size=batch_size, train_windows=train, validation_windows=validation, seed=seed
    )
    network = CharTransformer(vocabulary=data.vocabulary, context=data.context)
    module = LanguageModel(
        network, vocabulary=data.vocabulary, **_given(learning_rate=learning_rate)
    )
    return Task(
        module=module,
        data=data,
        facts=_facts(module, data, validation) | {"context": data.context, "sha256": text.sha256},
    )


def _facts(
    module: pl.LightningModule, data: TensorDataModule | TextDataModule, validation: int
) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "train_samples": data.train_dataloader().samples,
        "validation_samples": validation,
        "test_samples": data.test_dataloader().samples,
    }


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@functools.lru_cache(maxsize=1)
def _images(name: str, data_dir: str | None) -> ImageData:
    return load_data(name, data_dir)


__all__ = [
    "TASK_DATA",
    "TASK_MODELS",
    "TEXT_DATA",
    "TEXT_MODELS",
    "Task",
    "build_task",
    "check_decay",
    "check_pair",
]
