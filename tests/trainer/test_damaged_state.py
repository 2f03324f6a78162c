"""Damage on a disk: a flipped bit, a page of zeros, a cut. Every file of state that the package
writes is refused before it is used.
"""

import re
import warnings
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dynasty_lightning import (
    BitWidthMap,
    DynastyCallback,
    DynastyPrecision,
    OperandPrecision,
    PrecisionMap,
    Role,
)
from dynasty_lightning.files import DamagedFile
from dynasty_lightning.maps.structure import ModelStructure
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.study import demo_run
from dynasty_lightning.study.checkpoint import RunCheckpoint
from dynasty_lightning.study.report.run_folder import (
    SUMMARY_FILE,
    read_history,
    read_summary,
    write_summary,
)
from dynasty_lightning.study.results import ResultsFile, read_records
from dynasty_lightning.trainer.checked_state import reading, sealed_state, state_digest
from dynasty_lightning.trainer.checkpoint_files import SealedCheckpointIO, read_checkpoint
from fpga.images import IMAGES_FILE, load_images, save_images

FLIPS, PAGES, CUTS = 100, 20, 20
PAGE = 4096


def damaged(content):
    """(what was done, the content after it): bits flipped, pages of zeros, ends cut off; seeded."""
    generator = np.random.default_rng(8)
    for bit in generator.choice(8 * len(content), FLIPS, replace=False).tolist():
        yield (
            f"bit {bit} flipped",
            content[: bit // 8]
            + bytes([content[bit // 8] ^ 1 << bit % 8])
            + content[bit // 8 + 1 :],
        )
    for begin in generator.integers(0, max(len(content) - PAGE, 1), PAGES).tolist():
        zeroed = (
            content[:begin] + bytes(len(content[begin : begin + PAGE])) + content[begin + PAGE :]
        )
        if zeroed != content:
            yield f"zeros from byte {begin}", zeroed
    for size in generator.integers(0, len(content), CUTS).tolist():
        yield f"cut off after {size} bytes", content[:size]


def structure():
    layer = LayerGeometry(kind="linear", weight_shape=(8, 12))
    return ModelStructure(layers={"net.0": layer}, block_shape=(4, 4), width_group=None)


def write_checkpoint(path):
    state = {
        "state_dict": {"weight": torch.randn(70, 70)},
        "callbacks": {"RunCheckpoint": {"identity": {"run": "1"}}},
    }
    SealedCheckpointIO().save_checkpoint(state, path)


def write_map(path):
    entries = {
        "net.0": {
            Role.WEIGHT: OperandPrecision(bits=torch.randint(2, 9, (2, 3), dtype=torch.uint8))
        }
    }
    PrecisionMap(structure=structure(), entries=entries).save(path)


def write_widths(path):
    BitWidthMap(
        structure=structure(),
        bits={"net.0": {Role.WEIGHT: torch.randint(2, 9, (2, 3), dtype=torch.uint8)}},
    ).save(path)


def write_results(path):
    with ResultsFile(path) as file:
        file.add(
            {
                "key": "k" * 64,
                "config": {"method": "uniform8"},
                "status": "complete",
                "accuracy": 0.7,
                "loss": 1 / 3,
                "machine": {},
            }
        )


def read_results(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            (record,) = read_records(path)
        except UserWarning as warning:
            raise DamagedFile(str(warning)) from None
    assert record["loss"] == 1 / 3


def write_images(path):
    images = np.random.default_rng(0).standard_normal((20, 1, 8, 8)).astype(np.float32)
    save_images(path.parent, images, np.arange(20))


class Demo:
    """What a demo's callback has to write."""

    history: ClassVar = [
        {
            "step": step,
            "bits": {"net.0": {"X": 3.0, "W": 4.0, "E": 5.0}},
            "mean_bits": {"X": 3.0, "W": 4.0, "E": 5.0},
        }
        for step in (3, 6, 9)
    ]

    def precision_map(self):
        return PrecisionMap(structure=structure(), entries={})

    def bit_width_map(self):
        return BitWidthMap(structure=structure(), bits={})


def write_demo(path):
    """A run folder; the file of the path is one of it."""
    files = demo_run.write_run_files(path.parent, Demo(), "dynasty", 0)
    figures = {"accuracy": 0.5, "speedup_charged": 4.5, "steps": 9}
    write_summary(
        path.parent,
        {
            "args": {"data": "digits", "model": "mlp"},
            "runs": [{"name": "dynasty", "seed": 0, **figures, **files}],
        },
    )


def read_demo(path):
    (run,) = read_summary(path.parent)["runs"]
    assert len(read_history(path.parent / run["history_file"], run["history_sha256"])) == 3


KINDS = {
    SUMMARY_FILE: (write_demo, read_demo),
    "history-dynasty-0.jsonl": (write_demo, read_demo),
    "run.ckpt": (write_checkpoint, read_checkpoint),
    "map.safetensors": (write_map, PrecisionMap.load),
    "widths.safetensors": (write_widths, BitWidthMap.load),
    "results.jsonl": (write_results, read_results),
    IMAGES_FILE: (write_images, lambda path: load_images(path.parent)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_of_a_file_of_state_is_read(tmp_path, kind):
    write, read = KINDS[kind]
    path = tmp_path / kind
    write(path)
    content = path.read_bytes()
    read(path)
    passed = []
    for what, bad in damaged(content):
        path.write_bytes(bad)
        try:
            read(path)
        except ValueError as error:  # the package's own, with the file's name and a way out
            if not re.search(
                rf"{re.escape(str(path))}.*(again|anew|give a file of that kind|use the package "
                rf"version|are written by)",
                str(error),
            ):
                passed.append(f"{what}: {error}")
        else:
            passed.append(what)
    assert passed == []


def test_a_run_never_goes_on_from_a_damaged_checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"
    write_checkpoint(path)
    content = path.read_bytes()
    kept = RunCheckpoint(path, seconds=0.0, identity={"run": "1"})
    assert kept.found() == path
    for what, bad in damaged(content):
        path.write_bytes(bad)
        with pytest.warns(
            UserWarning, match=r"run\.ckpt (is damaged|has no digest).*: the run starts over"
        ):
            assert kept.found() is None, what
        assert not path.exists()


def test_a_run_that_was_killed_while_it_saved_leaves_nothing(tmp_path):
    (tmp_path / f".run.ckpt.{'0' * 16}.tmp").touch()
    assert RunCheckpoint(tmp_path / "run.ckpt", seconds=0.0, identity={}).found() is None
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_reaches_the_disk_with_its_folder_and_reads_as_any_other(
    tmp_path, monkeypatch
):
    synced = []
    monkeypatch.setattr("os.fsync", lambda handle: synced.append(handle))
    write_checkpoint(tmp_path / "folder" / "x.ckpt")
    assert len(synced) == 2
    assert torch.load(tmp_path / "folder" / "x.ckpt", weights_only=True)["state_dict"][
        "weight"
    ].shape == (70, 70)


def test_no_pickle_from_outside_is_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return pytest.fail, ("run",)

    SealedCheckpointIO().save_checkpoint({"x": Attack()}, tmp_path / "x.ckpt")
    for read in (read_checkpoint, SealedCheckpointIO().load_checkpoint):
        with pytest.raises(Exception, match="Weights only load failed"):
            read(tmp_path / "x.ckpt")


def test_what_sealed_checkpoints_cannot_do_is_named(tmp_path):
    with pytest.raises(ValueError, match="keeps local files, not s3://"):
        SealedCheckpointIO().save_checkpoint({}, "s3://bucket/x.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path)
    torch.save({}, tmp_path / "x.ckpt")
    with pytest.raises(
        DamagedFile, match=r"x\.ckpt has no digest.*without SealedCheckpointIO is read without it"
    ):
        read_checkpoint(tmp_path / "x.ckpt")
    kept = RunCheckpoint(tmp_path / "run.ckpt", seconds=0.0, identity={})
    with pytest.raises(ValueError, match=r"add plugins=\[SealedCheckpointIO\(\)\]"):
        trainer([kept]).fit(Model())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_trainer_with_the_plugin_reads_no_damaged_checkpoint_and_goes_on_from_a_whole_one(
    tmp_path,
):
    path = tmp_path / "own.ckpt"
    done = trainer([], SealedCheckpointIO(), steps=2)
    done.fit(Model())
    done.save_checkpoint(path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(DamagedFile, match=r"own\.ckpt is damaged.*Go on from another checkpoint"):
        trainer([], SealedCheckpointIO(), steps=4).fit(Model(), ckpt_path=path)
    path.write_bytes(content)
    resumed = trainer([], SealedCheckpointIO(), steps=4)
    resumed.fit(Model(), ckpt_path=path)
    assert resumed.global_step == 4


# -- Our state in a checkpoint of the user's


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        batches = [
            (torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8)) for _ in range(12)
        ]
        return DataLoader(batches, batch_size=None)


def trainer(callbacks, *plugins, steps=12):
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[DynastyPrecision(), *plugins],
        callbacks=callbacks,
    )


def dynasty():
    return DynastyCallback(target_speedup=4.0, interval=2, warmup_steps=2, table=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of a run that has maps, averages and figures, as Lightning writes it."""
    path = tmp_path_factory.mktemp("saved") / "user.ckpt"
    done = trainer([dynasty()], steps=9)
    done.fit(Model())
    done.save_checkpoint(path)
    return path


STATES = {
    "DynastyCallback": lambda checkpoint: checkpoint["callbacks"]["DynastyCallback"],
    "DynastyPrecision": lambda checkpoint: checkpoint["DynastyPrecision"],
}


def leaves(value, path=()):
    """(where, holder, key) of each tensor and plain value."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list | tuple):
            yield from leaves(item, (*path, key))
        else:
            yield (*path, key)


def changed(value, path):
    """The same, with one leaf of another value."""
    if not path:
        if isinstance(value, torch.Tensor):
            other = value.clone()
            other.view(-1).view(torch.uint8)[0] ^= 1
            return other
        return {
            float: lambda: 0.25 if value != 0.25 else 0.5,
            int: lambda: value + 1,
            bool: lambda: not value,
            str: lambda: value + "?",
        }.get(type(value), lambda: 1)()
    key, *rest = path
    if isinstance(value, dict):
        return value | {key: changed(value[key], rest)}
    return type(value)(changed(item, rest) if i == key else item for i, item in enumerate(value))


@pytest.mark.filterwarnings(
    "ignore:resumed in another environment"
)  # other tests set the number of threads
@pytest.mark.parametrize("owner", STATES)
def test_each_number_of_our_state_that_was_changed_is_refused_by_the_name_of_its_field(
    saved, owner
):
    callback, plugin, converted = dynasty(), DynastyPrecision(), Model()
    plugin.convert_module(converted)
    load = {"DynastyCallback": callback, "DynastyPrecision": plugin}[owner].load_state_dict
    state = STATES[owner](torch.load(saved, weights_only=True))
    load(state)
    generator = np.random.default_rng(0)
    paths = [path for path in leaves(state) if path != ("version",)]
    assert {path[0] for path in paths} == set(state) - {"version"}
    for path in [
        paths[i] for i in generator.choice(len(paths), min(200, len(paths)), replace=False)
    ]:
        with pytest.raises(
            DamagedFile,
            match=f"{owner}'s state in .*: field '{path[path[0] == 'sha256']}' is not what was "
            f"saved",
        ):
            load(changed(state, path))
    for name in state:
        without = {key: value for key, value in state.items() if key != name}
        message = {"version": "is of version 1, this", "sha256": "has no digests"}.get(
            name, f"field '{name}' is missing"
        )
        with pytest.raises(ValueError, match=message):
            load(without)
    with pytest.raises(DamagedFile, match="field 'more' is not what was saved"):
        load(state | {"more": 1})
    with pytest.raises(ValueError, match="is of version 99, this package reads"):
        load(state | {"version": 99})
    with pytest.raises(DamagedFile, match="is a list, not a dictionary"):
        load([1])


@pytest.mark.parametrize("owner", STATES)
def test_training_does_not_go_on_from_a_file_whose_state_was_changed(saved, tmp_path, owner):
    checkpoint = torch.load(saved, weights_only=True)
    state = STATES[owner](checkpoint)
    state.update(
        changed(state, next(path for path in leaves(state) if isinstance(state[path[0]], dict)))
    )
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(
        DamagedFile,
        match=rf"{owner}'s state in .*changed\.ckpt: field .*Resume from another checkpoint",
    ):
        trainer([dynasty()]).fit(Model(), ckpt_path=tmp_path / "changed.ckpt")


def test_a_field_that_cannot_be_taken_over_is_named(saved):
    """As of a policy that was changed since; its digest is right."""
    state = STATES["DynastyCallback"](torch.load(saved, weights_only=True))
    policy = {name: value for name, value in state["policy"].items() if name != "level"}
    fields = {name: value for name, value in state.items() if name not in ("version", "sha256")}
    with pytest.raises(
        DamagedFile,
        match=r"field 'policy' cannot be taken over \(KeyError: 'level'\): resume with the version",
    ):
        dynasty().load_state_dict(sealed_state(state["version"], fields | {"policy": policy}))
    with pytest.raises(DamagedFile, match="field 'guard' cannot be taken over"):
        dynasty().load_state_dict(sealed_state(state["version"], fields | {"guard": None}))
    with (
        pytest.raises(DamagedFile, match="field 'guard' is missing"),
        reading(sealed_state(1, {}), version=1, owner="x", source="y") as empty,
    ):
        empty["guard"]


def test_digests_tell_values_apart_and_forget_nothing_that_a_file_keeps():
    values = [
        None,
        True,
        1,
        1.0,
        "1",
        b"1",
        [1],
        [[1]],
        {"1": 1},
        {1: 1},
        [1, 2],
        [12],
        "",
        [""],
        ["", ""],
        {},
        [],
        -0.0,
        0.0,
        float("nan"),
        torch.tensor(1),
        torch.tensor([1]),
        torch.tensor([1.0]),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.empty(0),
        torch.empty(0, 2),
    ]
    assert len({state_digest(value) for value in values}) == len(values)
    assert state_digest((1, 2)) == state_digest([1, 2])
    assert state_digest(torch.arange(6).view(2, 3).T) == state_digest(
        torch.arange(6).view(2, 3).T.contiguous()
    )
