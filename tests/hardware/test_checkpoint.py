"""A checkpoint read outside of a Trainer gives what the Trainer's own evaluation gives."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynasty_lightning import (
    DynastyCallback,
    DynastyPrecision,
    OperandPrecision,
    PrecisionMap,
    SealedCheckpointIO,
)
from dynasty_lightning.files import DamagedFile
from dynasty_lightning.hardware.checkpoint import load_converted
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics.roles import Role


class Module(L.LightningModule):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(x))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(32, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(images, images.mean((1, 2, 3)).gt(0).long()), batch_size=8)


def trainer(**plugin: Any) -> L.Trainer:
    return L.Trainer(
        max_steps=12,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[DynastyPrecision(mode="exact", seed=3, **plugin), SealedCheckpointIO()],
        callbacks=[DynastyCallback(target_speedup=4.0, interval=4, table=False)],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A checkpoint, of 8 x 8 blocks and a head that is not converted, and its predictions."""
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    torch.manual_seed(0)
    module, training = Module(), trainer(block_shape=(8, 8), exclude=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.fit(module, batches())
        training.save_checkpoint(path)
        return path, training.predict(module, batches())


@pytest.mark.parametrize("as_file", [True, False])
def test_a_loaded_module_predicts_as_the_trainer_does(
    trained: tuple[Path, list[Tensor]], as_file: bool
) -> None:
    path, predictions = trained
    module = Module()
    given: Any = path if as_file else torch.load(path, weights_only=True)
    state = load_converted(module, given)
    assert state["global_step"] == 12
    layers = dynamic_layers(module)
    assert list(layers) == ["network.0", "network.3"]
    assert type(module.head) is nn.Linear
    assert all(layer.format.block_shape == (8, 8) for layer in layers.values())
    assert any(layer.get_precision(role) for layer in layers.values() for role in Role)
    assert module.training
    module.eval()
    with torch.no_grad():
        found = [module(images) for images, _ in batches()]
    assert all(torch.equal(a, b) for a, b in zip(found, predictions, strict=True))


def test_the_mode_is_the_callers(trained: tuple[Path, list[Tensor]]) -> None:
    module = Module()
    load_converted(module, trained[0], mode="fast")
    assert {layer.mode for layer in dynamic_layers(module).values()} == {"fast"}


def saved(module: nn.Module, **options: Any) -> Mapping[str, Any]:
    plugin = DynastyPrecision(**options)
    plugin.convert_module(module)
    return {"state_dict": module.state_dict(), "DynastyPrecision": plugin.state_dict()}


def test_the_scaling_is_the_callers() -> None:
    options: Any = {"scaling": "mx", "block_shape": (1, 32)}
    twin, module = Module(64), Module(64)
    load_converted(module, saved(twin, **options), scaling="mx", mode="fast")
    x = torch.randn(4, 1, 6, 6)
    assert torch.equal(module.eval()(x), twin.eval()(x))


def test_a_map_of_other_layers_is_named() -> None:
    state = saved(Module())
    other = nn.Sequential(nn.Linear(4, 4))
    plugin = DynastyPrecision()
    plugin.convert_module(other)
    bits = {"0": {Role.WEIGHT: OperandPrecision(bits=4)}}
    plugin.apply_map(PrecisionMap(structure=plugin.structure, entries=bits))
    with pytest.raises(ValueError, match=r"layer 'network\.0' is not there in it"):
        load_converted(Module(), {**state, "DynastyPrecision": plugin.state_dict()})


def test_what_is_no_checkpoint_of_the_module_is_refused(tmp_path: Path) -> None:
    state = saved(Module())
    with pytest.raises(ValueError, match="the checkpoint holds no weights of this model"):
        load_converted(Module(hidden=8), state)
    with pytest.raises(ValueError, match="holds no weights of the head"):
        load_converted(Module(), {**state, "state_dict": None}, name="the head")
    with pytest.raises(ValueError, match="was not trained with DynastyPrecision"):
        load_converted(Module(), {"state_dict": Module().state_dict()})
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_converted(Module(), tmp_path / "none.ckpt")
    path = tmp_path / "cut.ckpt"
    SealedCheckpointIO().save_checkpoint(dict(state), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFile, match=r"cut\.ckpt"):
        load_converted(Module(), path)
    with pytest.raises(FileNotFoundError, match="it is a folder: name a file in it"):
        load_converted(Module(), tmp_path)
    with pytest.raises(TypeError, match=r"a file's path, or what torch\.load gave, not 5"):
        load_converted(Module(), 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, not <class"):
        load_converted(Module, state)  # type: ignore[arg-type]
