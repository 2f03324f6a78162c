# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning`, also `python -m dynasty_lightning`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Final

_DEFAULTS: Final = {  # epochs, batch size, training images
    "digits": (20, 64, None),
    "fashion-mnist": (5, 128, 20000),
    "cifar100": (10, 128, None),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for a mistake of the caller's."""
    parser = argparse.ArgumentParser(prog="dynasty-lightning", description="Training in block-wise dynamic precision.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train float32, uniform 8 bits and dynamic precision side by side",
        description="Trains one network in float32, in uniform 8-bit block floating point and in dynamic precision, and writes figures, "
        "the precision maps and pictures into a run folder. Digits run from the installed packages; the other sets are read from disk.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_demo_arguments(demo)
    arguments = parser.parse_args(argv)
    try:
        return _demo(arguments)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        print(f"dynasty-lightning {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are in summary.json", file=sys.stderr)
        return 130


def _add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    from .data import DATASETS
    from .models import MODELS

    methods = "float32,uniform8,dynasty"
    demo.add_argument("--data", default="digits", choices=DATASETS, help="data set")
    demo.add_argument("--data-dir", help="folder of the data files; DYNASTY_DATA otherwise")
    demo.add_argument("--model", default="resnet8", choices=MODELS, help="network")
    demo.add_argument("--epochs", type=_positive, help="epochs of each run (digits 20, fashion-mnist 5, cifar100 10)")
    demo.add_argument("--batch-size", type=_positive, help="samples a step (digits 64, else 128)")
    demo.add_argument("--train-images", type=_positive, help="use only so many training images (fashion-mnist 20000, else all)")
    demo.add_argument("--learning-rate", type=float, default=0.1, help="of SGD, at the start")
    demo.add_argument("--methods", default=methods, help="which of them, separated by commas")
    demo.add_argument("--policy", default="dynasty", choices=("dynasty", "uniform"), help="policy of the dynasty runs")
    demo.add_argument("--target-speedup", type=float, help="whole-run cost target over uniform 8 bits, zero blocks charged (5.0)")
    demo.add_argument("--noise-budget", type=float, help="steer to this predicted harm instead of a cost")
    demo.add_argument("--interval", type=_positive, default=50, help="steps between analyses")
    demo.add_argument("--seed", type=int, default=0, help="first seed")
    demo.add_argument("--seeds", type=_positive, default=3, help="seeds of each method")
    demo.add_argument("--mode", default="fast", choices=("fast", "exact"), help="exact gives the bits that the core computes, slower")
    demo.add_argument("--processes", type=_positive, default=2, help="runs at a time, one thread each")
    demo.add_argument("--out", help="run folder (runs/demo-DATA)")


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import METHODS, DemoConfig, run_demo
    from .policy.generator import check_target

    epochs, batch_size, train_images = _DEFAULTS[arguments.data]
    methods = tuple(m for m in arguments.methods.split(",") if m)
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise ValueError(f"--methods takes {', '.join(METHODS)}, separated by commas, not {arguments.methods!r}")
    target = arguments.target_speedup
    if target is not None and arguments.noise_budget is not None:
        raise ValueError("give --target-speedup or --noise-budget, not both: one steers cost, the other noise")
    if arguments.policy == "dynasty" and arguments.noise_budget is None:
        target = check_target(5.0 if target is None else target)
    run_demo(
        DemoConfig(
            data=arguments.data,
            data_dir=arguments.data_dir,
            model=arguments.model,
            epochs=arguments.epochs or epochs,
            batch_size=arguments.batch_size or batch_size,
            train_images=arguments.train_images or train_images,
            learning_rate=arguments.learning_rate,
            policy=arguments.policy,
            target_speedup=target,
            noise_budget=arguments.noise_budget,
            interval=arguments.interval,
            seed=arguments.seed,
            seeds=arguments.seeds,
            mode=arguments.mode,
            methods=methods,
            processes=arguments.processes,
            out=arguments.out or f"runs/demo-{arguments.data}",
        )
    )
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
