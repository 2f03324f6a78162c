# SPDX-License-Identifier: Apache-2.0
"""The table of a demo's run folder, and the figures behind it."""

from collections.abc import Mapping
from typing import Any, Final

from ..._moved import renamed_keywords
from .statistics import REFERENCE, Spread

DIGITS_NOTE: Final = (
    "Digits show that everything runs; they are no evidence for accuracy: the "
    "test set is small and easy."
)

ROLES: Final = {"X": "Activations X", "W": "Weights W", "E": "Errors E"}
_TABLE_RATIOS: Final = {
    "reduction in bit operations": "speedup_ideal",
    "  zero blocks counted": "speedup_charged",
    "energy (model): arithmetic": "energy_ratio_compute",
    "  + on-chip memory": "energy_ratio_sram",
    "  + off-chip memory": "energy_ratio_total",
}


def method_name(method: str) -> str:
    """A method as a reader knows it: "float32", "uniform 8 bits", "dynasty".

    >>> method_name("uniform8")
    'uniform 8 bits'
    """
    if method.startswith("uniform"):
        return f"uniform {method.removeprefix('uniform')} bits"
    return method


def spread(summary: Mapping[str, Any], method: str, figure: str) -> Spread:
    """A figure of one method over its seeds; absent and undefined values are left out.

    >>> spread({"runs": [{"name": "bf16", "loss": x} for x in (1.0, 3.0)]}, "bf16", "loss").mean
    2.0
    """
    return Spread.of(
        [r[figure] for r in summary["runs"] if r["name"] == method and r.get(figure) is not None]
    )


@renamed_keywords(baseline="reference")
def paired_difference(
    summary: Mapping[str, Any], method: str, reference: str = REFERENCE
) -> Spread:
    """Accuracy of a method minus the reference's with the same seed, in points.

    >>> runs = [
    ...     {"name": name, "seed": 0, "accuracy": accuracy}
    ...     for name, accuracy in (("uniform8", 0.5), ("dynasty", 0.75))
    ... ]
    >>> paired_difference({"runs": runs}, "dynasty").mean
    25.0
    """
    others = {r["seed"]: r["accuracy"] for r in summary["runs"] if r["name"] == reference}
    runs = [r for r in summary["runs"] if r["name"] == method and r["seed"] in others]
    return Spread.of([100 * (r["accuracy"] - others[r["seed"]]) for r in runs])


def format_table(summary: Mapping[str, Any]) -> str:
    """Mean ± sample standard deviation over seeds, one column for each method.

    >>> run = {"name": "float32", "seed": 0, "accuracy": 0.9}
    >>> print(format_table({"args": {"data": "cifar100"}, "runs": [run]}).split("\\n\\n")[0])
                                     float32
    ----------------------------------------
    runs (n)                               1
    test accuracy (%)                  90.00
    ...
    """
    methods = methods_of(summary)
    rows = [
        ["", *map(method_name, methods)],
        ["runs (n)", *(str(accuracy_of(summary, m).n) for m in methods)],
    ]
    rows.append(["test accuracy (%)", *(accuracy_of(summary, m).text() for m in methods)])
    differences = ["" if m == REFERENCE else signed(paired_difference(summary, m)) for m in methods]
    rows.append([f"  minus {method_name(REFERENCE)}, by seed", *differences])
    for label, figure in _TABLE_RATIOS.items():
        rows.append([label, *(spread(summary, m, figure).text() for m in methods)])
    bits = {
        role: {"runs": [{"name": r["name"], **(r.get("bits") or {})} for r in summary["runs"]]}
        for role in ROLES
    }
    means = [[spread(bits[role], m, role) for role in ROLES] for m in methods]
    rows.append(
        [
            "bits X / W / E, last analysis",
            *(" / ".join(f"{b.mean:.1f}" for b in m) if m[0].n else "-" for m in means),
        ]
    )
    shares = [spread(summary, m, "analytics_share") for m in methods]
    rows.append(
        [
            "analysis (% of training time)",
            *(f"{100 * share.mean:.1f}" if share.n else "-" for share in shares),
        ]
    )
    rows.append(["seconds a run", *(spread(summary, m, "seconds").text(".1f") for m in methods)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        f"±: sample standard deviation over the seeds. Accuracy: "
        f"{summary.get('test_images', '?')} test images, tested with the",
        "quantizer of training. Speedup and energy: ratios to uniform 8-bit blocks, whole run, "
        "warm-up included.",
        "Energy is a model, not a measurement.",
    ]
    if summary["args"]["data"] == "digits":
        lines.append(DIGITS_NOTE)
    return "\n".join(lines)


def setting_text(summary: Mapping[str, Any]) -> str:
    args = summary["args"]
    text = (
        f"{args['data']}, {args['model']}, {args.get('epochs', '?')} epochs of "
        f"{summary.get('train_images', '?')} images"
    )
    return text + (" (no evidence for accuracy)" if args["data"] == "digits" else "")


def methods_of(summary: Mapping[str, Any]) -> list[str]:
    """Methods that have runs, in the order asked for."""
    return list(dict.fromkeys(r["name"] for r in summary["runs"]))


def accuracy_of(summary: Mapping[str, Any], method: str) -> Spread:
    """Test accuracy in percent."""
    return Spread.of([100 * r["accuracy"] for r in summary["runs"] if r["name"] == method])


def signed(difference: Spread) -> str:
    return (
        difference.text("+.2f")
        if difference.n < 2
        else f"{difference.mean:+.2f} ± {difference.sd:.2f}"
    )


__all__ = ["format_table", "method_name", "paired_difference", "spread"]
