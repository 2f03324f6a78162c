"""Data and model by name: pairs that fit are built the same way each time, others are refused
before a file is read.
"""

import json

import numpy as np
import pytest
import torch

from dynasty_lightning.tasks import tasks
from dynasty_lightning.tasks.data import TextData
from dynasty_lightning.tasks.models import CharTransformer, Classifier, LanguageModel
from dynasty_lightning.tasks.models.decay import stepped
from dynasty_lightning.tasks.tasks import (
    TASK_DATA,
    TASK_MODELS,
    Task,
    build_task,
    check_decay,
    check_pair,
)


@pytest.fixture(autouse=True)
def _short_text(monkeypatch):
    text = (np.arange(9000) % 97).astype(np.uint8)
    data = TextData(
        name="stdlib-docs", train=text, validation=text[:2000], test=text[:1000], sha256="abc"
    )
    monkeypatch.setattr(tasks, "stdlib_docs", lambda: data)


PAIRS = [("digits", "mlp"), ("stdlib-docs", "chartransformer")]


def test_names():
    assert TASK_DATA == ("digits", "fashion-mnist", "cifar100", "stdlib-docs")
    assert {
        "resnet8",
        "resnet20",
        "resnet38",
        "resnet74",
        "resnet18",
        "mobilenetv2",
        "vgg-small",
        "mlp",
        "vit",
    } < set(TASK_MODELS)
    assert TASK_MODELS[-1] == "chartransformer"


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (
            "digits",
            "chartransformer",
            "model 'chartransformer' does not go with data 'digits': choose one of resnet8, ",
        ),
        (
            "stdlib-docs",
            "vit",
            "model 'vit' does not go with data 'stdlib-docs': choose one of chartransformer",
        ),
        (
            "mnist",
            "mlp",
            "unknown data 'mnist': choose one of digits, fashion-mnist, cifar100, stdlib-docs",
        ),
        ("digits", "vgg", "unknown model 'vgg': choose one of resnet8, .*chartransformer"),
    ],
)
def test_pairs_that_do_not_fit(data, model, message):
    for refuse in (check_pair, build_task):
        with pytest.raises(ValueError, match=message):
            refuse(data=data, model=model)


@pytest.mark.parametrize(("data", "model"), PAIRS)
def test_a_task_is_what_a_trainer_takes(data, model):
    task = build_task(
        data=data,
        model=model,
        batch_size=8,
        train_samples=20,
        validation_samples=12,
        learning_rate=0.03,
    )
    assert isinstance(task, Task)
    assert task.module.learning_rate == 0.03
    assert [len(b[1]) for b in task.data.train_dataloader()] == [8, 8, 4]
    assert [len(b[1]) for b in task.data.val_dataloader()] == [12]
    assert sum(len(b[1]) for b in task.data.test_dataloader()) == task.facts["test_samples"] > 0
    x, y = next(iter(task.data.train_dataloader()))
    assert task.module(x).shape[: y.ndim] == y.shape
    assert task.facts["parameters"] == sum(p.numel() for p in task.module.network.parameters())
    assert (task.facts["train_samples"], task.facts["validation_samples"]) == (20, 12)
    assert json.loads(json.dumps(task.facts)) == task.facts


def test_defaults():
    images, text = (build_task(data=data, model=model) for data, model in PAIRS)
    assert (type(images.module), type(text.module)) == (Classifier, LanguageModel)
    assert (
        images.module.learning_rate,
        images.facts["train_samples"],
        images.data.val_dataloader(),
    ) == (0.1, 1437, [])
    assert (
        text.facts["train_samples"],
        text.facts["context"],
        text.facts["sha256"],
        text.data.val_dataloader(),
    ) == (69, 128, "abc", [])
    assert isinstance(text.module.network, CharTransformer)


@pytest.mark.parametrize(("data", "model"), PAIRS)
def test_the_seed_fixes_weights_and_order_and_leaves_torch_alone(data, model):
    def made(seed):
        task = build_task(data=data, model=model, batch_size=8, seed=seed)
        return [*task.module.state_dict().values(), *next(iter(task.data.train_dataloader()))]

    before = torch.random.get_rng_state()
    first = made(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, made(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, made(2), strict=True))


@pytest.mark.parametrize(("data", "model"), PAIRS)
def test_more_samples_than_there_are(data, model):
    with pytest.raises(ValueError, match=f"{data} has .* do not fit"):
        build_task(data=data, model=model, train_samples=10**6)


def test_steps_of_the_learning_rate():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, rates = stepped(optimizer, steps=8), []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_decays_that_are_refused():
    with pytest.raises(
        ValueError, match="stdlib-docs is trained with decay 'cosine' only, not 'steps'"
    ):
        check_decay(data="stdlib-docs", decay="steps")
    with pytest.raises(ValueError, match="unknown decay 'linear'"):
        check_decay(data="digits", decay="linear")
    with pytest.raises(ValueError, match="decay 'steps' has no rise"):
        Classifier(torch.nn.Identity(), classes=2, decay="steps", warmup_fraction=0.1)
