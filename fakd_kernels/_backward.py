"""The backward of every op: gradients were computed in forward, backward scales them.

A factor of exactly 1, the usual one when a loss is called with its weights inside, costs nothing
on a CPU, and an empty launch on a GPU: the buffers of forward become the gradients.
"""

import torch
from torch import Tensor

from . import _engines

_SECOND = (
    "fakd_kernels: second derivatives are not available, because gradients are computed in the "
    "forward pass; call backward without create_graph=True, or use the *_reference function."
)


def save_gradients(ctx, output, tensors: tuple, wants: tuple) -> None:
    """What every op's setup_context does with its output (loss, sums, gradients).

    Args:
        ctx: of `register_autograd`.
        output: what the op returned; only the loss is differentiable.
        tensors: the lists of inputs that may want a gradient, in the order of the gradients.
        wants: for each of these lists, whether each tensor wanted one.
    """
    _, sums, grads = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, *grads)
    ctx.save_for_backward(sums, *grads)
    ctx.wants = wants
    ctx.dtypes = [
        tensor.dtype
        for group, flags in zip(tensors, wants, strict=True)
        for tensor, wanted in zip(group, flags, strict=True)
        if wanted
    ]


def take_gradients(
    ctx, grad_loss: Tensor | None
) -> tuple[list[list[Tensor | None]], Tensor | None]:
    """The scaled gradients, one list per list of `wants`, and the sums that forward saved."""
    if grad_loss is None:
        return [[None] * len(flags) for flags in ctx.wants], None
    sums, *grads = ctx.saved_tensors
    scaled = iter(scale_gradients(grads, grad_loss, ctx.dtypes))
    return [[next(scaled) if wanted else None for wanted in flags] for flags in ctx.wants], sums


def scale_gradients(grads: list[Tensor], factor: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    """`[(grad * factor).to(dtype) ...]`, in place where nobody can see it.

    Args:
        grads: buffers that the forward pass saved.
        factor: the incoming gradient of the scalar loss, [].
        dtypes: what each gradient must have; differs from its buffer's for float16.
    """
    if torch.is_grad_enabled():  # only under create_graph=True
        factor = factor.detach().requires_grad_()
        return [
            torch.ops.fakd.scale_gradient(grad, factor, dtype)
            for grad, dtype in zip(grads, dtypes, strict=True)
        ]
    is_plain = type(factor) is Tensor and all(type(grad) is Tensor for grad in grads)
    if not is_plain or torch._C._autograd._get_current_graph_task_keep_graph():
        return [_scaled(grad, factor, dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    if factor.device.type == "cpu":
        value = factor.item()
        if value != 1:
            torch._foreach_mul_(grads, value)
        return [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    is_double = any(grad.dtype == torch.float64 for grad in grads)
    if not is_double and _engines.triton_absent() is None:
        from ._scale import scale_  # imports Triton

        with torch.cuda.device(factor.device):
            scale_(grads, factor)
    else:
        for grad in grads:
            if grad.dtype == torch.bfloat16:
                grad.copy_(grad.float() * factor)
            else:
                grad.mul_(factor)
    return [grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)]


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor; the product is taken in float32 at least, so that the factor is not rounded."""
    work = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(work) * factor).to(dtype)


@torch.library.custom_op("fakd::scale_gradient", mutates_args=())
def _scale_gradient(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return _scaled(grad, factor, dtype)


@_scale_gradient.register_fake
def _(grad, factor, dtype):
    return torch.empty_like(grad, dtype=dtype)


def _no_second_derivative(ctx, grad):
    raise RuntimeError(_SECOND)


_scale_gradient.register_autograd(_no_second_derivative)
