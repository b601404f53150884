"""feature_alignment against eager, torch.compile and the bare products or the bare copy.

Value and gradients of student and projection, one call over all layer pairs.

The limit without a projection is 2 reads and 1 write of a pair's size, into memory that exists;
with one it is the three products of the direct route, P = X W^T, dX = P W, dW = P^T X
(6 N Ds Dt FLOPs), likewise into memory that exists.
"""

import functools

import pytest
import torch

from fakd_kernels import feature_alignment
from fakd_kernels.ops.feature_alignment import feature_alignment_reference
from tests.support.accuracy import assert_accurate

from .harness import DTYPES, Row, Step, contenders, extra_peak_mb, in_fresh_process, interleave
from .shapes import FEATURE_SHAPES, FeatureShape

SHAPES = FEATURE_SHAPES
TIMED = tuple(DTYPES)


def make_inputs(shape: FeatureShape, dtype: str) -> tuple[list, list, list]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"device": device, "dtype": DTYPES[dtype]}
    generator = torch.Generator(device).manual_seed(0)
    students, teachers, weights = [], [], []
    for _ in range(shape.pairs):
        x = torch.randn(shape.rows, shape.student_width, generator=generator, **options)
        students.append(x.requires_grad_())
        teachers.append(
            torch.randn(shape.rows, shape.teacher_width, generator=generator, **options)
        )
        w = None
        if shape.is_projected:
            w = torch.randn(
                shape.teacher_width, shape.student_width, generator=generator, **options
            )
            w = (w / shape.student_width**0.5).requires_grad_()
        weights.append(w)
    return students, teachers, weights


def eager(students, teachers, weights) -> torch.Tensor:
    none = [None] * len(students)
    pairs = [1 / len(students)] * len(students)
    return feature_alignment_reference(students, teachers, weights, none, none, pair_weights=pairs)[
        0
    ]


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


def make_step(contender: str, shape_name: str, dtype: str) -> Step:
    """One forward and backward, returning the loss and the gradients."""
    shape = FEATURE_SHAPES[shape_name]
    students, teachers, weights = make_inputs(shape, dtype)
    if contender == "limit":
        return _limit(students, teachers, weights)
    leaves = students + [w for w in weights if w is not None]

    def step():
        if contender == "eager":
            loss = eager(students, teachers, weights)
        elif contender == "compiled":
            loss = compiled()(students, teachers, weights)
        else:
            loss = feature_alignment(students, teachers, weights, engine=contender).loss
        return loss, *torch.autograd.grad(loss, leaves)

    return step


def _limit(students, teachers, weights) -> Step:
    xs = [x.detach() for x in students]
    ws = [None if w is None else w.detach() for w in weights]
    outs = [torch.empty_like(x) for x in xs]
    if ws[0] is None:

        def copy():
            for x, t, out in zip(xs, teachers, outs, strict=True):
                torch.add(x, t, out=out)

        return copy
    block = torch.empty_like(teachers[0])
    grads = [torch.empty_like(w) for w in ws]

    def products():
        for x, w, out, grad in zip(xs, ws, outs, grads, strict=True):
            torch.mm(x, w.T, out=block)
            torch.mm(block, w, out=out)
            torch.mm(block.T, x, out=grad)

    return products


def check(shape_name: str, dtype: str, contender: str) -> None:
    """No number on red: value and gradients by the accuracy rule, on the shape that is timed."""
    got = make_step(contender, shape_name, dtype)()
    reference = make_step("eager", shape_name, dtype)()
    students, teachers, weights = make_inputs(FEATURE_SHAPES[shape_name], dtype)

    def double(tensors):
        return [None if t is None else t.detach().double().requires_grad_() for t in tensors]

    students, teachers, weights = double(students), double(teachers), double(weights)
    loss = eager(students, teachers, weights)
    truth = (loss, *torch.autograd.grad(loss, students + [w for w in weights if w is not None]))
    for index, values in enumerate(zip(got, truth, reference, strict=True)):
        assert_accurate(f"result {index}", *values, torch.float32 if index == 0 else DTYPES[dtype])


def run(shape_name: str, dtype: str = "float32", seconds: float = 8.0) -> Row:
    shape = FEATURE_SHAPES[shape_name]
    names = contenders()
    in_fresh_process(check, shape_name, dtype, names[0])
    times = interleave({name: make_step(name, shape_name, dtype) for name in names}, seconds)
    elements = shape.pairs * shape.rows * shape.student_width
    product = 2 * elements * shape.teacher_width if shape.is_projected else 0
    width = 4 if dtype == "float32" else 2
    return Row(
        op="feature_alignment",
        shape=shape_name,
        dtype=dtype,
        times_ms=times,
        extra_peak_mb={
            name: extra_peak_mb(__name__, name, shape_name, dtype) for name in names[:3]
        },
        gflop=3 * product / 1e9,
        moved_mb=width * (2 * elements + shape.pairs * shape.rows * shape.teacher_width) / 1e6,
        goals=list(shape.goals) if dtype == "float32" and not torch.cuda.is_available() else [],
    )


@pytest.mark.parametrize("contender", ["fakd", "eager", "limit"])
@pytest.mark.parametrize("shape_name", FEATURE_SHAPES)
def test_feature_alignment(benchmark, shape_name, contender):
    """The pytest-benchmark view of the same steps: pytest benchmarks/bench_feature_alignment.py."""
    name = contenders()[0] if contender == "fakd" else contender
    benchmark.pedantic(make_step(name, shape_name, "float32"), rounds=5, warmup_rounds=2)
