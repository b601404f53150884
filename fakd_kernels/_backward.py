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
