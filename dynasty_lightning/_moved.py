# SPDX-License-Identifier: Apache-2.0
"""Modules and names of before 0.1.0: for one release they are found, with a DeprecationWarning that
names where they lie now.
"""

from typing import Final

from fpga._moved import install
from fpga._moved import renamed_keywords as renamed_keywords

_PACKAGE: Final = __name__.rpartition(".")[0]
MOVED: Final = {
    "analysis": "trainer.analysis",
    "bridge": "hardware.offload",
    "callback": "trainer.callback",
    "checked_state": "trainer.checked_state",
    "checkpoint_files": "trainer.checkpoint_files",
    "cli.command_line": "cli.main",
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
    "export_record": "hardware.recording",
    "hardware.record": "hardware.recording",
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
    "policy.baselines.controls": "policy.baselines.magnitude",
    "policy.baselines.rivals": "policy.baselines.per_layer",
    "policy.controls": "policy.baselines.magnitude",
    "policy.generator": "policy.threshold",
    "policy.precision_map": "maps.precision_map",
    "policy.rivals": "policy.baselines.per_layer",
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
DEFINITIONS: Final = {
    "cli": {"DEFAULT_SPEEDUP": "study.demo"},
    "cli.main": {"DEFAULT_SPEEDUP": "study.demo"},
    "cost.bit_products": {
        "NetworkCost": "cost.counts",
        "StepCost": "cost.counts",
    },
    "files": {"write_whole": "files:write_atomically"},
    "hardware.hls4ml.project": dict.fromkeys(
        ("GUARD_BITS", "OUTPUT_BITS", "SCALE_BITS", "WIDEST"), "hardware.hls4ml.types"
    ),
    "hardware.recording": {
        "Array": "hardware.recording.node",
        **dict.fromkeys(("Call", "Handler", "Key"), "hardware.recording.recorder"),
    },
    "maps.precision_map": {
        "BitWidthMap": "maps.bit_width_map",
        "FORMAT_VERSION": "maps.file",
        "MOST_BYTES": "maps.file",
        "model_structure": "maps.structure",
        "structure_hash": "maps.structure",
        "write_atomically": "files",
    },
    "nn.ops": {"refuse_torchscript": "nn.refusals"},
    "numerics.backends.native": {
        "CHANNEL_EDGES": "numerics.backends.native_operands",
        **dict.fromkeys(
            ("FLAGS", "SANITIZER_FLAGS", "SOURCES", "Sanitizer"), "numerics.backends.toolchain"
        ),
        "Scope": "numerics.formats",
        "workspace_values": "numerics.memory",
    },
    "numerics.backends.triton_kernels": {"philox": "numerics.backends.triton_parts"},
    "numerics.formats": {"BlockTensor": "numerics.quantized"},
    "numerics.gemm": {
        "ACCUMULATOR_BITS": "numerics.products",
        "is_trusted": "numerics.products",
    },
    "numerics.layout": {
        "BandedWeight": "numerics.banded",
        "band_width": "numerics.banded",
    },
    "numerics.quantize": {
        "NO_EXPONENT": "numerics.formats",
        "QuantizedBlocks": "numerics.quantized",
        "dequantize": "numerics.quantized",
        "header_bits": "numerics.quantized",
        "header_occupied": "numerics.quantized",
        "header_signed": "numerics.quantized",
        "make_headers": "numerics.quantized",
        "over_scope": "numerics.backends.pytorch",
        "quantize_in_torch": "numerics.backends.pytorch",
        "scale_blocks": "numerics.quantized",
    },
    "policy.baselines.magnitude": {"RandomPolicy": "policy.baselines.random"},
    "policy.baselines.per_layer": {"AmpaPolicy": "policy.baselines.ampa"},
    "policy.baselines.scheduled": {
        "CptPolicy": "policy.baselines.cpt",
        "PfqPolicy": "policy.baselines.pfq",
    },
    "policy.schedule": {
        "ALLOCATIONS": "policy.allocation",
        "Allocation": "policy.allocation",
    },
    "policy.threshold": {
        "GREATEST_SPEEDUP": "policy.base",
        "UniformPolicy": "policy.uniform",
        "check_policy": "policy.base",
        "check_target": "policy.base",
    },
    "study.report.demo": {
        **dict.fromkeys(
            ("ACCURACY_PICTURE", "IMAGE_PICTURE", "TIME_PICTURE", "draw_accuracy", "draw_report"),
            "study.report.demo_pictures",
        ),
        **dict.fromkeys(
            ("draw_widths_over_image", "draw_widths_over_time", "picture_layer"),
            "study.report.demo_pictures",
        ),
        **dict.fromkeys(
            ("SUMMARY_FILE", "read_history", "read_summary", "read_widths"),
            "study.report.run_folder",
        ),
        **dict.fromkeys(
            ("COLOURS", "NOTE_COLOUR", "OTHER_COLOURS", "STYLE", "footnote", "headline"),
            "study.report.style",
        ),
        **dict.fromkeys(("missing_glyphs", "save_picture"), "study.report.style"),
    },
    "study.report.pictures": dict.fromkeys(("Box", "Mark"), "study.report.labels"),
    "study.report.settings": {"CONFIDENCE": "study.report.statistics"},
    "study.run": {"threads": "study.environment"},
    "trainer.analysis": {"StepClock": "trainer.clock", "Widths": "trainer.finding"},
}
"""Names that left a module which stays, and where they lie now: a module, and the new name behind a
colon where it has one.
"""

install(_PACKAGE, MOVED, DEFINITIONS)
