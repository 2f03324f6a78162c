# SPDX-License-Identifier: Apache-2.0
"""Speed on an NVIDIA GPU: the fused quantizer beside a copy, and whole training steps beside
float32, TF32 and bf16 autocast.

Quantizer: ns an element and GB/s of the bytes that must move, for X (nearest), E (stochastic) and E
at a threshold (with drops), of a Conv (channels_last and NCHW) and of a Linear, and of the way
back; a device-to-device copy of the same operand takes turns with them. Each is first compared with
the pure-torch quantizer on the same GPU, to the last bit. The call's one wait for the device is
included.

Training: forward, loss, backward and SGD with momentum on random data. ResNet-18 for 32 x 32 images
(channels_last), MLP 3x1024, and the Linear layers of a ViT-Base on 197 tokens. Ours is
`convert(model)` in fast mode, 8 bits. Competitors take turns, one step each.

Expected, not measured so far: the quantizer at most twice the time of its bytes at the copy's
bandwidth; dynasty at most float32's time. Without a CUDA device nothing is measured, and it says
so.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lib.common import (
    Competitor,
    Quartiles,
    describe,
    interleave,
    parser,
    provenance,
    warm_up,
    write_json,
)
from torch import Tensor, nn

from dynasty_lightning import Role, convert
from dynasty_lightning.numerics.backends.pytorch import quantize_in_torch
from dynasty_lightning.numerics.backends.triton import available, dequantize_cuda, quantize_cuda
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.quantized import QuantizedBlocks
from dynasty_lightning.numerics.recipe import Recipe
from dynasty_lightning.tasks.models import build_model

BLOCK = (4, 4)
CALLS = 20  # of the quantizer in one timed step: a single call is shorter than the clock is steady
MOST_TO_BYTES, MOST_TO_FLOAT32 = 2.0, 1.0


# -- the quantizer


@dataclass(frozen=True)
class Operand:
    """What is quantized; a Linear's channels are last, a Conv's are axis 1."""

    title: str
    shape: tuple[int, ...]
    smoke_shape: tuple[int, ...]
    channel_axis: int
    channels_last: bool = False


OPERANDS = (
    Operand("Conv, channels_last", (128, 64, 32, 32), (8, 16, 8, 8), 1, channels_last=True),
    Operand("Conv, NCHW", (128, 64, 32, 32), (8, 16, 8, 8), 1),
    Operand(
        "Conv, 14 x 14, channels_last", (128, 256, 14, 14), (8, 16, 7, 7), 1, channels_last=True
    ),
    Operand("Linear, tokens", (64, 197, 768), (8, 5, 32), 2),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "X nearest, 8 bits": {"role": Role.ACTIVATION, "is_threshold": False},
    "E stochastic, 8 bits": {"role": Role.ERROR, "is_threshold": False},
    "E threshold, drops": {"role": Role.ERROR, "is_threshold": True},
}


def bytes_moved(layout: BlockLayout, *, quantizes: bool) -> int:
    """Least traffic with main memory. Quantizing reads x twice: a block's peak, and the tensor's,
    come before its mantissas.
    """
    elements, blocks = torch.Size(layout.shape).numel(), torch.Size(layout.grid_shape).numel()
    if not quantizes:
        return elements * (1 + 2) + blocks * 3
    return elements * (4 + 4 + 1 + 2) + blocks * (
        2 * 5 + 3
    )  # peak and plan written and read, then scale and header


def quantizer(a: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for operand in OPERANDS:
        shape = operand.smoke_shape if a.smoke else operand.shape
        torch.manual_seed(a.seed)
        # Sizes of blocks spread over eight binades, so that a threshold gives many widths and
        # drops.
        x = torch.randn(shape, device="cuda") * torch.exp2(
            -8 * torch.rand(*shape[:2], *[1] * (len(shape) - 2), device="cuda")
        )
        if operand.channels_last:
            x = x.to(memory_format=torch.channels_last)
        layout = BlockLayout(shape=shape, block_shape=BLOCK, channel_axis=operand.channel_axis)
        target = torch.empty_like(x)
        competitors = [Competitor(name="copy", step=repeated(lambda t=target, s=x: t.copy_(s)))]  # type: ignore[misc]
        equal: dict[str, bool] = {}
        for name, options in SETTINGS.items():
            request = torch.tensor(
                -8 if options["is_threshold"] else 8, dtype=torch.int32, device="cuda"
            )
            recipe = Recipe(request=request, **options)
            call = partial(quantize_cuda, x, layout, recipe, want_values=True)
            packed, equal[name] = compared(call, x, layout, recipe)
            competitors.append(Competitor(name=name, step=repeated(call)))
        back = partial(dequantize_cuda, packed, torch.bfloat16)
        competitors.append(Competitor(name="dequantize", step=repeated(back)))
        for competitor in competitors:
            warm_up(competitor)
        interleave(competitors, 2 if a.smoke else a.rounds, operand.title)
        results += rows(operand, shape, layout, competitors, equal)
    return results


def compared(
    call: Callable[[], QuantizedBlocks | None], x: Tensor, layout: BlockLayout, recipe: Recipe
) -> tuple[QuantizedBlocks, bool]:
    """The call's results, and whether mantissas and exponents are those of pure torch."""
    results = call()
    assert results is not None, "the operand is finite"
    expected = quantize_in_torch(x, layout, recipe)
    fields = ("codes", "relative_exponents", "headers", "largest_exponents")
    same = all(torch.equal(getattr(results, name), getattr(expected, name)) for name in fields)
    return results, same


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def step() -> None:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()

    return step


def rows(
    operand: Operand,
    shape: tuple[int, ...],
    layout: BlockLayout,
    competitors: list[Competitor],
    equal: dict[str, bool],
) -> list[dict[str, Any]]:
    """Figures of each competitor; the copy's bandwidth in the same run is what the others are held
    against.
    """
    elements = torch.Size(shape).numel()
    print(f"\n{operand.title} {shape}")
    result: list[dict[str, Any]] = []
    copy_rate = 0.0
    for competitor in competitors:
        seconds = competitor.seconds
        assert seconds is not None
        per_call = seconds.scaled(1 / CALLS)
        moved = (
            elements * 8
            if competitor.name == "copy"
            else bytes_moved(layout, quantizes=competitor.name != "dequantize")
        )
        rate, ns = moved / per_call.median, per_call.scaled(1e9 / elements)
        copy_rate = copy_rate or rate
        row = {
            "operand": operand.title,
            "shape": list(shape),
            "what": competitor.name,
            "ns_per_element": ns.to_json(),
            "gb_per_s": rate / 1e9,
            "to_its_bytes_at_copy_rate": copy_rate / rate,
            "equals_torch": equal.get(competitor.name),
        }
        result.append(row)
        verdict = {True: "equal to torch", False: "DIFFERS FROM TORCH", None: ""}[
            equal.get(competitor.name)
        ]
        goal = (
            ""
            if competitor.name == "copy"
            else f"{copy_rate / rate:5.2f} x its bytes, expected <= {MOST_TO_BYTES:.1f}"
        )
        print(f"  {competitor.name:22s} {ns} ns/element {rate / 1e9:7.0f} GB/s  {goal}  {verdict}")
    return result


# -- training


class LinearStack(nn.Module):
    """The Linear layers of ViT-Base's blocks (Dosovitskiy et al., 2021) without what lies between
    them.
    """

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


class Training:
    """One network and a batch that stays on the GPU."""

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        tf32: bool = False,
        autocast: bool = False,
    ) -> None:
        self.network, self.images, self.labels, self.tf32, self.autocast = (
            network.train(),
            images,
            labels,
            tf32,
            autocast,
        )
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        self.after: Callable[[], object] = lambda: None

    def step(self) -> None:
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = (
            "tf32" if self.tf32 else "ieee"
        )
        with torch.autocast("cuda", dtype=torch.bfloat16) if self.autocast else nullcontext():
            loss = F.cross_entropy(self.network(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.after()
        self.optimizer.step()
        torch.cuda.synchronize()


def make(name: str, a: argparse.Namespace) -> tuple[nn.Module, Tensor, int]:
    """Network, images and classes."""
    torch.manual_seed(a.seed)
    if name == "linear_stack":
        width, depth, shape = (32, 2, (4, 5, 32)) if a.smoke else (768, 12, (64, 197, 768))
        return LinearStack(width, depth, 10).cuda(), torch.randn(shape, device="cuda"), 10
    batch = 4 if a.smoke else {"resnet18": 128, "mlp1024": 256}[name]
    network, images = (
        build_model(name, in_channels=3, image_size=32, classes=10).cuda(),
        torch.randn(batch, 3, 32, 32, device="cuda"),
    )
    if name == "resnet18":
        network, images = (
            network.to(memory_format=torch.channels_last),
            images.to(memory_format=torch.channels_last),
        )
    return network, images, 10


def training(a: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for name in a.models:
        network, images, classes = make(name, a)
        labels = torch.randint(classes, (len(images),), device="cuda")
        dynasty = Training(copy.deepcopy(network), images, labels)
        report = convert(dynasty.network, mode="fast", block_shape=BLOCK, seed=a.seed)
        dynasty.after = report.stream.advance
        trainings = {
            "float32": Training(copy.deepcopy(network), images, labels),
            "tf32": Training(copy.deepcopy(network), images, labels, tf32=True),
            "bf16 autocast": Training(copy.deepcopy(network), images, labels, autocast=True),
            "dynasty fast": dynasty,
        }
        competitors = [Competitor(name=n, step=t.step) for n, t in trainings.items()]
        for competitor in competitors:
            warm_up(competitor, 5, budget_s=60.0)
        interleave(competitors, 2 if a.smoke else a.rounds, name)
        print(f"\n{name}, images {tuple(images.shape)}; {report}")
        for competitor in competitors:
            seconds = competitor.seconds
            assert seconds is not None
            ratios = {
                other.name: competitor.ratio(other)
                for other in competitors
                if other.name in ("float32", "bf16 autocast")
            }
            results.append(
                {
                    "model": name,
                    "images": list(images.shape),
                    "competitor": competitor.name,
                    "ms": seconds.scaled(1e3).to_json(),
                    "to": {n: r.to_json() for n, r in ratios.items() if r is not None},
                }
            )
            goal = f"expected <= {MOST_TO_FLOAT32:.1f}" if competitor.name == "dynasty fast" else ""
            print(
                f"  {competitor.name:14s} {seconds.scaled(1e3)} ms  to float32 "
                f"{text(ratios['float32'])} {goal}  "
                f"to bf16 autocast {text(ratios['bf16 autocast'])}"
            )
    return results


def text(ratio: Quartiles | None) -> str:
    return "-" if ratio is None else str(ratio)


def device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    import triton

    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": properties.total_memory >> 30,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
    }


def main() -> int:
    p = parser(__doc__)
    p.add_argument(
        "--models",
        nargs="+",
        choices=("resnet18", "mlp1024", "linear_stack"),
        default=["resnet18", "mlp1024", "linear_stack"],
    )
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--skip-training", action="store_true", help="the quantizer alone")
    a = p.parse_args()
    if a.rounds < 2:
        p.error(f"--rounds must be at least 2, not {a.rounds}: there are no quartiles of one")
    if not available():
        missing = (
            "triton is not installed"
            if torch.cuda.is_available()
            else "this machine has no CUDA device"
        )
        print(
            f"not measured: {missing}; no figures were made"
            + (f" and {a.results} was not written" if a.results else "")
        )
        return 0
    record = provenance(a) | {"device": device()}
    print(describe(record))
    print(
        f"{record['device']['name']}, CUDA {record['device']['cuda']}, triton "
        f"{record['device']['triton']}"
    )
    record["quantizer"] = quantizer(a)
    record["training"] = [] if a.skip_training else training(a)
    write_json(a.results, record)
    differing = [
        f"{r['operand']}: {r['what']}" for r in record["quantizer"] if r["equals_torch"] is False
    ]
    if differing:
        print(f"the quantizer differs from torch in {', '.join(differing)}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
