"""attention_kl against eager, torch.compile and the necessary products at the rate of a large one.

Value and gradients of the student's queries and keys, one call over all layer pairs. Queries and
keys lie in memory as models hand them over, [B, T, H, K].

Eager is what users write: softmax over scores of both sides, KL over all of them, a mask of -inf
where attention is causal. The limit is the FLOPs of the products that are needed at all (half of
them where attention is causal) at the rate of a 1024 x 1024 x 1024 product in the same dtype,
measured in the same run.
"""

import dataclasses

import torch
import torch.nn.functional as F

from fakd_kernels import attention_kl

from .device import device, is_cuda
from .harness import DTYPES, Step, compiled
from .shapes import ATTENTION_SHAPES, AttentionShape

OP = "attention_kl"
SHAPES = ATTENTION_SHAPES
TIMED = tuple(DTYPES)
RIVALS = ("eager", "compiled", "limit")
SIDE = 8192 if is_cuda() else 1024  # of the square product whose rate is the limit: one that fills
# Of the curves over lengths: T, and the longest that eager is sure to fit.
CURVE_SHAPE = "B1 H8, 64 wide, float32"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONGEST = {"eager": 4096, "compiled": 4096}


def rivals_of(shape: AttentionShape) -> tuple[str, ...]:
    return (*RIVALS, "not causal") if shape.is_causal else RIVALS


def curve_shape(tokens: int) -> AttentionShape:
    return AttentionShape(1, 1, tokens, (8, 8), (64, 64))


def smaller(shape: AttentionShape) -> AttentionShape:
    """Checked on fewer texts, and of large models fewer heads: float64 takes long and much."""
    few = dataclasses.replace(shape, batch=1, pairs=1)
    if not shape.is_big:
        return few
    heads = tuple(count // 4 for count in shape.heads)
    return dataclasses.replace(few, heads=heads, key_heads=shape.key_heads // 4)


def make_inputs(shape: AttentionShape, dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """student_q, student_k, teacher_q, teacher_k."""
    generator = torch.Generator(device()).manual_seed(0)
    options = {"generator": generator, "device": device(), "dtype": dtype}

    def tensors(side: int, heads: int) -> list[torch.Tensor]:
        size = (shape.batch, shape.tokens, heads, shape.widths[side])
        made = [torch.randn(*size, **options).transpose(1, 2) for _ in range(shape.pairs)]
        return [tensor.requires_grad_(side == 0) for tensor in made]

    return [
        tensors(side, heads)
        for side in (0, 1)
        for heads in (shape.heads[side], shape.key_heads or shape.heads[side])
    ]


def eager(groups: list[list[torch.Tensor]], is_causal: bool, is_mean: bool) -> torch.Tensor:
    def log_map(q, k):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
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


def loss(contender: str, shape: AttentionShape, groups: list) -> torch.Tensor:
    if contender in ("eager", "compiled"):
        function = eager if contender == "eager" else compiled(eager)
        return function(groups, shape.is_causal, shape.is_mean)
    options = {"heads": "mean" if shape.is_mean else "match"}
    if contender == "not causal":
        return attention_kl(*groups, **options).loss
    return attention_kl(*groups, causal=shape.is_causal, engine=contender, **options).loss


def limit(shape: AttentionShape, groups: list) -> Step:
    dtype = groups[0][0].dtype
    a, b, out = (torch.ones(SIDE, SIDE, device=device(), dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def limit_factor(shape: AttentionShape) -> float:
    return shape.gflop / (2 * SIDE**3 / 1e9)


def gflop(shape: AttentionShape) -> float:
    return shape.gflop


def moved_bytes(shape: AttentionShape, itemsize: int) -> int:
    """Reads the queries and keys of both sides, writes dQ and dK."""
    rows = shape.pairs * shape.batch * shape.tokens
    student, teacher = (
        width * (heads + (shape.key_heads or heads))
        for heads, width in zip(shape.heads, shape.widths, strict=True)
    )
    return itemsize * rows * (2 * student + teacher)
