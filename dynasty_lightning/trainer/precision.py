# SPDX-License-Identifier: Apache-2.0
"""`DynastyPrecision`: the Lightning precision plugin. It converts the module and keeps maps and
random stream in its state.
"""

import warnings
from collections.abc import Collection, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Literal
from weakref import WeakValueDictionary, ref

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from ..maps.precision_map import PrecisionMap
from ..maps.structure import ModelStructure
from ..nn.convert import ConversionReport, check_names, convert, grow
from ..nn.layers import DynamicLayer, dynamic_layers
from ..nn.plan import Mode, plan_template
from ..nn.stream import check_seed
from ..numerics.formats import BlockFormat, Code, Scaling
from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import Role
from .checked_state import reading, sealed_state
from .environment import default_seed
from .environment import environment as environment
from .ranks import Ranks
from .trainer_watch import TrainerWatch, checkpoint_of, refuse_strategy

_STATE_VERSION: Final = 2
_REST_MOVED: Final = "rest is called other_layers now; the old name goes with the next release"


class DynastyPrecision(Precision):
    """Trains every nn.Linear and nn.Conv in block-wise precision:
    `Trainer(plugins=[DynastyPrecision()])`.

    Without `DynastyCallback` every operand has 8 bits.

    Args:
        mode: "fast" multiplies on bf16 units or in float32; "exact" gives the bits that the core
            computes, about 7 times slower.
        block_shape: rows x channels that share one exponent; (4, 4), (8, 8), (16, 16), (1, 16) or
            (1, 32).
        width_group: rows x channels that share one width; None gives each block its own.
        scaling: "window", or "mx" for the OCP MX specification's scales, signs and rounding, in (1,
            32) blocks of one width.
        code, scale_bits: as `BlockFormat` has them; None is "split" and 2 in square blocks, and
            "symmetric" and 0, plain blocks, elsewhere.
        other_layers: precision of everything that is not converted: "32", or "bf16" by autocast.
        exclude: names or patterns of layers that stay as they are.
        unquantized: letters of roles that are not quantized ("X", "W", "E"), for studies; their
            cost is counted as if they were.
        control_variate: lessen dW by what is known of the noise that E's rounding leaves in it
            (docs/concepts/widths.md, Control variate).
        seed: of the random stream; None takes the one of `seed_everything`, else torch's.
        rest: `other_layers` by its name of before 0.1.0; it goes with the next release.

    Raises:
        ValueError: a wrong option; at fit: nothing to convert, or a strategy that is not supported.

    >>> plugin = DynastyPrecision(other_layers="bf16", exclude=["head"])
    >>> plugin.format.block_shape, plugin.mode
    ((4, 4), 'fast')
    >>> model = plugin.convert_module(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    Traceback (most recent call last):
        ...
    ValueError: exclude pattern 'head' matches no layer; layers: 0, 1
    """

    precision: Any = "32-true"

    def __init__(
        self,
        *,
        mode: Mode = "fast",
        block_shape: tuple[int, int] = (4, 4),
        width_group: tuple[int, int] | None = None,
        scaling: Scaling = "window",
        code: Code | None = None,
        scale_bits: int | None = None,
        other_layers: Literal["32", "bf16"] = "32",
        exclude: Collection[str] = (),
        unquantized: Collection[str] = (),
        control_variate: bool = False,
        seed: int | None = None,
        rest: Literal["32", "bf16"] | None = None,
    ) -> None:
        if rest is not None:
            warnings.warn(_REST_MOVED, DeprecationWarning, stacklevel=2)
            if other_layers not in ("32", rest):
                raise ValueError(f"other_layers={other_layers!r} and rest={rest!r} are one option")
            other_layers = rest
        if mode not in ("fast", "exact"):
            raise ValueError(f"mode must be 'fast' or 'exact', not {mode!r}")
        if other_layers not in ("32", "bf16"):
            raise ValueError(f"other_layers must be '32' or 'bf16', not {other_layers!r}")
        check_names("exclude", exclude)
        check_names("unquantized", unquantized)
        if seed is not None:
            check_seed(seed)
        self.mode, self.other_layers, self.seed = mode, other_layers, seed
        self.exclude = tuple(exclude)
        self.unquantized = tuple(Role.from_letter(letter).letter for letter in unquantized)
        self.control_variate = control_variate
        self.format = BlockFormat.usual(
            block_shape=block_shape,
            width_group=width_group,
            scaling=scaling,
            code=code,
            scale_bits=scale_bits,
        )
        self.report: ConversionReport | None = None
        self._module: ref[nn.Module] | None = None
        self._layers: Mapping[str, DynamicLayer] = {}
        self._knows_widths: ref[Any] | None = (
            # the Trainer that trained the module, loaded its widths, or was found to have none
            None
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_module": None,
            "_layers": {},
            "_knows_widths": None,
        }  # the module travels on its own

    @property
    def rest(self) -> Literal["32", "bf16"]:
        """`other_layers` by its old name."""
        warnings.warn(_REST_MOVED, DeprecationWarning, stacklevel=2)
        return self.other_layers

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        refuse_strategy(module)
        if self._module is not None and self._module() is module:
            self.take_in_new_layers()  # its stream goes on
        else:
            self._knows_widths = None
        self.report = convert(
            module,
            mode=self.mode,
            block_shape=self.format.block_shape,
            width_group=self.format.width_group,
            scaling=self.format.scaling,
            code=self.format.code,
            scale_bits=self.format.scale_bits,
            exclude=self.exclude,
            unquantized=self.unquantized,
            control_variate=self.control_variate,
            seed=default_seed() if self.seed is None else self.seed,
            rank=torch.distributed.get_rank()
            if torch.distributed.is_available() and torch.distributed.is_initialized()
            else 0,
        )
        self._module = ref(module)
        self._layers = WeakValueDictionary(dynamic_layers(module))
        self._check_ranks(module)
        self.report.stream.watch = TrainerWatch(module, type(self))
        self._look_for_widths(module)
        return module

    def take_in_new_layers(self) -> None:
        """Convert what the module got since it was converted: layers added or replaced, copies.
        Called before each step.
        """
        module, report = self._layers_owner(), self.report
        assert report is not None
        self.report = grow(
            module,
            report,
            plan_template(
                format=self.format,
                mode=self.mode,
                unquantized=self.unquantized,
                control_variate=self.control_variate,
            ),
            exclude=self.exclude,
        )
        if self.report is not report:
            known = self.layers
            self._layers = WeakValueDictionary(dynamic_layers(module))
            new = [name for name, layer in self._layers.items() if known.get(name) is not layer]
            rank_zero_info(
                f"new layers train in blocks from here on, at 8 bits or as they were copied: "
                f"{', '.join(new)}"
            )

    def _check_ranks(self, module: nn.Module) -> None:
        """Raise RuntimeError, which names the rank, where one has other options or other layers
        than the rest.
        """
        trainer = getattr(module, "_trainer", None)
        if (
            trainer is None
            or not torch.distributed.is_available()
            or not torch.distributed.is_initialized()
            or trainer.world_size == 1
        ):
            return
        ranks = Ranks.of(trainer)
        ranks.check_same(
            str(
                (
                    self.mode,
                    self.format,
                    self.other_layers,
                    self.exclude,
                    self.unquantized,
                    self.control_variate,
                )
            ),
            what="DynastyPrecision's options",
        )
        ranks.check_same(str(self.structure), what="the layers that DynastyPrecision converts")

    def _look_for_widths(self, module: nn.Module) -> None:
        """Warn where a checkpoint is about to be loaded that has weights but no widths."""
        trainer = getattr(module, "_trainer", None)
        loaded = getattr(
            getattr(trainer, "_checkpoint_connector", None), "_loaded_checkpoint", None
        )
        if loaded or (trainer is not None and trainer.state.fn is TrainerFn.FITTING):
            self._knows_widths = ref(trainer)
        if loaded and not loaded.get(type(self).__qualname__):
            widths = (
                "the widths of the active map" if self.precision_map().entries else "uniform 8 bits"
            )
            rank_zero_warn(
                f"{checkpoint_of(module)} holds no widths (it was saved with weights only, or "
                f"without "
                f"DynastyPrecision): its weights run at {widths}, not at those that they were "
                f"trained with"
            )

    def _look_for_map(self) -> None:
        """Report once where a Trainer evaluates what it has neither trained nor loaded widths for,
        and no map is active.

        Weights alone (`load_from_checkpoint`) look like those of a run at uniform 8 bits, so this
        is no warning.
        """
        trainer = getattr(self._layers_owner(), "_trainer", None)
        if trainer is None or (self._knows_widths is not None and self._knows_widths() is trainer):
            return
        self._knows_widths = ref(trainer)
        if not self.precision_map().entries:
            rank_zero_info(
                f"no map is active and this Trainer has not trained the model: its "
                f"{len(self._layers)} converted layers run at uniform "
                f"8 bits. If it was trained with a map, pass that run's checkpoint "
                f"(trainer.{trainer.state.fn.value}(..., ckpt_path=...); "
                "load_from_checkpoint reads the weights alone), or make a saved map active "
                "with apply_map"
            )

    @override
    def convert_output(self, data: Any) -> Any:
        # Of the two that know this class, Fabric alone asks for it.
        raise RuntimeError(
            "Fabric does not serve DynastyPrecision, which is a Trainer's plugin: call report = "
            "dynasty_lightning.convert(model) before "
            "fabric.setup, and report.stream.advance() after each backward pass"
        )

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        if self.report is not None and self._module is not None:
            self.take_in_new_layers()
        if self.other_layers == "32":
            return nullcontext()
        device = next((p.device.type for p in self._layers_owner().parameters()), "cpu")
        return torch.autocast(device, dtype=torch.bfloat16)

    @override
    @contextmanager
    def val_step_context(self) -> Generator[None, None, None]:
        self._look_for_map()
        with self.forward_context():
            yield

    test_step_context = val_step_context
    predict_step_context = val_step_context

    @override
    def post_backward(self, tensor: Tensor, module: "pl.LightningModule") -> Tensor:  # type: ignore[override]
        if self.report is not None:
            self.report.stream.advance()
        return super().post_backward(tensor, module)

    @property
    def layers(self) -> dict[str, DynamicLayer]:
        """The converted layers by name, as of the last step. Raises RuntimeError before the module
        is converted.
        """
        self._layers_owner()
        return dict(self._layers)

    @property
    def structure(self) -> ModelStructure:
        """What a map of this model belongs to."""
        geometries = {name: layer.geometry for name, layer in self.layers.items()}
        return ModelStructure.of(geometries, self.format)

    def precision_map(self) -> PrecisionMap:
        """The active map."""
        entries: dict[str, dict[Role, OperandPrecision]] = {}
        for name, layer in self.layers.items():
            roles = {role: p for role in Role if (p := layer.get_precision(role)) is not None}
            if roles:
                entries[name] = roles
        return PrecisionMap(structure=self.structure, entries=entries)

    def apply_map(self, precision_map: PrecisionMap) -> None:
        """Make a map the active one from the next step on.

        Raises:
            ValueError: it is of another model.
        """
        self.structure.check_equal(precision_map.structure, "the map")
        for name, layer in self.layers.items():
            roles = precision_map.entries.get(name, {})
            for role in Role:
                layer.set_precision(role, roles.get(role))

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._module is None:
            return {}
        assert self.report is not None
        fields = {
            "map": self.precision_map().to_state(),
            "stream": self.report.stream.state_dict(),
            "environment": environment(),
        }
        return sealed_state(_STATE_VERSION, fields)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        source = checkpoint_of(self._layers_owner())
        with reading(
            state_dict, version=_STATE_VERSION, owner=type(self).__name__, source=source
        ) as state:
            precision_map = PrecisionMap.from_state(state["map"], source=f"the map in {source}")
            stream, saved = state["stream"], dict(state["environment"])
        self.structure.check_equal(precision_map.structure, source)
        self.apply_map(precision_map)
        if (trainer := getattr(self._layers_owner(), "_trainer", None)) is not None:
            self._knows_widths = ref(trainer)
        assert self.report is not None
        self.report.stream.load_state_dict(stream)
        differing = {
            k: (v, environment()[k]) for k, v in saved.items() if environment().get(k) != v
        }
        if differing:
            warnings.warn(
                f"resumed in another environment than the checkpoint's, so not bit for bit: "
                f"{differing}",
                stacklevel=2,
            )

    def _layers_owner(self) -> nn.Module:
        module = self._module() if self._module is not None else None
        if module is None:
            raise RuntimeError(
                "DynastyPrecision has converted no module yet: pass it to a Trainer and call "
                "fit, validate, test or predict"
            )
        return module


__all__ = ["DynastyPrecision"]
