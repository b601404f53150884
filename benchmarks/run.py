"""Runs the benchmarks of ops: python -m benchmarks.run [op ...] [options]; --help lists them."""

import argparse
import importlib
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import base, harness, record
from .device import device, device_name, is_cuda
from .harness import Goal, Plan, Row

OPS = (
    "feature_alignment",
    "attention_kl",
    "attention_map_kl",
    "linear_kl",
    "logit_kl",
    "topk_kl",
    "train_step",
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default all")
    add("--device", choices=["cpu", "cuda"], help="default cuda where there is a card")
    add("--quick", action="store_true", help="one or two shapes an op, 2 seconds each, not 8")
    add("--dtype", choices=list(harness.DTYPES), help="default all that an op is timed in")
    add("--base", metavar="REF", help="a git commit, built apart, as one more contender")
    add("--reference", action="store_true", help="the reference engine as one more contender")
    add("--json", type=Path, help="default benchmarks/results/<device>-<date>.json")
    add("--plots", type=Path, metavar="FOLDER", help="draw the results into this folder")
    options = parser.parse_args()
    for op in options.ops:
        if op not in OPS:
            parser.error(f"op must be one of {', '.join(OPS)}: got {op!r}; choose one.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a card that torch sees: got none; leave it out.")
    return options


def main() -> None:
    options = parse()
    if options.device:
        os.environ["FAKD_BENCH_DEVICE"] = options.device
    console = Console()
    rows: list[Row] = []
    curves: list[dict] = []
    seconds = 2.0 if options.quick else 8.0
    seconds = min(seconds, 1.0) if is_cuda() else seconds  # a step there takes milliseconds
    path = options.json or record.default_path()
    with ExitStack() as stack:
        tree = None
        if options.base:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            console.print(f"building {options.base} ...")
            tree = base.build(options.base, folder)
        plan = Plan(seconds, options.quick, tree, options.reference)
        for op in options.ops or OPS:
            for shape, dtype in cases(op, options):
                console.print(f"{op}: {shape}, {dtype} ...")
                module = f"benchmarks.bench_{op}"
                rows.append(harness.measure(module, shape, dtype, plan))
                record.save(rows, path, curves)  # so that a run cut short keeps its figures
    if not options.ops or "attention_kl" in options.ops:
        from .curves import attention_by_length

        console.print("attention_kl: by length ...")
        curves.append(attention_by_length(options.quick, seconds / 2))
    console.print(table(rows))
    record.save(rows, path, curves)
    console.print(f"written to {path}", soft_wrap=True)
    if options.plots:
        from .plots import draw

        for plot in draw(path, options.plots):
            console.print(f"drawn: {plot}", soft_wrap=True)


def cases(op: str, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Shape and dtype of every row of an op."""
    bench = importlib.import_module(f"benchmarks.bench_{op}")
    dtypes = [options.dtype] if options.dtype else bench.TIMED[: 1 if options.quick else None]
    return [
        (name, dtype)
        for dtype in dtypes
        for name, shape in bench.SHAPES.items()
        if (shape.is_quick or not options.quick) and (is_cuda() or not shape.is_big)
    ]


def table(rows: list[Row]) -> Table:
    title = f"forward + backward on {device_name()}, {torch.get_num_threads()} threads"
    view = Table(title=title if device() == "cpu" else f"forward + backward on {device_name()}")
    for heading in ("shape", "fakd ms", "ratios to others", "extra peak MB"):
        view.add_column(heading, justify="left" if heading == "shape" else "right")
    for row in rows:
        first, *others = row.times_ms
        view.add_row(
            f"{row.op} {row.shape}, {row.dtype}",
            f"{row.times_ms[first]['median']:.1f} ({first})",
            "\n".join(_ratio(row, first, name) for name in others),
            f"{row.extra_peak_mb[first]:.0f} of {row.extra_peak_mb.get('eager', float('nan')):.0f}",
        )
    return view


def _ratio(row: Row, first: str, against: str) -> str:
    """How many times faster than a contender; of a limit, how many times its time."""
    speedup = row.ratio(first, against)
    is_limit = against in (*harness.BOUNDS, "not causal")
    text = f"{1 / speedup:.2f}x the time of" if is_limit else f"{speedup:.2f}x as fast as"
    text += f" {against}"
    for goal in row.goals:
        if goal.against == against:
            text += f" ({_verdict(goal, speedup)})"
    return text


def _verdict(goal: Goal, speedup: float) -> str:
    if goal.at_least is not None:
        return f"goal {goal.at_least}: {'met' if speedup >= goal.at_least else 'missed'}"
    return f"goal {goal.at_most}: {'met' if 1 / speedup <= goal.at_most else 'missed'}"


if __name__ == "__main__":
    main()
