"""Benchmarks: one module per op on a common harness; `python -m benchmarks.run` runs them."""
