# SPDX-License-Identifier: Apache-2.0
"""The core as a layer of hls4ml, through its Extension API: PyTorch module, converter, model node,
templates, C++ source.

Importing this module imports hls4ml; ImportError names the extra that brings it.

    register(config)  # once, before hls4ml converts: the layer, and the source of that core
    runner = fpga.network.runner.Runner(program, device)
    network.head = DynamicGemm(runner.layers["head"], geometry=None, config=config)
    model = hls4ml.converters.convert_from_pytorch_model(network, backend="Vitis", ...)

`network.plain_network` makes such layers from the steps of a network program.
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fpga import GemmConfig, GemmJob, Geometry, Operand, open_device
from fpga.build.single_header import LAYER_HEADER, single_header
from fpga.files import write_atomically
from fpga.job import SUM_BITS
from fpga.libraries import library_folder, make_folder
from fpga.network.program import GemmLayer
from fpga.packing import pack
from fpga.quantizer import WINDOW
from fpga.walk import Walk, job_words

from ...numerics.formats import raised_widths, slack_quarters
from . import MISSING

try:
    from hls4ml.backends import get_backend
    from hls4ml.backends.template import FunctionCallTemplate, LayerConfigTemplate
    from hls4ml.converters import register_pytorch_layer_handler
    from hls4ml.model.attributes import Attribute
    from hls4ml.model.layers import Layer, register_layer
    from hls4ml.model.types import FixedPrecisionType, IntegerPrecisionType
    from hls4ml.utils.torch import HLS4MLModule
except ImportError as error:
    raise ImportError(MISSING.format(error=error)) from None

BACKENDS: Final = ("Vivado", "Vitis", "VivadoAccelerator")
"""Those whose templates are Vivado's C++."""
GREATEST_INPUT_BITS: Final = 24
_NAME: Final = "DynamicGemm"
_GREATEST_ACTIVATION: Final = 1 << (WINDOW + 8)
"""No activation's integer is larger, in LSBs of its row's base."""


class DynamicGemm(HLS4MLModule):  # type: ignore[misc]
    """A convolution or linear layer in dynamic precision, for a network that hls4ml converts.

    Args:
        layer: of kind "conv" or "linear", as a program's `Runner` has it.
        geometry: of a convolution; None for a linear layer.
        config: the core, which `register` must have been given.

    Input is [N, in, *positions] (or [N, in] for a linear layer), output [N, out, *positions];
    `forward` computes what the core does.

    Raises:
        ValueError: a geometry where none belongs or none where one does, sums that the accumulator
            of the core might not hold in one pass.

    >>> import torch, dynasty_lightning
    >>> from dynasty_lightning.hardware.program import export_program
    >>> from fpga.network.runner import Runner
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = dynasty_lightning.convert(network, mode="exact")
    >>> program = export_program(network, (8,))
    >>> runner = Runner(program, open_device("reference"))
    >>> layer = DynamicGemm(runner.layers["0"], geometry=None, config=program.config)
    >>> x = torch.randn(2, 8)
    >>> torch.equal(layer(x), network.eval()(x))
    True
    """

    def __init__(self, layer: GemmLayer, *, geometry: Geometry | None, config: GemmConfig) -> None:
        super().__init__()
        if (layer.kind == "linear") != (geometry is None):
            raise ValueError(
                f"a {layer.kind} layer {'needs a' if geometry is None else 'takes no'} geometry"
            )
        weight = layer.weight
        self.layer, self.config = layer, config
        self.geometry = geometry or Geometry()
        self.bias_values = (
            np.zeros(weight.shape[0], np.float32)
            if layer.bias is None
            else layer.bias.astype(np.float32)
        )
        bound = (
            self.geometry.tap_count
            * weight.shape[2]
            * _GREATEST_ACTIVATION
            * int(np.abs(weight.integers()).max())
        )
        if bound >= 1 << SUM_BITS:
            raise ValueError(
                f"sums of this layer may reach {bound:.3g} LSBs, 2**{SUM_BITS} or more: it "
                f"cannot be a layer of hls4ml"
            )

    def forward(self, x: Tensor) -> Tensor:
        """On the NumPy reference of the core."""
        operand = self.layer.operand(x.detach().numpy(), self.config)
        with open_device("reference", self.config) as device:
            result = device.run(
                GemmJob(a=operand, b=self.layer.weight, geometry=self.geometry), timeout_s=600
            )
        y = torch.from_numpy(result.values + self.bias_values).movedim(-1, 1)
        return y.reshape(len(x), -1, *self.spatial(x.ndim - 2))

    def spatial(self, axes: int) -> list[int]:
        """Positions of the result along the input's `axes` spatial axes."""
        return list(self.geometry.output[len(self.geometry.output) - axes :]) if axes else []

    def job(self) -> np.ndarray[Any, Any]:
        """Words of the job for one sample; the words of A in memory and the rows' exponents follow
        at run time.
        """
        shape = (1, self.geometry.input_size, self.layer.weight.shape[2])
        grid = (1, shape[1], -(-shape[2] // self.config.block_edge))
        empty = Operand(
            mantissas=np.zeros(shape, np.int16),
            scale_exponents=np.zeros(grid, np.int32),
            bits=np.zeros(grid, np.uint8),
            signed=np.zeros(grid, np.bool_),
            block_edge=self.config.block_edge,
            row_exponents=True,
        )
        walk = Walk(GemmJob(a=empty, b=self.layer.weight, geometry=self.geometry), self.config)
        words_b = len(pack(self.layer.weight, self.config).words)
        words_c = self.geometry.output_size * self.layer.weight.shape[0]
        words = job_words(
            walk,
            raw=False,
            part=walk.whole,
            tile_begin=0,
            tile_count=walk.output_tiles,
            words_a=0,
            words_b=words_b,
            words_c=words_c,
        )
        return words[: len(words) - self.config.block_edge]


class HlsDynamicGemm(Layer):  # type: ignore[misc]
    """`DynamicGemm` as a node of hls4ml's model."""

    _expected_attributes = [
        Attribute(n, value_type=int)
        for n in ("positions", "channels", "out_positions", "out_channels", "weight_words")
    ]

    def initialize(self) -> None:
        word = IntegerPrecisionType(width=32, signed=False)
        for name, letter, precision in (
            ("job", "j", word),
            ("packed", "w", word),
            ("request", "r", IntegerPrecisionType(width=16, signed=True)),
            ("bias_bits", "b", word),
        ):
            self.add_weights_variable(
                name=name,
                var_name=letter + "{index}",
                data=self.get_attr(f"{name}_data"),
                precision=precision,
            )
        self.add_output_variable(self.get_attr("out_shape"))


class _Config(LayerConfigTemplate):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(HlsDynamicGemm)
        self.template = """struct config{index} : nnet::dynamic_gemm_config {{
    static constexpr int positions = {positions};
    static constexpr int channels = {channels};
    static constexpr int out_positions = {out_positions};
    static constexpr int out_channels = {out_channels};
    static constexpr int weight_words = {weight_words};
    static constexpr int weight_exponent = {weight_exponent};
    static constexpr int request_positions = {request_positions};
    static constexpr int request_blocks = {request_blocks};
    static constexpr bool is_threshold = {is_threshold};
    static constexpr int least_bits = {least_bits};
    static constexpr int most_bits = {most_bits};
    static constexpr uint64_t raised_widths = {raised_widths};
    static constexpr bool is_split = {is_split};
    static constexpr int scale_bits = {scale_bits};
    static constexpr int signed_slack = {signed_slack};
    static constexpr int unsigned_slack = {unsigned_slack};
    static constexpr int group_blocks = {group_blocks};
}};\n"""

    def format(self, node: Any) -> str:
        params = self._default_config_params(node)
        for name in ("is_threshold", "is_split"):
            params[name] = str(bool(node.get_attr(name))).lower()
        return str(self.template.format(**params))


class _Call(FunctionCallTemplate):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(HlsDynamicGemm, include_header=[f"nnet_utils/{LAYER_HEADER.name}"])

    def format(self, node: Any) -> str:
        given = node.get_input_variable().type.precision
        if not isinstance(given, FixedPrecisionType) or given.width > GREATEST_INPUT_BITS:
            raise ValueError(
                f"layer {node.name!r} on the core takes fixed-point activations of up to "
                f"{GREATEST_INPUT_BITS} bits, not {given}: "
                "set the Precision of the result of the layer before it"
            )
        params = self._default_function_params(node)
        weights = {n: node.get_weights(n).name for n in ("job", "packed", "request", "bias_bits")}
        return "nnet::dynamic_gemm<{input_t}, {output_t}, {config}>({input}, {output}, ".format(
            **params
        ) + "{job}, {packed}, {request}, {bias_bits});".format(**weights)


def _parse(
    operation: str,
    layer_name: str,
    input_names: list[str],
    input_shapes: list[Any],
    node: Any,
    module: DynamicGemm,
    reader: Any,
    config: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """hls4ml's handler: attributes of the node, and its output shape."""
    if module.config != _registered.get(_NAME):
        raise ValueError(
            f"layer {layer_name!r} is packed for the core {module.config}, hls4ml was given the "
            f"source of {_registered.get(_NAME)}: "
            "call register(config) with the one configuration of all layers"
        )
    packed = pack(module.layer.weight, module.config)
    values, edge = module.layer.request.values, module.config.block_edge
    if values.shape[0] != 1 or values.min() < -(1 << 15) or values.max() >= 1 << 15:
        raise ValueError(
            f"layer {layer_name!r}: the widths must be those of one row and fit 16 bits"
        )
    out, _, channels = module.layer.weight.shape
    slack = slack_quarters(module.layer.request.scale_bits, edge)
    spatial = module.spatial(len(input_shapes[0]) - 2)
    layer = {
        "name": layer_name,
        "class_name": _NAME,
        "inputs": input_names,
        "out_shape": [out, *spatial],
        "positions": module.geometry.input_size,
        "channels": channels,
        "out_positions": module.geometry.output_size,
        "out_channels": out,
        "weight_words": len(packed.words),
        "weight_exponent": int(packed.bases),
        "request_positions": values.shape[1],
        "request_blocks": values.shape[2],
        "is_threshold": int(module.layer.request.is_threshold),
        "least_bits": module.layer.request.least_bits,
        "most_bits": module.layer.request.most_bits,
        "raised_widths": f"{raised_widths(module.layer.request.offered_bits):#x}ull",
        "is_split": int(module.layer.request.code == "split"),
        "scale_bits": module.layer.request.scale_bits,
        **dict(zip(("signed_slack", "unsigned_slack"), slack, strict=True)),
        "group_blocks": module.config.width_group[1] // edge if module.config.width_group else 0,
        # numbers that float64 holds, since hls4ml prints weights as such
        "job_data": module.job().astype(np.float64),
        "packed_data": packed.words.view("<u4").astype(np.float64),
        "request_data": values.reshape(-1).astype(np.float64),
        "bias_bits_data": module.bias_values.view(np.uint32).astype(np.float64),
    }
    return layer, [input_shapes[0][0], out, *spatial]


_registered: dict[str, GemmConfig] = {}


def register(config: GemmConfig) -> None:
    """Make hls4ml know `DynamicGemm`, with the core of `config`; projects written from now on get
    that core's source.

    A project has one core: hls4ml copies sources by name.

    >>> register(GemmConfig())
    >>> sorted(Path(source).name for source in get_backend("Vitis").get_custom_source())
    ['nnet_dpgemm.h', 'nnet_dynamic_gemm.h']
    """
    if not _registered:
        register_pytorch_layer_handler(_NAME, _parse)
        register_layer(_NAME, HlsDynamicGemm)
        for name in BACKENDS:
            for template in (_Config, _Call):
                get_backend(name).register_template(template)
    _registered[_NAME] = config
    source = _write_source(config)
    for name in BACKENDS:
        get_backend(name).register_source(source)
        get_backend(name).register_source(LAYER_HEADER.resolve())


def _write_source(config: GemmConfig) -> Path:
    folder = library_folder(f"hls4ml-{config.digest[:16]}")
    make_folder(folder)  # a compiler will be given what is in it
    target = folder.resolve() / "nnet_dpgemm.h"
    write_atomically(target, single_header(config), follow=False, mode=0o644)
    return target


__all__ = ["BACKENDS", "DynamicGemm", "register"]
