"""attention_kl against eager, torch.compile and the necessary products at the rate of a large one.

Value and gradients of the student's queries and keys, one call over all layer pairs. Queries and
keys lie in memory as models hand them over, [B, T, H, K].

Eager is what users write: softmax over scores of both sides, KL over all of them, a mask of -inf
where attention is causal. The limit is the FLOPs of the products that are needed at all (half of
them where attention is causal) at the rate of a 1024 x 1024 x 1024 product in float32, measured in
the same run.
"""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

from fakd_kernels import attention_kl
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
from .shapes import ATTENTION_SHAPES, AttentionShape

SHAPES = ATTENTION_SHAPES
TIMED = FLOAT32_ON_CPU
SIDE = 1024  # of the square product whose rate is the limit


def make_inputs(shape: AttentionShape, dtype: str) -> list[list[torch.Tensor]]:
    """student_q, student_k, teacher_q, teacher_k."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def tensors(side: int) -> list[torch.Tensor]:
        size = (shape.batch, shape.tokens, shape.heads[side], shape.widths[side])
        options = {"generator": generator, "device": device, "dtype": DTYPES[dtype]}
        made = [torch.randn(*size, **options).transpose(1, 2) for _ in range(shape.pairs)]
        return [tensor.requires_grad_(side == 0) for tensor in made]

    return [tensors(0), tensors(0), tensors(1), tensors(1)]


def eager(groups: list[list[torch.Tensor]], is_causal: bool, is_mean: bool) -> torch.Tensor:
    def log_map(q, k):
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if is_causal:
            tokens = q.shape[2]
            after = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(after, -torch.inf)
        if is_mean:
            return torch.softmax(scores, -1).mean(1).clamp_min(1e-30).log()
        return torch.log_softmax(scores, -1)

    loss = 0
    for student_q, student_k, teacher_q, teacher_k in zip(*groups, strict=True):
        with torch.no_grad():
            teacher = log_map(teacher_q, teacher_k)
        student = log_map(student_q, student_k)
        if is_causal:
            # -inf on both sides would give NaN.
            teacher, student = teacher.clamp_min(-1e30), student.clamp_min(-1e30)
        distance = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
        loss = loss + distance.mean() / len(groups[0])
    return loss


@functools.cache
def compiled():
    return torch.compile(eager, dynamic=False)


def make_step(contender: str, shape: str | int | AttentionShape, dtype: str) -> Step:
    """One forward and backward, returning the loss and the gradients; a number is a length."""
    if isinstance(shape, int):
        shape = AttentionShape(1, 1, shape, (8, 8), (64, 64))
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    if contender == "limit":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        a, b, out = (torch.ones(SIDE, SIDE, device=device) for _ in range(3))
        return lambda: torch.mm(a, b, out=out)
    groups = make_inputs(shape, dtype)
    leaves = groups[0] + groups[1]
    heads = "mean" if shape.is_mean else "match"

    def step():
        if contender == "eager":
            loss = eager(groups, shape.is_causal, shape.is_mean)
        elif contender == "compiled":
            loss = compiled()(groups, shape.is_causal, shape.is_mean)
        elif contender == "not causal":
            loss = attention_kl(*groups, heads=heads).loss
        else:
            loss = attention_kl(*groups, causal=shape.is_causal, heads=heads, engine=contender).loss
        return loss, *torch.autograd.grad(loss, leaves)

    return step


def check(shape_name: str, dtype: str, contender: str) -> None:
    """No number on red: value and gradients by the accuracy rule, on fewer texts of that shape."""
    shape = dataclasses.replace(SHAPES[shape_name], batch=1, pairs=1)
    got = make_step(contender, shape, dtype)()
    reference = make_step("eager", shape, dtype)()
    groups = [
        [t.detach().double().requires_grad_(t.requires_grad) for t in group]
        for group in make_inputs(shape, dtype)
    ]
    loss = eager(groups, shape.is_causal, shape.is_mean)
    truth = (loss, *torch.autograd.grad(loss, groups[0] + groups[1]))
    for index, values in enumerate(zip(got, truth, reference, strict=True)):
        assert_accurate(f"result {index}", *values, torch.float32 if index == 0 else DTYPES[dtype])


def run(shape_name: str, dtype: str = "float32", seconds: float = 8.0) -> Row:
    shape = SHAPES[shape_name]
    names = contenders()
    timed = [*names, "not causal"] if shape.is_causal else list(names)
    in_fresh_process(check, shape_name, dtype, names[0])
    times = interleave({name: make_step(name, shape_name, dtype) for name in timed}, seconds)
    share = shape.gflop / (2 * SIDE**3 / 1e9)
    times["limit"] = {name: value * share for name, value in times["limit"].items()}
    elements = shape.pairs * shape.batch * shape.tokens
    student, teacher = (h * k for h, k in zip(shape.heads, shape.widths, strict=True))
    width = 4 if dtype == "float32" else 2
    return Row(
        op="attention_kl",
        shape=shape_name,
        dtype=dtype,
        times_ms=times,
        extra_peak_mb={
            name: extra_peak_mb(__name__, name, shape_name, dtype) for name in names[:3]
        },
        gflop=shape.gflop,
        moved_mb=width * elements * (4 * student + 2 * teacher) / 1e6,
        goals=list(shape.goals) if dtype == "float32" and not torch.cuda.is_available() else [],
    )


def memory_curve() -> dict:
    """Peak memory in MB by length, B1 H8 64 wide, float32; eager as far as it is sure to fit."""
    engine = contenders()[0]
    lengths = [512, 1024, 2048, 4096, 8192, 16384]
    return {
        "op": "attention_kl",
        "shape": "B1 H8, 64 wide, float32",
        "tokens": lengths,
        "extra_peak_mb": {
            name: [
                extra_peak_mb(__name__, name, tokens, "float32") if tokens <= most else None
                for tokens in lengths
            ]
            for name, most in ((engine, 16384), ("eager", 4096))
        },
    }


@pytest.mark.parametrize("contender", ["fakd", "eager", "limit"])
@pytest.mark.parametrize("shape_name", SHAPES)
def test_attention_kl(benchmark, shape_name, contender):
    """The pytest-benchmark view of the same steps: pytest benchmarks/bench_attention_kl.py."""
    name = contenders()[0] if contender == "fakd" else contender
    benchmark.pedantic(make_step(name, shape_name, "float32"), rounds=5, warmup_rounds=2)
