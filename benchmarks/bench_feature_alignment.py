"""feature_alignment against eager, torch.compile and the bare products or the bare copy.

Value and gradients of student and projection, one call over all layer pairs.

The limit without a projection is 2 reads and 1 write of a pair's size, into memory that exists, and
the sum is the same into new memory, where gradients have to be; with one it is the three products
of the direct route, P = X W^T, dX = P W, dW = P^T X (6 N Ds Dt FLOPs), likewise into memory that
exists.
"""

import dataclasses

import torch

from fakd_kernels import feature_alignment
from fakd_kernels.ops.feature_alignment import feature_alignment_reference

from .device import device
from .harness import DTYPES, Step, compiled
from .shapes import FEATURE_SHAPES, FeatureShape

OP = "feature_alignment"
SHAPES = FEATURE_SHAPES
TIMED = tuple(DTYPES)
RIVALS = ("eager", "compiled", "limit")


def rivals_of(shape: FeatureShape) -> tuple[str, ...]:
    return RIVALS if shape.is_projected else (*RIVALS, "sum")


def smaller(shape: FeatureShape) -> FeatureShape:
    """Checked on fewer pairs of a large model."""
    return dataclasses.replace(shape, pairs=2) if shape.is_big else shape


def make_inputs(shape: FeatureShape, dtype: torch.dtype) -> tuple[list, list, list]:
    """Students, teachers and projections."""
    options = {"device": device(), "dtype": dtype}
    generator = torch.Generator(device()).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, **options)

    students, teachers, weights = [], [], []
    for _ in range(shape.pairs):
        students.append(draw(shape.rows, shape.student_width).requires_grad_())
        teachers.append(draw(shape.rows, shape.teacher_width))
        w = None
        if shape.is_projected:
            w = draw(shape.teacher_width, shape.student_width) / shape.student_width**0.5
            w.requires_grad_()
        weights.append(w)
    return students, teachers, weights


def eager(students, teachers, weights) -> torch.Tensor:
    none = [None] * len(students)
    pairs = [1 / len(students)] * len(students)
    options = {"pair_weights": pairs}
    return feature_alignment_reference(students, teachers, weights, none, none, **options)[0]


def loss(contender: str, shape: FeatureShape, inputs: tuple) -> torch.Tensor:
    if contender in ("eager", "compiled"):
        return (eager if contender == "eager" else compiled(eager))(*inputs)
    return feature_alignment(*inputs, engine=contender).loss


def limit(shape: FeatureShape, inputs: tuple) -> Step:
    xs, ts, ws = inputs
    outs = [torch.empty_like(x) for x in xs]
    if not shape.is_projected:

        def copy():
            for x, t, out in zip(xs, ts, outs, strict=True):
                torch.add(x, t, out=out)

        return copy
    block = torch.empty_like(ts[0])
    grads = [torch.empty_like(w) for w in ws]

    def products():
        for x, w, out, grad in zip(xs, ws, outs, grads, strict=True):
            torch.mm(x, w.T, out=block)
            torch.mm(block, w, out=out)
            torch.mm(block.T, x, out=grad)

    return products


def plain_sum(shape: FeatureShape, inputs: tuple) -> Step:
    xs, ts, _ = inputs
    return lambda: [x + t for x, t in zip(xs, ts, strict=True)]


def gflop(shape: FeatureShape) -> float:
    area = shape.student_width * shape.teacher_width if shape.is_projected else 0
    return 6 * shape.pairs * shape.rows * area / 1e9


def moved_bytes(shape: FeatureShape, itemsize: int) -> int:
    """Reads X and T, writes dX."""
    return itemsize * shape.pairs * shape.rows * (2 * shape.student_width + shape.teacher_width)
