"""Time and peak memory of attention_kl by length, as far as a contender is sure to fit."""

from . import bench_attention_kl as bench
from . import harness
from .device import is_cuda

MODULE = bench.__name__
CONTENDERS = ("eager", "compiled")


def attention_by_length(is_quick: bool, seconds: float) -> dict:
    """One of a record's curves: contender -> a value per length, None where it was not run."""
    engine = harness.engines_here()[-1]  # the cuda engine has no attention
    lengths = [tokens for tokens in bench.LENGTHS if tokens <= (2048 if is_quick else 16384)]
    most_timed = 16384 if is_cuda() else 4096  # a step at 16384 takes a CPU five seconds
    names = (engine, *CONTENDERS)
    times: dict[str, list] = {name: [] for name in names}
    for tokens in lengths:
        present = [n for n in names if tokens <= bench.LONGEST.get(n, most_timed)]
        spreads = {}
        if present:
            spreads = harness.in_fresh_process(time_at, present, tokens, seconds)
        for name in names:
            times[name].append(spreads[name]["median"] if name in spreads else None)
    return {
        "op": bench.OP,
        "shape": bench.CURVE_SHAPE,
        "tokens": lengths,
        "times_ms": times,
        "extra_peak_mb": {n: peaks(n, lengths) for n in (engine, "eager")},
    }


def time_at(names: list[str], tokens: int, seconds: float) -> dict:
    shape = bench.curve_shape(tokens)
    steps = {name: harness.make_step(bench, name, shape, "float32") for name in names}
    return harness.interleave(steps, seconds, least=3)


def peaks(name: str, lengths: list[int]) -> list[float | None]:
    fitting = [tokens for tokens in lengths if tokens <= bench.LONGEST.get(name, 16384)]
    cases = [(name, bench.curve_shape(tokens), "float32") for tokens in fitting]
    return harness.extra_peaks_mb(MODULE, cases) + [None] * (len(lengths) - len(fitting))
