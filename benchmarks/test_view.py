"""The pytest-benchmark view of the same steps: pytest benchmarks."""

import importlib

import pytest

from benchmarks import harness
from benchmarks.device import is_cuda
from benchmarks.run import OPS

BENCHES = {op: importlib.import_module(f"benchmarks.bench_{op}") for op in OPS}
CASES = [
    pytest.param(bench, name, id=f"{op}: {name}")
    for op, bench in BENCHES.items()
    for name, shape in bench.SHAPES.items()
    if is_cuda() or not shape.is_big
]


@pytest.mark.parametrize("contender", ["fakd", "eager", "limit"])
@pytest.mark.parametrize(("bench", "shape_name"), CASES)
def test_step(benchmark, bench, shape_name, contender):
    name = harness.engines_here()[-1] if contender == "fakd" else contender
    if contender == "fakd":
        harness.in_fresh_process(harness.check, bench.__name__, name, shape_name, "float32")
    step = harness.make_step(bench, name, shape_name, "float32")
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
