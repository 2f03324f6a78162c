# SPDX-License-Identifier: Apache-2.0
"""What fixes one run, and the key that its result is stored under.

A field knows itself what it is: its help, its limits, what it belongs to. Command line, key, label
and report read that from here.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Final, Literal

from ..tasks.models.decay import DECAYS, Decay
from ..tasks.tasks import TASK_DATA, TASK_MODELS, check_decay, check_pair
from .method import FLOATS, Method

Owner = Literal["grid", "training", "blocks"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field of `RunConfig` is to those who read it.

    Attributes:
        help: a phrase for the command line.
        belongs_to: "grid" (an axis of it), "training" (what runs are compared at), or "blocks"
            (without effect for floating point, and part of a row's name in reports).
        least: for numbers.
        choices: for words.
        metavar: what stands for a value in the help.
        absent: what None means, for the help.
        later: the first records lack the field, so that reports read its default there.
    """

    help: str
    belongs_to: Owner = "training"
    least: int | None = None
    choices: tuple[str, ...] = ()
    metavar: str = "N"
    absent: str = ""
    later: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError with the rule and the value, unless the value keeps it."""
        if self.choices and value not in self.choices:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(self.choices)}")
        if self.least is not None and value is not None and value < self.least:
            raise ValueError(f"{name} must be at least {self.least}, not {value}")


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of `RunConfig` that knows its own flag; `MISSING` as its default has it required."""
    return field(default=default, metadata={"option": Option(help=help, **more)})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that fixes one run, but for machine and code.

    The key of a run is made of what differs from the defaults here: a new field with a default
    changes no key, a changed default gives old results another meaning.

    >>> config = RunConfig(
    ...     data="digits", model="mlp", method="float32", seed=0, epochs=1, batch_size=32
    ... )
    >>> config.label, config.key[:12]
    ('digits mlp float32 seed 0', 'ea7a4c457b59')

    Attributes:
        method: one word, see `method`.
        seed: of network, order of images, augmentation and rounding.
        data, model: as `build_task` has them.
        train_samples, validation_samples: None for all; held back from training. The choice does
            not depend on the seed.
        learning_rate: highest of the run; None for the model's own.
        decay: of the learning rate, "cosine" or "steps" (a tenth after half and again after three
            quarters of the run).
        augmentation: of training images, "usual" for the data set or "none".
        average_from: in [0, 1): also evaluate the mean of the weights of the steps from this share
            of the run on (`EndAverage`); None does not.
        accelerator: what trains; a GPU's sums differ in their last bits, so it is part of what
            fixes a run.
        mode, block_shape, width_group, codes, interval: of blocks, where the method has no other;
            without effect for floating point. Codes are "plain" here, as in the first records,
            "dense" from the command line.
        evaluate_on: "test", or "validation" for choices that must not see the test set.

    Raises:
        ValueError: a value out of range.
    """

    data: str = option(MISSING, "data set", belongs_to="grid", choices=TASK_DATA)
    model: str = option(MISSING, "network", belongs_to="grid", choices=TASK_MODELS)
    method: str = option(MISSING, "how a run chooses its numbers", belongs_to="grid")
    seed: int = option(MISSING, "first seed", belongs_to="grid", metavar="S")
    epochs: int = option(MISSING, "epochs of each run", least=1)
    batch_size: int = option(MISSING, "images a step", least=1)
    train_samples: int | None = option(
        None,
        "use only N images of a fixed shuffle, or N windows of a text an epoch",
        least=1,
        absent="all",
    )
    validation_samples: int = option(
        0, "hold N training images back; of a text, N windows of its own part", least=0
    )
    learning_rate: float | None = option(
        None, "highest of the schedule", metavar="RATE", absent="the model's own"
    )
    decay: Decay = option(
        "cosine",
        "of the learning rate; steps: a tenth after half and 3/4 of the run",
        choices=DECAYS,
        later=True,
    )
    augmentation: Literal["usual", "none"] = option(
        "usual",
        "of training images; usual: crops and flips for CIFAR-100, none elsewhere",
        choices=("usual", "none"),
        later=True,
    )
    accelerator: Literal["cpu", "gpu"] = option(
        "cpu",
        "what trains; part of what a result is stored under",
        choices=("cpu", "gpu"),
        later=True,
    )
    average_from: float | None = option(
        None,
        "evaluate the mean of the weights from this share of the run on, too",
        metavar="SHARE",
        absent="no mean",
        later=True,
    )
    mode: Literal["fast", "exact"] = option(
        "fast", "of the blocks' sums", choices=("fast", "exact"), belongs_to="blocks"
    )
    block_shape: tuple[int, int] = option(
        (4, 4), "elements that share an exponent", metavar="RxC", belongs_to="blocks"
    )
    width_group: tuple[int, int] | None = option(
        None,
        "elements that share a width",
        metavar="RxC",
        absent="the block",
        belongs_to="blocks",
    )
    codes: Literal["plain", "dense"] = option(
        "plain",
        "of square blocks: dense ones are split and have scales with a mantissa",
        choices=("plain", "dense"),
        belongs_to="blocks",
    )
    interval: int = option(50, "steps between analyses", least=1, belongs_to="blocks")
    evaluate_on: Literal["test", "validation"] = option(
        "test", "validation never looks at the test set", choices=("test", "validation")
    )

    def __post_init__(self) -> None:
        check_pair(data=self.data, model=self.model)
        for name, about in OPTIONS.items():
            about.check(name, getattr(self, name))
        check_decay(data=self.data, decay=self.decay)
        if self.learning_rate is not None and not (
            self.learning_rate > 0 and math.isfinite(self.learning_rate)
        ):
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if self.average_from is not None and not 0 <= self.average_from < 1:
            raise ValueError(
                f"average_from is a share of the run in [0, 1), not {self.average_from}"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must fit 32 unsigned bits, not {self.seed}")
        if self.evaluate_on == "validation" and not self.validation_samples:
            raise ValueError("evaluate_on='validation' needs validation_samples: hold some back")
        method = Method.parse(self.method)
        method.check()
        object.__setattr__(self, "method", str(method))
        plugin = method.make_plugin(
            seed=0, block_shape=self.block_shape, width_group=self.width_group
        )
        if plugin is not None and not plugin.format.is_fine:  # such blocks have no denser codes
            object.__setattr__(self, "codes", "plain")
        if self.learning_rate is not None:
            object.__setattr__(self, "learning_rate", float(self.learning_rate))

    def canonical(self) -> dict[str, Any]:
        """What the key is made of: fields that differ from their defaults and have an effect."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        }
        if self.method in FLOATS:
            values = {name: value for name, value in values.items() if name not in OF_BLOCKS}
        return values

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """For a line of progress."""
        return f"{self.data} {self.model} {self.method} seed {self.seed}"

    def command(self) -> str:
        """What repeats this one run, with data in $DYNASTY_DATA."""
        words = ["dynasty-lightning", "compare", "--methods", self.method]
        words += ["--seed", str(self.seed), "--seeds", "1"]
        for name, value in self.canonical().items():
            if name not in ("method", "seed", "codes"):
                words += [flag(name), shape_text(value) if isinstance(value, tuple) else str(value)]
        words += ["--codes", self.codes]  # plain ones, of the first records, are not its default
        return shlex.join([*words, "--out", "repeated.jsonl"])


def flag(name: str) -> str:
    """A field's name as an option of the command line."""
    return f"--{name.replace('_', '-')}"


def shape_text(shape: tuple[int, int] | list[int]) -> str:
    """A block's shape as it is written: 4x4."""
    return "x".join(map(str, shape))


def _belonging(fields_of: Mapping[str, Field[Any]], *owners: Owner) -> dict[str, Field[Any]]:
    return {n: f for n, f in fields_of.items() if f.metadata["option"].belongs_to in owners}


_FIELDS: Final = {f.name: f for f in fields(RunConfig)}
OPTIONS: Final[Mapping[str, Option]] = {n: f.metadata["option"] for n, f in _FIELDS.items()}
"""What each field is."""
OF_BLOCKS: Final[Mapping[str, Any]] = {
    name: f.default for name, f in _belonging(_FIELDS, "blocks").items()
}
"""Fields without effect for floating point, and their defaults."""
COMPARED_AT: Final = (
    "data",
    "model",
    *(n for n, f in _belonging(_FIELDS, "training").items() if not f.metadata["option"].later),
)
"""What runs must have in common to stand in one table, and what every record has of it."""
COMPARED_AT_LATER: Final[Mapping[str, Any]] = {
    name: f.default
    for name, f in _belonging(_FIELDS, "training").items()
    if f.metadata["option"].later
}
"""The same of later fields, with what they are where a record is older than they."""

__all__ = ["RunConfig"]
