# SPDX-License-Identifier: Apache-2.0
"""Other packages that train with quantized operands, each as a function that converts one of our
networks by the package's own recipe.

None is needed: `pip install -c constraints.txt -e '.[peers]'` brings all but microxcaling, which is
no package: a folder with its source is named. Each is imported only where it is used, and patches
nothing that the other competitors see.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = "not installed: pip install -c constraints.txt -e '.[peers]'"

Convert = Callable[[nn.Module, Tensor], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A package's training recipe.

    Attributes:
        module: import name of the package.
        quantizes: which of X, W and E it quantizes.
        convert: (float32 network, a batch) -> network to train.
    """

    module: str
    quantizes: str
    convert: Convert


def _replace(network: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Put `make(layer)` in the place of each layer for which it is not None."""
    for name, layer in list(network.named_modules()):
        new = make(layer)
        if new is not None:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, new)
    return network


def _convolution_options(layer: nn.Conv2d) -> dict[str, Any]:
    return {"stride": layer.stride, "padding": layer.padding, "bias": layer.bias is not None}


def _with_weights(new: nn.Module, old: nn.Module) -> nn.Module:
    new.load_state_dict(old.state_dict(), strict=False)
    return new


class _Network(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]


def _brevitas(weight: str, activation: str) -> Convert:
    def convert(network: nn.Module, _: Tensor) -> nn.Module:
        import brevitas.nn as bnn
        import brevitas.quant.mx_quant_ocp as mx
        import brevitas.quant.scaled_int as bq

        source = mx if weight.startswith("MX") else bq
        options = {
            "weight_quant": getattr(source, weight),
            "input_quant": getattr(source, activation),
        }

        def make(layer: nn.Module) -> nn.Module | None:
            if type(layer) is nn.Linear:
                return _with_weights(
                    bnn.QuantLinear(
                        layer.in_features, layer.out_features, layer.bias is not None, **options
                    ),
                    layer,
                )
            if type(layer) is nn.Conv2d:
                new = bnn.QuantConv2d(
                    layer.in_channels,
                    layer.out_channels,
                    layer.kernel_size,
                    **_convolution_options(layer),
                    **options,
                )
                return _with_weights(new, layer)
            return None

        return _replace(network, make)

    return convert


def _torchao_float8(network: nn.Module, _: Tensor) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if not any(isinstance(m, nn.Linear) and m.out_features % 16 == 0 for m in network.modules()):
        raise NotImplementedError("converts Linear layers only")
    # As its README advises, layers whose sizes are no multiples of 16 stay as they are.
    return convert_to_float8_training(  # type: ignore[no-any-return]
        network,
        config=Float8LinearConfig(emulate=True),
        module_filter_fn=lambda m, _: m.in_features % 16 == 0 and m.out_features % 16 == 0,
    )


def _torchao_int8(network: nn.Module, _: Tensor) -> nn.Module:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    if not any(isinstance(m, nn.Linear) and m.out_features % 16 == 0 for m in network.modules()):
        raise NotImplementedError("converts Linear layers only")
    quantize_(network, Int8MixedPrecisionTrainingConfig(module_swap=True))
    return network


def _nncf(network: nn.Module, batch: Tensor) -> nn.Module:
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    # It hangs its quantizers into the network, where an nn.Sequential would run them as a layer.
    wrapped = _Network(network).eval()
    return nncf.quantize(wrapped, nncf.Dataset([batch]), subset_size=1).train()  # type: ignore[no-any-return]


def _quanto(network: nn.Module, batch: Tensor) -> nn.Module:
    from optimum import quanto

    quanto.quantize(network, weights=quanto.qint8, activations=quanto.qint8)
    with torch.no_grad(), quanto.Calibration():
        network(batch)
    return network


def _modelopt(network: nn.Module, batch: Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(network, mtq.INT8_DEFAULT_CFG, lambda m: m(batch))  # type: ignore[no-any-return]


def microxcaling(folder: Path) -> Peer:
    """MXINT8 with blocks of 32 in forward and backward, its Linear and Conv2d in the place of
    torch's. `folder` holds its `mx` package.
    """

    def convert(network: nn.Module, _: Tensor) -> nn.Module:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        import mx

        specs = mx.finalize_mx_specs(
            {
                "scale_bits": 8,
                "w_elem_format": "int8",
                "a_elem_format": "int8",
                "block_size": 32,
                "quantize_backprop": True,
                "round": "even",
            }
        )

        def make(layer: nn.Module) -> nn.Module | None:
            if type(layer) is nn.Linear:
                new = mx.Linear(
                    layer.in_features, layer.out_features, layer.bias is not None, mx_specs=specs
                )
                return _with_weights(new, layer)
            if type(layer) is nn.Conv2d:
                new = mx.Conv2d(
                    layer.in_channels,
                    layer.out_channels,
                    layer.kernel_size,
                    **_convolution_options(layer),
                    mx_specs=specs,
                )
                return _with_weights(new, layer)
            return None

        return _replace(network, make)

    return Peer(module="", quantizes="XWE", convert=convert)


PEERS: dict[str, Peer] = {
    "brevitas int8": Peer(
        module="brevitas",
        quantizes="XW",
        convert=_brevitas("Int8WeightPerTensorFloat", "Int8ActPerTensorFloat"),
    ),
    "brevitas MXInt8": Peer(
        module="brevitas", quantizes="XW", convert=_brevitas("MXInt8Weight", "MXInt8Act")
    ),
    "torchao float8, emulated": Peer(module="torchao", quantizes="XWE", convert=_torchao_float8),
    "torchao int8 mixed": Peer(module="torchao", quantizes="XWE", convert=_torchao_int8),
    "nncf int8": Peer(module="nncf", quantizes="XW", convert=_nncf),
    "quanto int8": Peer(module="optimum.quanto", quantizes="XW", convert=_quanto),
    "modelopt int8": Peer(module="modelopt", quantizes="XW", convert=_modelopt),
}
