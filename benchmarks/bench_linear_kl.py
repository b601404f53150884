"""linear_kl against eager, torch.compile, Liger's chunked JSD at beta 0 and the bare products.

Value, and gradients of the student's hidden states and head. The limit is the four products that
are needed, S = H W^T, T = H_T W_T^T, dH = dS W and dW = dS^T H, each in one call, into memory that
exists. Liger's loss, compiled as it comes, is the same KL(T || S) over chunks of tokens. The
`linear_cross_entropy` of torch 2.13 is no contender: it takes probabilities as targets only where
it stores the logits, and warns that its chunks need class indices.
"""

import dataclasses
import functools

import torch

from fakd_kernels import linear_kl

from .bench_logit_kl import eager as kl_of_logits
from .device import device
from .harness import DTYPES, Step, compiled
from .shapes import LINEAR_SHAPES, OutputShape

OP = "linear_kl"
SHAPES = LINEAR_SHAPES
TIMED = tuple(DTYPES)
RIVALS = ("eager", "compiled", "liger", "limit")


def smaller(shape: OutputShape) -> OutputShape:
    """Checked on fewer tokens, some blocks of them: float64 takes long, and would fill a card."""
    return dataclasses.replace(shape, tokens=min(shape.tokens, 1024 if shape.is_big else 256))


def make_inputs(shape: OutputShape, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states and head of the student, then of the teacher; logits have a deviation of 3."""
    generator = torch.Generator(device()).manual_seed(0)
    options = {"generator": generator, "device": device()}
    tensors = []
    for side, width in enumerate(shape.widths):
        hidden = torch.randn(shape.tokens, width, **options)
        head = torch.randn(shape.vocabulary, width, **options) * (3 / width**0.5)
        tensors += [t.to(dtype).requires_grad_(side == 0) for t in (hidden, head)]
    return tuple(tensors)


def eager(student_hidden, student_head, teacher_hidden, teacher_head) -> torch.Tensor:
    student = student_hidden @ student_head.T
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_head.T
    return kl_of_logits(student, teacher)


@functools.cache
def liger():
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)


def loss(contender: str, shape: OutputShape, inputs: tuple) -> torch.Tensor:
    if contender in ("eager", "compiled"):
        return (eager if contender == "eager" else compiled(eager))(*inputs)
    if contender == "liger":
        labels = torch.zeros(shape.tokens, dtype=torch.long, device=device())
        return liger()(*inputs, labels)
    return linear_kl(*inputs, engine=contender).loss


def limit(shape: OutputShape, inputs: tuple) -> Step:
    student_hidden, student_head, teacher_hidden, teacher_head = inputs
    student = student_hidden @ student_head.T
    teacher = torch.empty_like(student)
    grads = torch.empty_like(student_hidden), torch.empty_like(student_head)

    def products():
        torch.mm(student_hidden, student_head.T, out=student)
        torch.mm(teacher_hidden, teacher_head.T, out=teacher)
        torch.mm(student, student_head, out=grads[0])
        torch.mm(student.T, student_hidden, out=grads[1])

    return products


def gflop(shape: OutputShape) -> float:
    return shape.gflop


def moved_bytes(shape: OutputShape, itemsize: int) -> int:
    """Reads both heads, writes the student's gradient; hidden states are small beside them."""
    return itemsize * shape.vocabulary * (2 * shape.widths[0] + shape.widths[1])
