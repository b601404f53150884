"""logit_kl against eager, torch.compile and the bare copy.

Value, and gradient of the student's logits. The limit is 2 reads and 1 write of the logits, into
memory that exists.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from fakd_kernels import logit_kl
from tests.support.accuracy import assert_accurate

from .harness import (
    DTYPES,
    FLOAT32_ON_CPU,
    Row,
    Step,
    contenders,
    extra_peak_mb,
    in_fresh_process,
    interleave,
)
from .shapes import LOGIT_SHAPES, OutputShape

SHAPES = LOGIT_SHAPES
TIMED = FLOAT32_ON_CPU


def make_inputs(shape: OutputShape, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.tokens, shape.vocabulary)
    options = {"generator": generator, "device": device, "dtype": DTYPES[dtype]}
    return torch.randn(size, **options).requires_grad_(), torch.randn(size, **options)


def eager(student, teacher) -> torch.Tensor:
    wide = torch.promote_types(student.dtype, torch.float32)
    return F.kl_div(
        F.log_softmax(student.to(wide), -1),
        F.log_softmax(teacher.to(wide), -1),
        log_target=True,
        reduction="batchmean",
    )


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


def make_step(contender: str, shape_name: str, dtype: str) -> Step:
    """One forward and backward, returning the loss and the gradient."""
    student, teacher = make_inputs(SHAPES[shape_name], dtype)
    if contender == "limit":
        out = torch.empty_like(student)
        return lambda: torch.add(student.detach(), teacher, out=out)

    def step():
        if contender == "eager":
            loss = eager(student, teacher)
        elif contender == "compiled":
            loss = compiled()(student, teacher)
        else:
            loss = logit_kl(student, teacher, engine=contender).loss
        return loss, *torch.autograd.grad(loss, student)

    return step


def check(shape_name: str, dtype: str, contender: str) -> None:
    """No number on red: value and gradient by the accuracy rule, on the shape that is timed."""
    got = make_step(contender, shape_name, dtype)()
    reference = make_step("eager", shape_name, dtype)()
    student, teacher = make_inputs(SHAPES[shape_name], dtype)
    student = student.detach().double().requires_grad_()
    loss = eager(student, teacher.double())
    truth = (loss, *torch.autograd.grad(loss, student))
    for index, values in enumerate(zip(got, truth, reference, strict=True)):
        assert_accurate(f"result {index}", *values, torch.float32 if index == 0 else DTYPES[dtype])


def run(shape_name: str, dtype: str = "float32", seconds: float = 8.0) -> Row:
    shape = SHAPES[shape_name]
    names = contenders()
    in_fresh_process(check, shape_name, dtype, names[0])
    times = interleave({name: make_step(name, shape_name, dtype) for name in names}, seconds)
    width = 4 if dtype == "float32" else 2
    return Row(
        op="logit_kl",
        shape=shape_name,
        dtype=dtype,
        times_ms=times,
        extra_peak_mb={
            name: extra_peak_mb(__name__, name, shape_name, dtype) for name in names[:3]
        },
        gflop=0.0,
        moved_mb=3 * width * shape.tokens * shape.vocabulary / 1e6,
        goals=list(shape.goals) if dtype == "float32" and not torch.cuda.is_available() else [],
    )


@pytest.mark.parametrize("contender", ["fakd", "eager", "limit"])
@pytest.mark.parametrize("shape_name", SHAPES)
def test_logit_kl(benchmark, shape_name, contender):
    """The pytest-benchmark view of the same steps: pytest benchmarks/bench_logit_kl.py."""
    name = contenders()[0] if contender == "fakd" else contender
    benchmark.pedantic(make_step(name, shape_name, "float32"), rounds=5, warmup_rounds=2)
