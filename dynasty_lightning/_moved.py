# SPDX-License-Identifier: Apache-2.0
"""Modules by their paths of before 0.1.0: for one release they are found, with a DeprecationWarning
that says where they lie now.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

_PACKAGE: Final = __name__.rpartition(".")[0]
MOVED: Final = {
    "analysis": "trainer.analysis",
    "bridge": "hardware.offload",
    "callback": "trainer.callback",
    "checked_state": "trainer.checked_state",
    "checkpoint_files": "trainer.checkpoint_files",
    "compare": "study.grid",
    "compare_pictures": "study.report.pictures",
    "compare_report": "study.report.markdown",
    "compare_settings": "study.report.settings",
    "core": "numerics",
    "core.blocks": "numerics.layout",
    "core.formats": "numerics.formats",
    "core.geometry": "numerics.geometry",
    "core.matmul": "numerics.gemm",
    "core.mx": "numerics.mx",
    "core.native": "numerics.backends.native",
    "core.precision": "numerics.operand_precision",
    "core.quantize": "numerics.quantize",
    "core.random": "numerics.random",
    "core.roles": "numerics.roles",
    "core.rounding": "numerics.rounding",
    "core.stats": "numerics.moments",
    "core.triton_kernels": "numerics.backends.triton_kernels",
    "core.triton_quantizer": "numerics.backends.triton",
    "core_check": "hardware.check",
    "data": "tasks.data",
    "data.files": "tasks.data.files",
    "data.loader": "tasks.data.loader",
    "data.module": "tasks.data.module",
    "data.text": "tasks.data.text",
    "demo": "study.demo",
    "export": "hardware.program",
    "export_record": "hardware.record",
    "export_run": "study.export",
    "hls4ml_export": "hardware.hls4ml.project",
    "hls4ml_layer": "hardware.hls4ml.layer",
    "look": "trainer.look",
    "methods": "study.method",
    "metrics": "trainer.metrics",
    "models": "tasks.models",
    "models.chartransformer": "tasks.models.chartransformer",
    "models.classifier": "tasks.models.classifier",
    "models.initialization": "tasks.models.initialization",
    "models.language": "tasks.models.language",
    "models.mobilenet": "tasks.models.mobilenet",
    "models.networks": "tasks.models.networks",
    "models.schedule": "tasks.models.decay",
    "models.transformer": "tasks.models.transformer",
    "models.vgg": "tasks.models.vgg",
    "models.vit": "tasks.models.vit",
    "nn.records": "nn.observe",
    "policy.controls": "policy.baselines.controls",
    "policy.generator": "policy.threshold",
    "policy.precision_map": "maps.precision_map",
    "policy.rivals": "policy.baselines.rivals",
    "policy.scheduled": "policy.baselines.scheduled",
    "policy.widths": "policy.baselines.widths",
    "precision": "trainer.precision",
    "progress": "study.progress",
    "promises": "trainer.promises",
    "ranks": "trainer.ranks",
    "record_fields": "study.record_fields",
    "report": "study.report.demo",
    "results_file": "study.results",
    "run_checkpoint": "study.checkpoint",
    "run_steps": "trainer.run_steps",
    "runs": "study.run",
    "step_size": "trainer.step_size",
    "workers": "study.workers",
}
"""Old paths and new ones, both below the package."""


class _Moved(MetaPathFinder, Loader):
    """Finds a module by its old path: it is the one at the new path, not a second one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{_PACKAGE}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(
            f"{spec.name} has moved to {new}; the old path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # importlib has given it the old path's


def install() -> None:
    """Once for the process."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
