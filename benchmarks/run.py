"""Runs the benchmarks of ops: python -m benchmarks.run [op ...] [--quick] [--json FILE]."""

import argparse
import importlib
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import harness
from .harness import Goal, Row

OPS = {
    "feature_alignment": "bench_feature_alignment",
    "attention_kl": "bench_attention_kl",
    "linear_kl": "bench_linear_kl",
    "logit_kl": "bench_logit_kl",
    "train_step": "bench_train_step",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default all")
    parser.add_argument("--quick", action="store_true", help="2 seconds a shape instead of 8")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default both")
    parser.add_argument("--json", type=Path, help="default benchmarks/results/<device>-<date>.json")
    options = parser.parse_args()
    for op in options.ops:
        if op not in OPS:
            parser.error(f"op must be one of {', '.join(OPS)}: got {op!r}; choose one.")
    console = Console()
    rows: list[Row] = []
    curves: list[dict] = []
    seconds = 2.0 if options.quick else 8.0
    for op in options.ops or OPS:
        bench = importlib.import_module(f"benchmarks.{OPS[op]}")
        for dtype in [options.dtype] if options.dtype else bench.TIMED:
            for shape in bench.SHAPES:
                console.print(f"{op}: {shape}, {dtype} ...")
                rows.append(harness.in_fresh_process(bench.run, shape, dtype, seconds))
        if hasattr(bench, "memory_curve") and not options.quick:
            console.print(f"{op}: memory by length ...")
            curves.append(bench.memory_curve())
    console.print(table(rows))
    path = options.json or harness.RESULTS / f"{slug(harness.device_name())}-{_date()}.json"
    harness.save(rows, path, curves)
    console.print(f"written to {path}")


def table(rows: list[Row]) -> Table:
    first = next(iter(rows[0].times_ms))
    title = f"forward + backward on {harness.device_name()}, {torch.get_num_threads()} threads"
    view = Table(title=title)
    for heading in ("shape", f"fakd ({first}) ms", "ratios to others", "extra peak MB"):
        view.add_column(heading, justify="left" if heading == "shape" else "right")
    for row in rows:
        view.add_row(
            f"{row.op} {row.shape}, {row.dtype}",
            f"{row.times_ms[first]['median']:.1f}",
            "\n".join(_ratio(row, first, name) for name in row.times_ms if name != first),
            f"{row.extra_peak_mb[first]:.0f} of {row.extra_peak_mb['eager']:.0f}",
        )
    return view


def _ratio(row: Row, first: str, against: str) -> str:
    """How many times faster than a contender; of a limit, how many times its time."""
    speedup = row.ratio(first, against)
    is_limit = against in ("limit", "not causal")
    text = f"{1 / speedup:.2f}x the time of" if is_limit else f"{speedup:.1f}x faster than"
    text += f" {against}"
    for goal in row.goals:
        if goal.against == against:
            text += f" ({_verdict(goal, speedup)})"
    return text


def _verdict(goal: Goal, speedup: float) -> str:
    if goal.at_least is not None:
        return f"goal {goal.at_least}: {'met' if speedup >= goal.at_least else 'missed'}"
    return f"goal {goal.at_most}: {'met' if 1 / speedup <= goal.at_most else 'missed'}"


def slug(name: str) -> str:
    name = re.sub(r"\((r|tm)\)", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _date() -> str:
    return harness.environment()["date"]


if __name__ == "__main__":
    main()
