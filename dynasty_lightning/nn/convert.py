# SPDX-License-Identifier: Apache-2.0
"""Swaps Linear and Conv layers in place, and reports what was swapped and what was not, and why."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..numerics.backends import native
from ..numerics.formats import BlockFormat, Code, Scaling
from .layers import CONVERTED_TYPES, DynamicLayer, check_module, dynamic_layers, geometry_of
from .plan import LayerPlan, Mode, plan_template
from .skipped import own_type, reason_to_skip
from .stream import StreamState, check_seed


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert` did. `converted` and `skipped` hold (layer name, class) and (layer name,
    class, reason).

    >>> print(convert(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))))
    1 layers train in dynamic precision, 1 do not:
      1 (LSTM): recurrent layers run in fused kernels that cannot be quantized
    """

    converted: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str, str], ...]
    stream: StreamState = field(repr=False)

    def __str__(self) -> str:
        lines = [
            f"{len(self.converted)} layers train in dynamic precision, {len(self.skipped)} do not:"
        ]
        lines += [f"  {name} ({kind}): {reason}" for name, kind, reason in self.skipped]
        return "\n".join(lines) if self.skipped else lines[0].split(",")[0]


def convert(
    model: nn.Module,
    *,
    mode: Mode = "fast",
    block_shape: tuple[int, int] = (4, 4),
    width_group: tuple[int, int] | None = None,
    scaling: Scaling = "window",
    code: Code | None = None,
    scale_bits: int | None = None,
    exclude: Collection[str] = (),
    unquantized: Collection[str] = (),
    control_variate: bool = False,
    seed: int = 0,
    rank: int = 0,
) -> ConversionReport:
    """Make every nn.Linear and nn.Conv1d/2d/3d of `model` train in block-wise precision (8 bits
    until a map asks for others), in place.

    Converting again is harmless: layers that are converted keep their widths, and the report names
    them too. Layers that were converted apart, or copied since, get the model's random stream, and
    a name of their own where another has theirs. Without a Trainer call `report.stream.advance()`
    after each backward pass: random numbers then depend on the pass alone. Without it they are new
    at every training call all the same, and depend on how many a layer has had.

    Args:
        scaling: "window", or "mx" for the OCP MX specification's scales, signs and rounding, in (1,
            32) blocks of one width.
        code, scale_bits: as `BlockFormat` has them; None is "split" and 2 in square blocks, and
            "symmetric" and 0, plain blocks, elsewhere.
        exclude: layer names or patterns (`fnmatch`) that stay as they are.
        unquantized: letters of roles that the GEMMs read in float32, for studies of what one role's
            rounding does.
        control_variate: lessen dW by what is known of the noise that E's rounding leaves in it.
        seed, rank: key of the random stream.

    Raises:
        TypeError: no module.
        ValueError: no layer could be converted, an `exclude` pattern matches nothing, or the model
            is converted in another format.

    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> report = convert(model, exclude=["2"], seed=1)
    >>> report.converted, report.skipped
    ((('0', 'Linear'),), (('2', 'Linear', 'excluded by name'),))
    >>> import torch
    >>> model(torch.ones(4, 8)).sum().backward()
    >>> report.stream.advance()
    """
    check_module(model)
    check_names("exclude", exclude)
    check_names("unquantized", unquantized)
    check_seed(seed)
    block_format = BlockFormat.usual(
        block_shape=block_shape,
        width_group=width_group,
        scaling=scaling,
        code=code,
        scale_bits=scale_bits,
    )
    names = [name for name, _ in model.named_modules()]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"exclude pattern {pattern!r} matches no layer; layers: "
                f"{', '.join(n for n in names if n) or '(none)'}"
            )
    stream = next(
        (m.stream for m in model.modules() if isinstance(m, DynamicLayer)), None
    ) or StreamState(seed, rank)
    template = plan_template(
        format=block_format, mode=mode, unquantized=unquantized, control_variate=control_variate
    )
    return _convert(model, stream, template, exclude=exclude)


def check_names(option: str, names: Any) -> None:
    """Raises ValueError for one string, which would be read letter by letter, and TypeError for
    what is no collection of strings.
    """
    if isinstance(names, str):
        raise ValueError(
            f"{option} is a collection of names, not the string {names!r}: use "
            f"{option}=({names!r},)"
        )
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{option} is a collection of names, not {names!r}")


def grow(
    model: nn.Module,
    report: ConversionReport,
    template: LayerPlan,
    *,
    exclude: Collection[str],
) -> ConversionReport:
    """The report of a model that was converted and may have changed since: a layer added or
    replaced, a copy of converted ones.

    What is new is converted, or joins, as `convert` has it. The same report where nothing is.
    """
    if not _may_have_grown(model, report.stream):
        return report
    for name, module in model.named_modules():
        if isinstance(module, DynamicLayer):
            if module.stream is not report.stream:
                break
        elif type(module) in CONVERTED_TYPES and reason_to_skip(name, module, exclude) is None:
            break
    else:
        return report
    return _convert(model, report.stream, template, exclude=exclude)


def _may_have_grown(model: nn.Module, stream: StreamState) -> bool:
    """Before every step, so without names and attribute look-ups: whether a layer is not converted,
    or has another stream.
    """
    seen: set[nn.Module] = set()
    ahead: list[nn.Module | None] = [model]
    while ahead:
        module = ahead.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if type(module) in CONVERTED_TYPES or vars(module).get("stream", stream) is not stream:
            return True
        ahead += module._modules.values()
    return False


def _convert(
    model: nn.Module,
    stream: StreamState,
    template: LayerPlan,
    *,
    exclude: Collection[str],
) -> ConversionReport:
    """Layers get the template's plan, with a geometry and an index of their own."""
    _check_alike(model, template)
    converted: list[tuple[str, str]] = []
    skipped: list[tuple[str, str, str]] = []
    inside_attention: set[str] = set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, DynamicLayer):
            converted.append((name, kind))
            continue
        if any(name.startswith(prefix + ".") for prefix in inside_attention):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.add(name)
        if isinstance(module, nn.TransformerEncoder):
            # Its nested-tensor path feeds layers what only the fused kernel takes.
            module.enable_nested_tensor = module.use_nested_tensor = False
        reason = reason_to_skip(name, module, exclude)
        if reason:
            skipped.append((name, kind, reason))
        elif own_type(module) in CONVERTED_TYPES:
            plan = replace(template, geometry=geometry_of(module), layer_index=stream.add_layer())
            _swap(module, name, plan, stream)
            converted.append((name, kind))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not module._forward_hooks:
            # In eval its fused kernel would bypass the converted Linear layers; it stands back
            # where a hook is registered.
            module.register_forward_hook(_no_op)
    if not converted:
        reasons = (
            "; ".join(f"{n} ({k}): {r}" for n, k, r in skipped) or "it has no Linear or Conv layer"
        )
        raise ValueError(f"nothing to convert in {type(model).__name__}: {reasons}")
    _join(model, stream)
    native.available()  # compiled here, not in the middle of a first step that somebody may time
    return ConversionReport(converted=tuple(converted), skipped=tuple(skipped), stream=stream)


def _check_alike(model: nn.Module, template: LayerPlan) -> None:
    """Raises ValueError where a layer is converted in another way."""

    def shown(plan: LayerPlan) -> str:
        return (
            f"{plan.format}, mode {plan.mode!r}, unquantized {plan.unquantized}, "
            f"control_variate {plan.control_variate}"
        )

    for layer in dynamic_layers(model).values():
        own = replace(layer.plan, geometry=template.geometry, layer_index=0, executor="")
        if own != template:
            raise ValueError(
                f"{layer.layer_name} is already converted with {shown(own)}; asked for "
                f"{shown(template)}: convert a fresh copy of the model"
            )


def _join(model: nn.Module, stream: StreamState) -> None:
    """One stream, and an index and a name of its own, for each converted layer."""
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, DynamicLayer)]
    # A name that several have stays with the one that stands there, or with the model's own.
    layers.sort(key=lambda item: (item[0] != item[1].layer_name, item[1].stream is not stream))
    names: dict[str, DynamicLayer] = {}
    for path, layer in layers:
        name = layer.layer_name if layer.layer_name not in names else path
        while name in names:
            name += "_"
        names[name] = layer
    taken: set[int] = set()
    for name, layer in sorted(
        names.items(), key=lambda item: (item[1].stream is not stream, item[1].layer_index)
    ):
        index = layer.layer_index
        if index in taken or index >= len(stream.calls):
            index = stream.add_layer()
        taken.add(index)
        if (name, index) != (layer.layer_name, layer.layer_index) or layer.stream is not stream:
            layer.join(name=name, plan=replace(layer.plan, layer_index=index), stream=stream)


def _no_op(*_: Any) -> None:
    return None


def _swap(module: nn.Module, name: str, plan: LayerPlan, stream: StreamState) -> None:
    kind, converted = type(module), CONVERTED_TYPES[own_type(module)]
    if issubclass(kind, FSDPModule):
        own = {name: value for name, value in vars(kind).items() if name == "__deepcopy__"}
        converted = type(f"FSDP{converted.__name__}", (FSDPModule, converted), own)
    module.__class__ = converted
    assert isinstance(module, DynamicLayer)
    module.adopt(name=name, plan=plan, stream=stream)


__all__ = ["ConversionReport", "convert"]
