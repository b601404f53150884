"""Helpers of the tests; benchmarks use them too."""
