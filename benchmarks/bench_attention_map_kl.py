"""attention_map_kl against eager, torch.compile and the bare copy.

Value, and gradient of the student's maps of probabilities, as models return them. The limit is
2 reads and 1 write of the maps, into memory that exists; the sum is the same into new memory, where
gradients have to be.
"""

import dataclasses

import torch

from fakd_kernels import attention_map_kl

from .device import device
from .harness import Step, compiled, float32_on_cpu
from .shapes import MAP_SHAPES, MapShape

OP = "attention_map_kl"
SHAPES = MAP_SHAPES
TIMED = float32_on_cpu()
RIVALS = ("eager", "compiled", "limit", "sum")


def smaller(shape: MapShape) -> MapShape:
    """Checked on one text: in float64 a batch would take minutes."""
    return dataclasses.replace(shape, batch=1, pairs=1)


def make_inputs(shape: MapShape, dtype: torch.dtype) -> tuple[list, list]:
    """Maps of students and of teachers."""
    generator = torch.Generator(device()).manual_seed(0)
    size = (shape.batch, shape.heads, shape.tokens, shape.tokens)

    def maps() -> list[torch.Tensor]:
        options = {"generator": generator, "device": device()}
        return [torch.randn(size, **options).softmax(-1).to(dtype) for _ in range(shape.pairs)]

    return [tensor.requires_grad_() for tensor in maps()], maps()


def eager(students, teachers) -> torch.Tensor:
    total = 0
    for student, teacher in zip(students, teachers, strict=True):
        wide = torch.promote_types(student.dtype, torch.float32)
        s, t = student.to(wide).clamp_min(1e-30), teacher.to(wide).clamp_min(1e-30)
        total = total + (t * (t.log() - s.log())).sum(-1).mean() / len(students)
    return total


def loss(contender: str, shape: MapShape, inputs: tuple) -> torch.Tensor:
    if contender in ("eager", "compiled"):
        return (eager if contender == "eager" else compiled(eager))(*inputs)
    return attention_map_kl(*inputs, engine=contender).loss


def limit(shape: MapShape, inputs: tuple) -> Step:
    outs = [torch.empty_like(student) for student in inputs[0]]

    def copy():
        for student, teacher, out in zip(*inputs, outs, strict=True):
            torch.add(student, teacher, out=out)

    return copy


def plain_sum(shape: MapShape, inputs: tuple) -> Step:
    return lambda: [student + teacher for student, teacher in zip(*inputs, strict=True)]


def gflop(shape: MapShape) -> float:
    return 0.0


def moved_bytes(shape: MapShape, itemsize: int) -> int:
    """Reads both maps, writes the gradient."""
    return 3 * itemsize * shape.pairs * shape.batch * shape.heads * shape.tokens**2
