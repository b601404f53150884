"""linear_kl against eager, torch.compile, Liger's chunked JSD at beta 0 and the bare products.

Value, and gradients of the student's hidden states and head. The limit is the four products that
are needed, S = H W^T, T = H_T W_T^T, dH = dS W and dW = dS^T H, each in one call, into memory that
exists. Liger's loss, compiled as it comes, is the same KL(T || S) over chunks of tokens.
"""

import functools

import pytest
import torch

from fakd_kernels import linear_kl
from tests.support.accuracy import assert_accurate

from .bench_logit_kl import eager as kl_of_logits
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
from .shapes import LINEAR_SHAPES, OutputShape

SHAPES = LINEAR_SHAPES
TIMED = FLOAT32_ON_CPU


def make_inputs(shape: OutputShape, dtype: str) -> tuple[torch.Tensor, ...]:
    """Hidden states and head of the student, then of the teacher; logits have a deviation of 3."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    tensors = []
    for side, width in enumerate(shape.widths):
        hidden = torch.randn(shape.tokens, width, **options)
        head = torch.randn(shape.vocabulary, width, **options) * (3 / width**0.5)
        tensors += [t.to(DTYPES[dtype]).requires_grad_(side == 0) for t in (hidden, head)]
    return tuple(tensors)


def eager(student_hidden, student_head, teacher_hidden, teacher_head) -> torch.Tensor:
    student = student_hidden @ student_head.T
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_head.T
    return kl_of_logits(student, teacher)


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


@functools.cache
def liger():
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)


def make_step(contender: str, shape_name: str, dtype: str) -> Step:
    """One forward and backward, returning the loss and the gradients."""
    inputs = make_inputs(SHAPES[shape_name], dtype)
    if contender == "limit":
        return _limit(*[tensor.detach() for tensor in inputs])
    student_hidden, student_head, teacher_hidden, teacher_head = inputs
    labels = torch.zeros(student_hidden.shape[0], dtype=torch.long, device=student_hidden.device)

    def step():
        if contender == "eager":
            loss = eager(*inputs)
        elif contender == "compiled":
            loss = compiled()(*inputs)
        elif contender == "liger":
            loss = liger()(student_hidden, student_head, teacher_hidden, teacher_head, labels)
        else:
            loss = linear_kl(*inputs, engine=contender).loss
        return loss, *torch.autograd.grad(loss, (student_hidden, student_head))

    return step


def _limit(student_hidden, student_head, teacher_hidden, teacher_head) -> Step:
    student = student_hidden @ student_head.T
    teacher = torch.empty_like(student)
    grads = torch.empty_like(student_hidden), torch.empty_like(student_head)

    def products():
        torch.mm(student_hidden, student_head.T, out=student)
        torch.mm(teacher_hidden, teacher_head.T, out=teacher)
        torch.mm(student, student_head, out=grads[0])
        torch.mm(student.T, student_hidden, out=grads[1])

    return products


def check(shape_name: str, dtype: str, contender: str) -> None:
    """No number on red: value and gradients by the accuracy rule, on the shape that is timed."""
    got = make_step(contender, shape_name, dtype)()
    reference = make_step("eager", shape_name, dtype)()
    inputs = make_inputs(SHAPES[shape_name], dtype)
    inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    loss = eager(*inputs)
    truth = (loss, *torch.autograd.grad(loss, inputs[:2]))
    for index, values in enumerate(zip(got, truth, reference, strict=True)):
        assert_accurate(f"result {index}", *values, torch.float32 if index == 0 else DTYPES[dtype])


def run(shape_name: str, dtype: str = "float32", seconds: float = 8.0) -> Row:
    shape = SHAPES[shape_name]
    engine, *others = contenders()
    names = [engine, *others, "liger"]
    in_fresh_process(check, shape_name, dtype, engine)
    times = interleave({name: make_step(name, shape_name, dtype) for name in names}, seconds)
    width = 4 if dtype == "float32" else 2
    heads = shape.vocabulary * sum(shape.widths)
    return Row(
        op="linear_kl",
        shape=shape_name,
        dtype=dtype,
        times_ms=times,
        extra_peak_mb={
            name: extra_peak_mb(__name__, name, shape_name, dtype)
            for name in names
            if name != "limit"
        },
        gflop=shape.gflop,
        moved_mb=width * (heads + shape.vocabulary * shape.widths[0]) / 1e6,
        goals=list(shape.goals) if dtype == "float32" and not torch.cuda.is_available() else [],
    )


@pytest.mark.parametrize("contender", ["fakd", "eager", "limit"])
@pytest.mark.parametrize("shape_name", SHAPES)
def test_linear_kl(benchmark, shape_name, contender):
    """The pytest-benchmark view of the same steps: pytest benchmarks/bench_linear_kl.py."""
    name = contenders()[0] if contender == "fakd" else contender
    benchmark.pedantic(make_step(name, shape_name, "float32"), rounds=5, warmup_rounds=2)
