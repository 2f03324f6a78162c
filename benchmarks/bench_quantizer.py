# SPDX-License-Identifier: Apache-2.0
"""The CPU quantizer, its way back and the widening of results, in ns an element beside memcpy of
the same float32 tensor in the same run.

Operands of ResNet-20, an MLP and a ViT, in both memory orders, 4 x 4 blocks: X (nearest, unsigned
where it can be), W (nearest), E at fixed widths (stochastic) and E from thresholds with drops; each
call writes codes, headers, exponents and bfloat16 values, as a layer's does, Python's part of the
call included. `dequantize` is what backward reads saved operands with, `widen` brings a bf16 result
to float32.
Calls take turns, so operands come from where the others left them: from beyond the second cache, as
in training. With `--repeat` each call is made several times in a row, memcpy's too, so that small
operands stay in the cache: the arithmetic's share.

Expected: nearest at most 2, stochastic at most 3 times memcpy. `--torch` times the pure-torch
quantizer too.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lib.common import (
    Competitor,
    describe,
    interleave,
    parser,
    provenance,
    set_allocator,
    use_threads,
    warm_up,
    write_json,
)
from torch import Tensor

from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.backends.pytorch import quantize_in_torch
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.memory import empty_channels_innermost
from dynasty_lightning.numerics.recipe import Recipe
from dynasty_lightning.numerics.roles import Role

OPERANDS: dict[str, tuple[tuple[int, ...], int, bool]] = {  # shape, channel axis, channels_last
    "conv 128x16x32x32": ((128, 16, 32, 32), 1, False),
    "conv 128x16x32x32, channels_last": ((128, 16, 32, 32), 1, True),
    "conv 128x64x8x8": ((128, 64, 8, 8), 1, False),
    "conv 128x64x8x8, channels_last": ((128, 64, 8, 8), 1, True),
    "tokens 64x64x768": ((64, 64, 768), 2, False),
    "linear 1024x3072": ((1024, 3072), 1, False),
}
KINDS: dict[str, Recipe] = {
    "X nearest": Recipe(role=Role.ACTIVATION, request=torch.tensor(8)),
    "W nearest": Recipe(role=Role.WEIGHT, request=torch.tensor(8)),
    "E stochastic": Recipe(role=Role.ERROR, request=torch.tensor(8)),
    "E threshold, drops": Recipe(role=Role.ERROR, request=torch.tensor(-2), is_threshold=True),
}
EXPECTED = {"X nearest": 2.0, "W nearest": 2.0, "E stochastic": 3.0, "E threshold, drops": 3.0}


def competitors(name: str, a: argparse.Namespace) -> list[Competitor]:
    """What is timed on an operand; memcpy first."""
    shape, axis, channels_last = OPERANDS[name]
    shape = (shape[0] // 8, *shape[1:]) if a.smoke else shape
    x = torch.randn(shape) * torch.randn(shape).exp2()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    target, layout = (
        torch.empty_like(x),
        BlockLayout(shape=shape, block_shape=(4, 4), channel_axis=axis),
    )
    values = empty_channels_innermost(layout, torch.bfloat16)
    codes = empty_channels_innermost(layout, torch.uint8)
    made = [Competitor(name="memcpy", step=repeated(lambda: target.copy_(x), a.repeat))]

    def call(recipe: Recipe) -> Callable[[], Any]:
        return lambda: native.quantize(x, layout, recipe, values=values, codes=codes)

    made += [
        Competitor(name=kind, step=repeated(call(recipe), a.repeat))
        for kind, recipe in KINDS.items()
    ]
    saved = call(KINDS["X nearest"])()
    kept, back = replace(saved, codes=saved.codes.clone()), values.clone()
    made.append(
        Competitor(
            name="dequantize", step=repeated(lambda: native.dequantize(kept, values), a.repeat)
        )
    )
    made.append(
        Competitor(
            name="widen",
            step=repeated(lambda: native.widen(back, axis, channels_last=channels_last), a.repeat),
        )
    )
    if a.torch:
        made += [
            Competitor(
                name=f"{kind}, pure torch", step=repeated(in_torch(x, layout, recipe), a.repeat)
            )
            for kind, recipe in KINDS.items()
        ]
    return made


def repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def step() -> None:
        for _ in range(times):
            call()

    return step


def in_torch(x: Tensor, layout: BlockLayout, recipe: Recipe) -> Callable[[], Any]:
    return lambda: quantize_in_torch(x, layout, recipe)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--rounds", type=int, default=41)
    arguments.add_argument(
        "--repeat",
        type=int,
        default=1,
        help="calls in a row, so that operands that fit stay in the cache",
    )
    arguments.add_argument("--torch", action="store_true", help="the pure-torch quantizer too")
    a = arguments.parse_args()
    set_allocator(a.default_malloc)
    warnings.filterwarnings("ignore")
    use_threads(a.threads)
    torch.manual_seed(a.seed)
    if not native.available():
        print("not measured: the kernels could not be built here")
        return 1
    record = provenance(a) | {"threads": a.threads, "repeat": a.repeat, "rows": []}
    print(describe(record))
    print(
        f"expected: at most {EXPECTED['W nearest']} times memcpy for nearest, "
        f"{EXPECTED['E stochastic']} for stochastic rounding"
    )
    for name in OPERANDS:
        timed = competitors(name, a)
        elements = 1
        for n in OPERANDS[name][0]:
            elements *= n
        elements = elements // (8 if a.smoke else 1) * a.repeat
        for competitor in timed:
            warm_up(competitor)
        interleave(timed, 3 if a.smoke else a.rounds, name)
        print(
            f"\n{name}: {elements // a.repeat} elements\n  {'':<26}{'ns an element':>14}   "
            f"times memcpy (quartiles)"
        )
        for competitor in timed:
            seconds, ratio = competitor.seconds, competitor.ratio(timed[0])
            assert seconds is not None
            nanoseconds = seconds.scaled(1e9 / elements)
            goal = EXPECTED.get(competitor.name)
            note = (
                ""
                if goal is None or ratio is None
                else "  as expected"
                if ratio.median <= goal
                else f"  above {goal}"
            )
            print(f"  {competitor.name:<26}{nanoseconds.median:>14.3f}   {ratio}{note}")
            record["rows"].append(
                {
                    "operand": name,
                    "kind": competitor.name,
                    "elements": elements,
                    "ns_an_element": nanoseconds.to_json(),
                    "times_memcpy": None if ratio is None else ratio.to_json(),
                    "expected": goal,
                }
            )
    write_json(a.results, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
