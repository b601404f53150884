"""The backward of every op: gradients were computed in forward, backward scales them.

A factor of exactly 1, the usual one when a loss is called with its weights inside, costs nothing
on a CPU, and an empty launch on a GPU: the buffers of forward become the gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import _engines, _pairs

_FORWARD = (
    "fakd_kernels: forward-mode derivatives are not available, because the forward pass computes "
    "gradients; use torch.autograd.grad, or the plain formula of the docstring."
)
_SECOND = (
    "fakd_kernels: second derivatives are not available, because gradients are computed in the "
    "forward pass; call backward without create_graph=True, or use the plain formula of the "
    "docstring."
)


def register_autograd(
    name: str,
    coefficients_at: int,
    leaves_of: Callable[[tuple], list[Tensor]],
    sizes_of: Callable[[tuple], list[int]] | None = None,
) -> None:
    """Differentiate a registered op, which returns (loss, sums, ..., gradients of the loss).

    Does what `torch.library.register_autograd` does, in a third of the host's time: that one takes
    lists of tensors apart and together again as pytrees, which for twelve layer pairs took longer
    than all else in a call.

    Args:
        name: of the op, in `torch.ops.fakd`.
        coefficients_at: which of its arguments are the coefficients of the sums.
        leaves_of: of its arguments, those whose gradients it returns, in that order.
        sizes_of: how many sums, one after the other, each coefficient has; one by default.
    """
    op = getattr(torch.ops.fakd, name).default
    returns = op._schema.returns
    is_list = isinstance(returns[-1].type, torch.ListType)

    def compute(keyset: torch._C.DispatchKeySet, arguments: tuple) -> tuple:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, arguments, coefficients, *leaves):
            loss, *values, grads = compute(keyset, arguments)
            grads = grads if is_list else [grads]
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*values, *grads)
            ctx.save_for_backward(values[0], *grads[: len(leaves)])
            ctx.dtypes = [leaf.dtype for leaf in leaves]
            ctx.sizes = None if sizes_of is None else sizes_of(arguments)
            return loss, *values, *grads

        @staticmethod
        def backward(ctx, grad_loss, *_):
            if grad_loss is None:
                return (None,) * (3 + len(ctx.dtypes))
            sums, *grads = ctx.saved_tensors
            scaled = scale_gradients(grads, grad_loss, ctx.dtypes)
            grad_coefficients = None
            if ctx.needs_input_grad[2]:
                if ctx.sizes is not None:
                    sums = _pairs.sum_parts(sums, ctx.sizes)
                grad_coefficients = grad_loss * sums
            return None, None, grad_coefficients, *scaled

    def call(keyset: torch._C.DispatchKeySet, *arguments) -> tuple:
        if forward_ad._current_level >= 0 and _has_tangent(arguments):
            raise RuntimeError(_FORWARD)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return compute(keyset, arguments)
        inputs = arguments[coefficients_at], *leaves_of(arguments)
        outputs = Loss.apply(keyset, arguments, *inputs)
        count = len(returns) - 1
        return *outputs[:count], list(outputs[count:]) if is_list else outputs[count]

    _library.impl(name, call, "Autograd", with_keyset=True)


_library = torch.library.Library("fakd", "FRAGMENT")


def _has_tangent(arguments: tuple) -> bool:
    tensors = (leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def wanted(tensors: Sequence[Tensor | None], wants: Sequence[bool]) -> list[Tensor]:
    return [tensor for tensor, is_wanted in zip(tensors, wants, strict=True) if is_wanted]


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
    is_plain = all(type(tensor) is Tensor for tensor in (factor, *grads))
    # Several losses at once, of is_grads_batched=True and the like, have a vector of factors.
    functorch = torch._C._functorch
    is_batched = functorch.is_legacy_batchedtensor(factor) or functorch.is_batchedtensor(factor)
    is_plain = is_plain and not is_batched
    if not is_plain or torch._C._autograd._get_current_graph_task_keep_graph():
        return [_scaled(grad, factor, dtype) for grad, dtype in zip(grads, dtypes, strict=True)]
    if factor.device.type == "cpu":
        value = factor.item()
        if value != 1 and grads:
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
