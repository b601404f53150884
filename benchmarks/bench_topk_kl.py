"""topk_kl against eager, torch.compile and the bare products.

Value, and gradients of the student's hidden states and head, with a ghost for all tokens that the
teacher did not store. The limit is the three products that are needed, S = H W^T, dH = dS W and
dW = dS^T H, each in one call, into memory that exists.
"""

import dataclasses

import torch

from fakd_kernels import topk_kl

from .device import device
from .harness import DTYPES, Step, compiled
from .shapes import TOPK_SHAPES, TopShape

OP = "topk_kl"
SHAPES = TOPK_SHAPES
TIMED = tuple(DTYPES)
RIVALS = ("eager", "compiled", "limit")


def smaller(shape: TopShape) -> TopShape:
    """Checked on fewer tokens, some blocks of them: float64 takes long, and would fill a card."""
    return dataclasses.replace(shape, tokens=min(shape.tokens, 1024 if shape.is_big else 256))


def make_inputs(shape: TopShape, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states and head of the student, then what a teacher stored: indices, logarithms."""
    generator = torch.Generator(device()).manual_seed(0)
    options = {"generator": generator, "device": device()}
    hidden = torch.randn(shape.tokens, shape.width, **options)
    head = torch.randn(shape.vocabulary, shape.width, **options) * (3 / shape.width**0.5)
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (hidden, head)]
    teacher = 3 * torch.randn(shape.tokens, shape.vocabulary, **options)
    logprobs, indices = teacher.log_softmax(-1).topk(shape.entries)
    return *tensors, indices, logprobs


def eager(hidden, head, indices, logprobs) -> torch.Tensor:
    logits = hidden @ head.T
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    student = logs.gather(1, indices)
    rest = 1 - logprobs.exp().sum(-1)
    others = torch.log1p(-student.exp().sum(-1))
    kl = (logprobs.exp() * (logprobs - student)).sum(-1) + rest * (rest.log() - others)
    return kl.mean()


def loss(contender: str, shape: TopShape, inputs: tuple) -> torch.Tensor:
    if contender in ("eager", "compiled"):
        return (eager if contender == "eager" else compiled(eager))(*inputs)
    return topk_kl(*inputs, ghost=True, engine=contender).loss


def limit(shape: TopShape, inputs: tuple) -> Step:
    hidden, head, *_ = inputs
    logits = hidden @ head.T
    grads = torch.empty_like(hidden), torch.empty_like(head)

    def products():
        torch.mm(hidden, head.T, out=logits)
        torch.mm(logits, head, out=grads[0])
        torch.mm(logits.T, hidden, out=grads[1])

    return products


def gflop(shape: TopShape) -> float:
    return 6 * shape.tokens * shape.vocabulary * shape.width / 1e9


def moved_bytes(shape: TopShape, itemsize: int) -> int:
    """Reads the head, writes its gradient; the rest is small beside them."""
    return 2 * itemsize * shape.vocabulary * shape.width
