"""Tunes the Triton kernels' tiles on this card, for good: python -m benchmarks.tune.

Measures what has no winner yet, see `fakd_kernels._tuning`, on the benchmarks' own shapes.
"""

import statistics
import sys

import torch

from fakd_kernels import _tuning

from . import bench_attention_kl, bench_feature_alignment, harness

CALLS = 7  # of every candidate, after one that compiles it


def median_ms(call: harness.Step) -> float:
    harness.time_ms(call)
    return statistics.median(harness.time_ms(call) for _ in range(CALLS))


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a card that torch sees: got none; the first tiles serve.")
    for bench in (bench_feature_alignment, bench_attention_kl):
        for name in bench.SHAPES:
            for dtype in harness.DTYPES:
                call = harness.make_step(bench, "triton", name, dtype)
                for kernel, winner in _tuning.tune(call, median_ms).items():
                    sys.stdout.write(f"{kernel}: {winner}\n")
    sys.stdout.write(f"kept in {_tuning.cache_path()}\n")


if __name__ == "__main__":
    main()
