# SPDX-License-Identifier: Apache-2.0
"""Time of a whole training step in dynamic precision, beside float32, bf16 autocast and other
packages.

A step is forward, loss, backward and SGD with momentum: ResNet-20 (batch 128), MLP 3x1024 (256),
ViT d192 depth 6 (64) and ResNet-18 (64) on random CIFAR-shaped images. Ours runs with everything
on: 4x4 blocks, unsigned X, window, stochastic E with drop, one-byte saving, non-finite check, the
callback's hooks, and the map that the dynasty policy makes at target 5.0 (it settles before the
timing; the figures that it reached are printed). An analysis every 50 steps is too rare to be met
by a median: its two steps are timed beside steps without in the same rounds, and (both - 2 plain) /
50 is added to dynasty, stated in a line of its own. Competitors take turns, one step each; ratios
are within rounds. Slow ones (over 2.5 times float32) take part in every fifth round.

Expected, one thread: dynasty fast at most 0.85 (ResNet-20), 0.60 (MLP), 0.80 (ViT) of float32 in
the same memory format, at most 1.4 times bf16 autocast, and analysis at most 1 % of a step.
"""

import argparse
import copy
import importlib.util
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lib.common import (
    Competitor,
    Quartiles,
    describe,
    interleave,
    parser,
    progress,
    provenance,
    random_images,
    set_allocator,
    use_threads,
    warm_up,
    write_json,
)
from lib.peers import INSTALL, PEERS, Peer, microxcaling
from lib.training import TARGET, Batches, DynamicTraining, Training

from dynasty_lightning.tasks.models import build_model

CLASSES = 10
SLOW, SLOW_EVERY, ANALYSED_EVERY = 2.5, 5, 4
MOST_TO_AUTOCAST, MOST_ANALYSIS = 1.4, 0.01


@dataclass(frozen=True)
class Case:
    """A model and its batch; `goal` is the expected ratio to float32."""

    title: str
    batch: int
    smoke_batch: int
    goal: float | None
    convolutional: bool


CASES = {
    "resnet20": Case("ResNet-20", 128, 8, 0.85, True),
    "mlp1024": Case("MLP 3x1024", 256, 16, 0.60, False),
    "vit": Case("ViT d192 depth 6", 64, 4, 0.80, False),
    "resnet18": Case("ResNet-18", 64, 4, None, True),
}
DYNASTY = "dynasty fast"
NAMES = (
    "float32",
    "bf16 autocast",
    DYNASTY,
    "dynasty fast, other layers bf16",
    "dynasty exact",
    "float32 compiled",
    "bf16 autocast compiled",
    "dynasty fast compiled",
    *PEERS,
    "microxcaling MXINT8",
)

NEEDED = NAMES[:5]
"""Those whose failure fails the run. A foreign package or a compiler may be missing or broken."""


@dataclass
class Row:
    """What is known of one competitor."""

    name: str
    quantizes: str = "-"
    competitor: Competitor | None = None
    error: str = ""
    extra_s: Quartiles | None = None
    """Amortised seconds of analysis that each step pays."""


@dataclass
class Group:
    """All competitors for one case, memory format and number of threads."""

    case: Case
    name: str
    batch: int
    threads: int
    channels_last: bool
    rows: list[Row] = field(default_factory=list)
    dynasty: DynamicTraining | None = None

    @property
    def label(self) -> str:
        layout = (
            f", {'channels_last' if self.channels_last else 'NCHW'}"
            if self.case.convolutional
            else ""
        )
        return (
            f"{self.case.title}, batch {self.batch}{layout}, {self.threads} "
            f"thread{'s' if self.threads > 1 else ''}"
        )

    def row(self, name: str) -> Row | None:
        return next((r for r in self.rows if r.name == name and r.competitor is not None), None)


def make_group(a: argparse.Namespace, name: str, threads: int, channels_last: bool) -> Group:
    """Build, warm up and settle everything that is asked for. What fails becomes a row with its
    error.
    """
    case = CASES[name]
    group = Group(case, name, case.smoke_batch if a.smoke else case.batch, threads, channels_last)
    torch.manual_seed(a.seed)
    batches: Batches = random_images(4, group.batch)
    base = build_model(name, in_channels=3, image_size=32, classes=CLASSES)
    if channels_last:
        base = base.to(memory_format=torch.channels_last)
        batches = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]

    def dynamic(settle: bool = False, **options: Any) -> DynamicTraining:
        training = DynamicTraining(copy.deepcopy(base), batches, seed=a.seed, **options)
        if group.dynasty is not None:
            training.follow(group.dynasty)
        else:
            training.settle(9 if a.smoke else 40)
        return training

    def dynasty() -> Training:
        group.dynasty = dynamic()
        return group.dynasty

    makers: dict[str, tuple[str, Callable[[], Training]]] = {
        "float32": ("-", lambda: Training(copy.deepcopy(base), batches)),
        "bf16 autocast": ("-", lambda: Training(copy.deepcopy(base), batches, autocast=True)),
        DYNASTY: ("XWE", dynasty),
        "dynasty fast, other layers bf16": ("XWE", lambda: dynamic(other_layers="bf16")),
        "dynasty exact": ("XWE", lambda: dynamic(mode="exact")),
        "float32 compiled": ("-", lambda: Training(copy.deepcopy(base), batches, compiled=True)),
        "bf16 autocast compiled": (
            "-",
            lambda: Training(copy.deepcopy(base), batches, autocast=True, compiled=True),
        ),
        "dynasty fast compiled": ("XWE", lambda: dynamic(compiled=True)),
    }
    for peer_name, peer in peers(a).items():
        makers[peer_name] = (
            peer.quantizes,
            lambda p=peer: Training(p.convert(copy.deepcopy(base), batches[0][0]), batches),
        )  # type: ignore[misc]
    reference_s = 0.0
    for competitor_name, (quantizes, make) in makers.items():
        if not wanted(a, competitor_name):
            continue
        row = Row(competitor_name, quantizes)
        group.rows.append(row)
        missing = PEERS[competitor_name].module if competitor_name in PEERS else ""
        if missing and not installed(missing):
            row.error = INSTALL
            continue
        progress(f"{group.label}: {competitor_name} warms up")
        torch.manual_seed(a.seed)
        try:
            with quiet():
                training = make()
                use_threads(threads)  # a package may have set its own
                # The schedule must not let an analysis into a plain step.
                plain = (
                    training.plain_step if isinstance(training, DynamicTraining) else training.step
                )
                competitor = Competitor(name=competitor_name, step=plain)
                if (
                    isinstance(training, DynamicTraining)
                    and training.forward is not training.network
                ):
                    # Steps that are observed have code of their own, which takes three of them to
                    # compile.
                    for _ in range(3):
                        training.analysis()
                last = warm_up(
                    competitor, 1 if a.smoke else 3, least=3 if "compiled" in competitor_name else 1
                )
        except Exception as error:  # any failure of a foreign package is its row, not the end
            lines = str(error).strip().splitlines() or [""]
            row.error = f"{type(error).__name__}: {lines[0]}"
            progress(f"{competitor_name}: {row.error}")
            continue
        reference_s = reference_s or last
        if last > SLOW * reference_s and competitor_name not in ("float32", DYNASTY):
            competitor.every = 1 if a.smoke else SLOW_EVERY
        row.competitor = competitor
    return group


def measure(a: argparse.Namespace, group: Group) -> None:
    """Time the rounds; then what analysis adds to each step of dynasty."""
    competitors = [r.competitor for r in group.rows if r.competitor is not None]
    analysed: Competitor | None = None
    if group.dynasty is not None:
        analysed = Competitor(
            name="analysed", step=group.dynasty.analysis, every=1 if a.smoke else ANALYSED_EVERY
        )
        competitors.append(analysed)
    interleave(competitors, 2 if a.smoke else a.rounds, group.label)
    dynasty = group.row(DYNASTY)
    if dynasty is None or dynasty.competitor is None or analysed is None or group.dynasty is None:
        return
    plain, interval = dynasty.competitor.times, group.dynasty.callback.schedule.interval
    extra = Quartiles.of([(t - 2 * plain[r]) / interval for r, t in analysed.times.items()])
    # The same callback runs around all of dynasty; it was timed on the first.
    for row in group.rows:
        if row.name.startswith("dynasty fast"):
            row.extra_s = extra


def rows_of(group: Group) -> list[dict[str, Any]]:
    """Figures of each competitor, analysis added to dynasty."""
    float32, autocast = group.row("float32"), group.row("bf16 autocast")
    result = []
    for row in group.rows:
        record: dict[str, Any] = {
            "competitor": row.name,
            "quantizes": row.quantizes,
            "error": row.error or None,
        }
        if row.competitor is not None and row.competitor.seconds is not None:
            seconds = row.competitor.seconds
            record["ms"] = seconds.scaled(1e3).to_json()
            record["analysis_ms_per_step"] = (
                row.extra_s.scaled(1e3).to_json() if row.extra_s else None
            )
            for key, reference in (("to_float32", float32), ("to_bf16_autocast", autocast)):
                if (
                    reference is None
                    or reference.competitor is None
                    or reference.competitor.seconds is None
                ):
                    continue
                ratio = row.competitor.ratio(reference.competitor)
                if ratio is not None:
                    added = (
                        row.extra_s.median / reference.competitor.seconds.median
                        if row.extra_s
                        else 0.0
                    )
                    record[key] = Quartiles(
                        ratio.low + added, ratio.median + added, ratio.high + added, ratio.n
                    ).to_json()
        result.append(record)
    return result


def show(group: Group, rows: list[dict[str, Any]]) -> None:
    print(f"\n{group.label}")
    print(
        f"  {'':26s} X/W/E  {'ms':>9s}   {'to float32':24s}expected  "
        f"{'to bf16 autocast':24s}expected   n"
    )
    for r in rows:
        if r["error"]:
            print(f"  {r['competitor']:26s} {r['quantizes']:5s}  {r['error'][:100]}")
            continue
        dynasty = r["competitor"] == DYNASTY
        goal = (
            f"<= {group.case.goal:.2f}"
            if dynasty and group.case.goal and group.threads == 1
            else ""
        )
        limit = f"<= {MOST_TO_AUTOCAST:.2f}" if dynasty and group.threads == 1 else ""
        print(
            f"  {r['competitor']:26s} {r['quantizes']:5s}  {r['ms']['median']:9.2f}   "
            f"{text(r.get('to_float32')):24s}{goal:8s}  "
            f"{text(r.get('to_bf16_autocast')):24s}{limit:8s} {r['ms']['n']:3d}"
        )
    for name in ("dynasty fast compiled", "bf16 autocast compiled"):
        one, compiled = group.row(name), group.row("float32 compiled")
        if one and compiled and one.competitor and compiled.competitor:
            print(f"  {name} to float32 compiled: {one.competitor.ratio(compiled.competitor)}")
    dynasty_row = group.row(DYNASTY)
    if (
        group.dynasty is None
        or dynasty_row is None
        or dynasty_row.extra_s is None
        or dynasty_row.competitor is None
    ):
        return
    figures, bits = group.dynasty.figures(), group.dynasty.figures()["mean_bits"]
    share = share_of_analysis(dynasty_row)
    assert share is not None
    print(
        f"  {DYNASTY}: map at {figures['speedup_charged']:.2f}x charged (target {TARGET:.1f}), "
        f"bits X/W/E "
        f"{bits['X']:.1f}/{bits['W']:.1f}/{bits['E']:.1f}; analysis every "
        f"{group.dynasty.callback.schedule.interval} steps adds "
        f"{100 * share.median:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}] of a plain "
        f"step, "
        f"expected <= {100 * MOST_ANALYSIS:.0f} %"
    )


def share_of_analysis(dynasty: Row) -> Quartiles | None:
    if dynasty.extra_s is None or dynasty.competitor is None or dynasty.competitor.seconds is None:
        return None
    return dynasty.extra_s.scaled(1 / dynasty.competitor.seconds.median)


def text(ratio: dict[str, float] | None) -> str:
    return (
        "-" if ratio is None else f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    )


def wanted(a: argparse.Namespace, name: str) -> bool:
    """float32 always runs: ratios are to it."""
    if name == "float32":
        return True
    if "compiled" in name and not (a.compile if a.compile is not None else not a.smoke):
        return False
    if a.only and not any(part in name for part in a.only):
        return False
    return not any(part in name for part in a.skip)


def peers(a: argparse.Namespace) -> dict[str, Peer]:
    """In a smoke run only those that are installed, and microxcaling where it is named."""
    found = {n: p for n, p in PEERS.items() if not a.smoke or installed(p.module)}
    if a.microxcaling:
        found["microxcaling MXINT8"] = microxcaling(a.microxcaling)
    return found


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Without the reports that packages print."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument(
        "--threads", nargs="+", type=int, default=[1], help="one run for each number (default: 1)"
    )
    p.add_argument("--rounds", type=int, default=20)
    p.add_argument(
        "--channels-last",
        action="store_true",
        help="run networks of convolutions in channels_last, too",
    )
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile, too (default: unless --smoke)",
    )
    p.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        default=[],
        help="competitors whose name has one of these parts; float32 always runs",
    )
    p.add_argument(
        "--skip",
        nargs="+",
        metavar="PART",
        default=[],
        help=f"competitors to leave out; all: {', '.join(NAMES)}",
    )
    p.add_argument(
        "--microxcaling", type=Path, metavar="DIR", help="a checkout of microsoft/microxcaling"
    )
    a = p.parse_args()
    if a.rounds < 2:
        p.error(f"--rounds must be at least 2, not {a.rounds}: there are no quartiles of one")
    if a.microxcaling and not (a.microxcaling / "mx").is_dir():
        p.error(f"--microxcaling {a.microxcaling}: no folder mx in it")
    for part in (*a.only, *a.skip):
        if not any(part in name for name in NAMES):
            p.error(f"no competitor has {part!r} in its name: {', '.join(NAMES)}")
    return a


def main() -> int:
    a = arguments()
    set_allocator(a.default_malloc)
    warnings.filterwarnings("ignore")
    record = provenance(a)
    print(describe(record))
    print(
        "the ratios of dynasty fast include its share of an analysis every 50 steps, its ms do not"
    )
    groups = []
    for threads in a.threads:
        use_threads(threads)
        for name in a.models:
            for channels_last in (
                (False, True) if a.channels_last and CASES[name].convolutional else (False,)
            ):
                torch._dynamo.reset()  # compiled code has the number of threads in it
                group = make_group(a, name, threads, channels_last)
                measure(a, group)
                rows = rows_of(group)
                show(group, rows)
                dynasty = group.row(DYNASTY)
                share = share_of_analysis(dynasty) if dynasty else None
                groups.append(
                    {
                        "model": name,
                        "batch": group.batch,
                        "threads": threads,
                        "memory_format": "channels_last" if channels_last else "NCHW",
                        "expected": {
                            "to_float32": group.case.goal,
                            "to_bf16_autocast": MOST_TO_AUTOCAST,
                            "analysis_share": MOST_ANALYSIS,
                        },
                        "analysis_share": share.to_json() if share else None,
                        "dynasty": group.dynasty.figures() if group.dynasty else None,
                        "rows": rows,
                    }
                )
                write_json(a.results, {**record, "rounds": a.rounds, "groups": groups})
    failed = [
        f"{g['model']}: {r['competitor']}: {r['error']}"
        for g in groups
        for r in g["rows"]
        if r["error"] and r["competitor"] in NEEDED
    ]
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
