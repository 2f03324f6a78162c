# SPDX-License-Identifier: Apache-2.0
"""Writes what docs/ has from elsewhere: tables of committed records, the API, the command line.

    python docs/pages.py            # rewrites the generated parts of the pages, in place
    python docs/pages.py --check    # writes nothing; exit status 1 and the names if any differs
    python docs/pages.py --picture  # draws docs/images/headline.png from the same records

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; everything else of
a page is written by hand.
"""

import argparse
import difflib
import importlib
import inspect
import io
import json
import math
import os
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, Final

DOCS: Final = Path(__file__).resolve().parent
ROOT: Final = DOCS.parent
RESULTS: Final = ROOT / "benchmarks" / "results"
COMPARE: Final = RESULTS / "compare"

PART: Final = re.compile(
    r"(<!-- generated: (?P<name>[^>]+?) -->\n)(?P<text>.*?)(<!-- end -->)", re.S
)

sys.path.insert(0, str(ROOT))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a"], [["1"]]))
    | a |
    | --- |
    | 1 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- Accuracy and energy: records of `dynasty-lightning compare`


def _settings(file: str) -> list[Any]:
    from dynasty_lightning.study.record_fields import check_reported
    from dynasty_lightning.study.report.settings import settings_of
    from dynasty_lightning.study.results import sift_records

    records, odd = sift_records(COMPARE / file, check_reported)
    if odd:
        raise ValueError(f"{file}: {odd[0]}")
    return settings_of(records)


def _points(difference: Any) -> str:
    """A paired difference as the pages print it: one decimal, a mean and an interval."""
    if difference is None:
        return ""
    mean, pairs = difference.spread.mean, difference.spread.n
    if pairs < 2:
        return f"{mean:+.1f} (one pair)"
    return f"{mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"


def _ratio(row: Any, figure: str, digits: str = ".2f") -> str:
    spread = row.spread(figure)
    return f"{spread.mean:{digits}}x" if spread.n else "-"


STUDIES: Final = (
    # title, file, rows by label (all where none is named)
    ("CIFAR-100, ResNet-8", "cifar100.jsonl", None),
    ("CIFAR-100, ResNet-20", "cifar100-resnet20.jsonl", None),
    ("CIFAR-100, 10,000 images, ResNet-8", "cifar100-10000.jsonl", None),
    ("Fashion-MNIST, ResNet-8", "fashion-mnist.jsonl", None),
    ("Fashion-MNIST, longer", "fashion-mnist-epochs.jsonl", None),
    ("Text, character transformer", "stdlib-docs.jsonl", None),
)


def headline() -> str:
    """The difference to uniform 8 bits at 5.1x, study by study."""
    rows = []
    for title, file, _ in STUDIES:
        for setting in _settings(file):
            for row in setting.rows:
                if row.label != "dynasty@5.1":
                    continue
                baseline = setting.reference_of(row)
                rows.append(
                    [
                        title,
                        str(setting.values["epochs"]),
                        str(setting.difference(row).spread.n),
                        f"{baseline.accuracy.mean:.1f}",
                        f"{row.accuracy.mean:.1f}",
                        f"**{_points(setting.difference(row))}**",
                        _ratio(row, "speedup_charged"),
                    ]
                )
    header = ["", "epochs", "n", "uniform 8 bits, %", "`dynasty`, %", "difference, points", "bits"]
    return table(header, rows)


def draw_headline(path: Path) -> None:
    """The same as a picture. Left out, and named: two seeds whose interval holds zero."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases, left_out = [], []
    for title, file, _ in STUDIES:
        for setting in _settings(file):
            for row in setting.rows:
                if row.label != "dynasty@5.1":
                    continue
                d, name = setting.difference(row), title.split(", longer")[0]
                length = f"{setting.values['epochs']} epochs"
                if d.spread.n > 2 or d.low * d.high > 0:
                    cases.append((f"{name}\n{length}, n = {d.spread.n}", d))
                else:
                    left_out.append(f"{name} ({length})")
    cases.reverse()
    figure, axes = plt.subplots(figsize=(8, 0.62 * len(cases) + 1.4), layout="constrained")
    axes.axvline(0, color="0.6", linewidth=1)
    for place, (_, d) in enumerate(cases):
        axes.plot([d.low, d.high], [place, place], color="#0072B2", linewidth=3, alpha=0.45)
        axes.plot([d.spread.mean], [place], "o", color="#0072B2", markersize=8)
        axes.annotate(
            f"{d.spread.mean:+.1f}",
            (d.spread.mean, place),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.set_yticks(range(len(cases)), [text for text, _ in cases])
    axes.set(ylim=(-0.6, len(cases) - 0.3), xlabel="points, mean and 95 % interval over seeds")
    note = f"Two seeds that show nothing, in the table only: {', '.join(left_out)}"
    figure.supxlabel(textwrap.fill(note, 110), x=0.01, ha="left", fontsize=8, color="0.3")
    figure.suptitle(
        "5.1x fewer bit operations than 8-bit blocks: points of accuracy against 8 bits",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=120)


def studies(*files: str) -> str:
    """Every method of some files: accuracy, difference, cost."""
    parts = []
    for file in files:
        for setting in _settings(file):
            rows = [
                [
                    f"`{row.label}`",
                    str(row.accuracy.n),
                    row.accuracy.text(".1f"),
                    _points(setting.difference(row)),
                    "-" if row.is_float else _ratio(row, "speedup_charged"),
                    "-" if row.is_float else _ratio(row, "speedup_core", ".1f"),
                ]
                for row in setting.rows
            ]
            header = ["method", "n", "accuracy, %", "minus uniform 8 bits", "bits", "core"]
            parts.append(f"{setting.text()}.\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def baselines(file: str, epochs: int) -> str:
    """`dynasty` minus each other method that was steered to the same target."""
    rows = []
    for setting in _settings(file):
        if setting.values["epochs"] != epochs:
            continue
        for dynasty, other, difference in setting.against_baselines():
            if dynasty.label == "dynasty@5.1":
                apart = setting.costs_apart(dynasty, other) or ""
                rows.append(
                    [f"`{other.label}`", str(difference.spread.n), _points(difference), apart]
                )
    return table(["baseline", "n", "`dynasty` minus it, points", ""], rows)


def energy() -> str:
    """Modelled energy and core time of the studies' methods."""
    rows = []
    for title, file, _ in STUDIES:
        for setting in _settings(file):
            for row in setting.rows:
                parts = [row.spread(f"energy_ratio_{p}") for p in ("compute", "sram", "total")]
                if row.is_float or not parts[0].n or "(" in row.label:
                    continue
                if not re.match(r"(dynasty|per_layer|uniform[48])(@|$)", row.label):
                    continue
                rows.append(
                    [
                        f"{title}, {setting.values['epochs']} epochs",
                        f"`{row.label}`",
                        _ratio(row, "speedup_charged"),
                        *(f"{p.mean:.1f}x" for p in parts),
                        _ratio(row, "speedup_core", ".1f"),
                    ]
                )
    header = ["", "method", "bits", "compute", "+ SRAM", "+ DRAM", "core"]
    return table(header, rows)


# -- Speed: what the benchmarks wrote

_NETWORKS: Final = {
    "resnet20": "ResNet-20",
    "mlp1024": "MLP 3x1024",
    "vit": "ViT d192 depth 6",
    "resnet18": "ResNet-18",
}


def _json(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def _name(competitor: str) -> str:
    return re.sub(r"^dynasty\b", "`dynasty`", competitor)


def steps(file: str) -> str:
    """Ratios of a step to float32's, by network and competitor."""
    groups = _json(file)["groups"]
    names = list(dict.fromkeys(r["competitor"] for g in groups for r in g["rows"]))
    rows = []
    for name in names:
        quantized = next(
            r["quantizes"] for g in groups for r in g["rows"] if r["competitor"] == name
        )
        cells = [_name(name), quantized]
        for group in groups:
            found = next((r for r in group["rows"] if r["competitor"] == name), None)
            if found is None or found.get("to_float32") is None:
                cells.append("-")
            else:
                ratio = found["to_float32"]
                cells.append(f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
        rows.append(cells)
    titles = [
        f"{_NETWORKS[g['model']]}, batch {g['batch']}"
        + ("" if g["memory_format"] == "NCHW" else f", {g['memory_format']}")
        for g in groups
    ]
    return table(["", "quantizes", *titles], rows)


def quantizer() -> str:
    """Time of the quantizer in units of a memcpy of its operand."""
    rows = _json("quantizer.json")["rows"]
    kinds = [k for k in dict.fromkeys(r["kind"] for r in rows) if k != "memcpy"]
    cells = [
        [
            operand,
            *(
                next(
                    (
                        f"{r['times_memcpy']['median']:.1f}"
                        for r in rows
                        if (r["operand"], r["kind"]) == (operand, kind)
                    ),
                    "-",
                )
                for kind in kinds
            ),
        ]
        for operand in dict.fromkeys(r["operand"] for r in rows)
    ]
    return table(["times memcpy", *kinds], cells)


def memory() -> str:
    """Bytes kept for backward, to float32's."""
    cells = []
    for model in _json("memory.json")["models"]:
        whole = model["bytes"]["float32"]
        for name, used in model["bytes"].items():
            if name == "float32" or "layers_with_parameters" not in used:
                continue
            cells.append(
                [
                    f"{_NETWORKS[model['model']]}, batch {model['batch']}",
                    _name(name),
                    *(
                        f"{used[part] / whole[part]:.2f}"
                        for part in ("layers_with_parameters", "network_with_parameters", "peak")
                    ),
                ]
            )
    return table(["", "", "converted layers", "whole network", "peak"], cells)


def profile() -> str:
    """Where the milliseconds of a step go."""
    models = _json("profile.json")["models"]
    parts = [p["part"] for p in models[0]["parts"]]
    rows = []
    for model in models:
        ms = {p["part"]: p["ms"] for p in model["parts"]}
        rows.append(
            [
                f"{_NETWORKS[model['model']]}, batch {model['batch']}",
                f"{ms['step']:.0f} ms",
                *(f"{100 * ms[p] / ms['step']:.0f} %" for p in parts if p != "step"),
            ]
        )
    return table(["", "step", *(p for p in parts if p != "step")], rows)


def formats(role: str) -> str:
    """Rounding noise of candidate formats over that of plain 4x4 blocks: geometric means over the
    networks and stages, with the least and the greatest.
    """
    rows = [r for r in _json("formats.json")["rows"] if r["role"] == role]
    cells = []
    for name in dict.fromkeys(r["format"] for r in rows):
        members = [r for r in rows if r["format"] == name]
        line = [name, f"{members[0]['header_bits']:.2f}"]
        for kind, at in (
            *(("fixed", b) for b in "2345"),
            ("equal_cost", "3.0"),
            ("equal_cost", "4.0"),
        ):
            found = [r[kind][at]["to_today"] for r in members if at in r[kind]]
            mean = math.exp(sum(map(math.log, found)) / len(found))
            line.append(f"{mean:.2f} ({min(found):.2f} to {max(found):.2f})")
        cells.append(line)
    header = ["", "header bits", "2 bits", "3 bits", "4 bits", "5 bits", "mean 3", "mean 4"]
    return table(header, cells)


def dose() -> str:
    """The arms of the dose study that have runs."""
    cells = []
    for arm in _json("dose.json")["arms"]:
        engine = arm["speedup_engine"]
        power = arm["doses"].get("power")
        cells.append(
            [
                f"`{arm['method']}`",
                str(arm["n"]),
                f"{arm['speedup_charged']:.2f}x",
                "-" if engine is None else f"{engine:.2f}x",
                _with_interval(arm["drop"], "+.3f"),
                _with_interval(arm["points"], "+.2f"),
                "-" if power is None else f"{power:.3f}",
            ]
        )
    header = ["", "n", "bits", "engine", "held-out loss", "points", "noise power"]
    return table(header, cells)


def dose_pairs() -> str:
    """How much more one arm drops than another, seed by seed."""
    cells = [
        [
            *(f"`{method}`" for method in pair["methods"]),
            str(pair["n"]),
            _with_interval(pair["difference"], "+.3f"),
        ]
        for pair in _json("dose.json")["pairs"]
    ]
    return table(["the first drops more", "than the second", "n", "by"], cells)


def _with_interval(values: Sequence[float], form: str) -> str:
    mean, low, high = values
    if math.isnan(low):
        return f"{mean:{form}}"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def engines() -> str:
    """Units of tables for each format, and the largest array of each on the chip."""
    cells = []
    for r in _json("engines.json")["rows"]:
        equal = r["macs_per_cycle_at_equal_noise"]
        cells.append(
            [
                r["format"] + (f" ({r['note']})" if r["note"] else ""),
                str(r["shape"]["columns"]),
                str(r["area"]["luts"]),
                f"{r['luts_per_mac']:.1f}",
                str(r["units"]),
                *(f"{r['macs_per_cycle'][planes]:.0f}" for planes in "2348"),
                *("-" if equal[m] is None else f"{equal[m]:.0f}" for m in ("3.0", "4.0")),
            ]
        )
    header = ["", "columns", "LUT", "LUT a MAC", "units", "2 planes", "3", "4", "8"]
    return table([*header, "noise of 3 bits", "of 4"], cells)


def evidence() -> str:
    """Studies that were planned, and what is in of each."""
    found = _json("evidence.json")
    cells = []
    for study in found["plan"]:
        rows = [r for r in found["rows"] if r["study"] == study["study"]]
        cells += [
            [
                study["title"] + (f" ({r['model']})" if study["study"] == "published" else ""),
                f"`{r['method']}`",
                f"{r['n']} of {r['planned']}",
                f"{r['baseline']:.1f}",
                _with_interval(r["points"], "+.2f"),
                f"{r['speedup_charged']:.2f}x",
                "-" if r["speedup_engine"] is None else f"{r['speedup_engine']:.2f}x",
                f"{r['energy_ratio_sram']:.2f}x",
            ]
            for r in rows
        ] or [[study["title"], f"0 of {study['seeds']} seeds", *["-"] * 6]]
    header = ["", "method", "n", "uniform 8 bits, %", "points", "bits", "engine", "energy"]
    return table(header, cells)


# -- Reference: from the code


def _modules() -> Iterable[Any]:
    for package in ("dynasty_lightning", "fpga"):
        root = importlib.import_module(package)
        yield root
        for found in pkgutil.walk_packages(root.__path__, package + "."):
            if ".templates" not in found.name and not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def api(package: str) -> str:
    """Public names of a package, with the first sentence of each."""
    lines = []
    for module in _modules():
        if module.__name__ != package and not module.__name__.startswith(package + "."):
            continue
        rows = []
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if value.__module__ != module.__name__:
                continue
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            rows.append([f"`{name}`", re.split(r"(?<=[.;:]) ", text)[0].replace("|", "\\|")])
        if rows:
            lines.append(f"### `{module.__name__}`\n\n{table(['name', ''], rows)}")
    return "\n\n".join(lines)


def command_line(program: str, *commands: str) -> str:
    """The help of a command and of those below it."""
    from dynasty_lightning import cli
    from fpga import __main__ as fpga_cli

    main: Callable[[list[str]], int] = {
        "dynasty-lightning": cli.main,
        "dynasty-fpga": fpga_cli.main,
    }[program]
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "96"
    argv, sys.argv = sys.argv, [program]
    parts = []
    try:
        for words in ([], *([c] for c in commands)):
            text = io.StringIO()
            with redirect_stdout(text), suppress(SystemExit):
                main([*words, "--help"])
            parts.append(
                f"```text\n$ {' '.join([program, *words, '--help'])}\n{text.getvalue()}```"
            )
    finally:
        sys.argv = argv
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return "\n\n".join(parts)


PARTS: Final[dict[str, Callable[..., str]]] = {
    "headline": headline,
    "studies": studies,
    "baselines": lambda file, epochs: baselines(file, int(epochs)),
    "energy": energy,
    "steps": steps,
    "quantizer": quantizer,
    "memory": memory,
    "profile": profile,
    "formats": formats,
    "engines": engines,
    "dose": dose,
    "dose-pairs": dose_pairs,
    "evidence": evidence,
    "api": api,
    "command-line": command_line,
}


def rendered(page: str) -> str:
    """A page with its generated parts made anew."""

    def part(found: re.Match[str]) -> str:
        name, *words = found["name"].split()
        return f"{found[1]}{PARTS[name](*words)}\n{found[4]}"

    return PART.sub(part, page)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    parser.add_argument("--picture", action="store_true", help="draw the picture of the README")
    arguments = parser.parse_args()
    if arguments.picture:
        draw_headline(DOCS / "images" / "headline.png")
        return 0
    check = arguments.check
    stale = 0
    for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        old = path.read_text()
        new = rendered(old) if PART.search(old) else old
        if new == old:
            continue
        stale += 1
        print(path.relative_to(ROOT), "differs from what it is made from" if check else "rewritten")
        if check:
            changes = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
            print(*list(changes)[2:12], sep="\n")
        else:
            path.write_text(new)
    if check and stale:
        print("python docs/pages.py writes them anew")
    return int(check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
