"""logit_kl against eager, torch.compile and the bare copy.

Value, and gradient of the student's logits. The limit is 2 reads and 1 write of the logits, into
memory that exists; the sum is the same into new memory, where a gradient has to be.
"""

import dataclasses

import torch
import torch.nn.functional as F

from fakd_kernels import logit_kl

from .device import device
from .harness import Step, compiled, float32_on_cpu
from .shapes import LOGIT_SHAPES, OutputShape

OP = "logit_kl"
SHAPES = LOGIT_SHAPES
TIMED = float32_on_cpu()
RIVALS = ("eager", "compiled", "limit", "sum")


def smaller(shape: OutputShape) -> OutputShape:
    """Checked on fewer tokens, some blocks of them: float64 takes long, and would fill a card."""
    return dataclasses.replace(shape, tokens=min(shape.tokens, 1024 if shape.is_big else 256))


def make_inputs(shape: OutputShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device()).manual_seed(0)
    size = (shape.tokens, shape.vocabulary)
    options = {"generator": generator, "device": device(), "dtype": dtype}
    return torch.randn(size, **options).requires_grad_(), torch.randn(size, **options)


def eager(student, teacher) -> torch.Tensor:
    wide = torch.promote_types(student.dtype, torch.float32)
    return F.kl_div(
        F.log_softmax(student.to(wide), -1),
        F.log_softmax(teacher.to(wide), -1),
        log_target=True,
        reduction="batchmean",
    )


def loss(contender: str, shape: OutputShape, inputs: tuple) -> torch.Tensor:
    if contender in ("eager", "compiled"):
        return (eager if contender == "eager" else compiled(eager))(*inputs)
    return logit_kl(*inputs, engine=contender).loss


def limit(shape: OutputShape, inputs: tuple) -> Step:
    out = torch.empty_like(inputs[0])
    return lambda: torch.add(*inputs, out=out)


def plain_sum(shape: OutputShape, inputs: tuple) -> Step:
    return lambda: torch.add(*inputs)


def gflop(shape: OutputShape) -> float:
    return 0.0


def moved_bytes(shape: OutputShape, itemsize: int) -> int:
    """Reads both logits, writes the gradient."""
    return 3 * itemsize * shape.tokens * shape.vocabulary
