"""What the ops do alike with lists of layer pairs: shared tensors, weights, gradient buffers."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _memory, _validate


def unique(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The distinct tensors, by identity, and each entry's place among them (-1 for None)."""
    distinct: list[Tensor] = []
    places = []
    for tensor in tensors:
        place = -1
        if tensor is not None:
            matches = [i for i, known in enumerate(distinct) if known is tensor]
            place = matches[0] if matches else len(distinct)
            if not matches:
                distinct.append(tensor)
        places.append(place)
    return distinct, places


def pick(tensors: Sequence[Tensor | None], index: int) -> Tensor | None:
    """The tensor at `index`, None for index -1."""
    return None if index < 0 else tensors[index]


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Any strides, but a contiguous last axis."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps an empty one


def flat(tensor: Tensor) -> Tensor:
    """[N, D] with a contiguous last axis: a view where the strides allow one."""
    return rows_contiguous(tensor.flatten(0, -2))


def autocast(tensor: Tensor | None) -> Tensor | None:
    """What F.linear does to an argument under autocast, and nothing elsewhere."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    if tensor.device.type == "meta" or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def loss_of(coefficients: Tensor, sums: Tensor) -> Tensor:
    """A term of weight 0 adds nothing, even where its sum is not finite."""
    if coefficients.device.type == "cpu":  # where a result may be looked at: one operation for four
        loss = torch.dot(coefficients.flatten(), sums.flatten())
        if math.isfinite(loss.item()):
            return loss
    return torch.where(coefficients == 0, 0, coefficients * sums).sum()


def sum_parts(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """[L]: the sums of parts of these sizes, one after the other."""
    if is_even(sizes):
        return values.view(len(sizes), -1).sum(1)
    return torch.stack([part.sum() for part in values.split(list(sizes))])


def is_even(sizes: Sequence[int]) -> bool:
    """Whether all parts are of one size, so that one operation serves them all."""
    return all(size == sizes[0] for size in sizes)


def work_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float32, or float64 where any tensor is."""
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def pair_weights_of(weights, count: int, device: torch.device, work: torch.dtype) -> Tensor:
    """[L]: checked; 1 / L each by default."""
    if weights is None:
        return vector([1.0 / count] * count, device, work)
    if isinstance(weights, Tensor):
        _validate.check_float("pair_weights", weights)
        _validate.check_device("pair_weights", weights, "the student", device)
        if tuple(weights.shape) != (count,):
            raise ValueError(
                f"pair_weights must have the shape [L] = [{count}]: got {list(weights.shape)}; "
                "pass one weight per layer pair."
            )
        return weights.to(work)
    if not isinstance(weights, (list, tuple)):
        raise TypeError(
            "pair_weights must be None, a list or a tensor [L]: got "
            f"{type(weights).__name__}; pass one weight per layer pair."
        )
    _validate.check_count("pair_weights", len(weights), count)
    for index, weight in enumerate(weights):
        _validate.check_number(f"pair_weights[{index}]", weight)
    return vector([float(weight) for weight in weights], device, work)


def check_normalizer(normalizer: float | Tensor | None, device: torch.device) -> None:
    if normalizer is not None:
        _validate.check_scalar("normalizer", normalizer, device)
        if not isinstance(normalizer, Tensor):
            # Its inverse must be a float32.
            _validate.check_number("normalizer", normalizer, minimum=2.0**-127)


def inverse(counts: Sequence[float | Tensor], like: Tensor, work: torch.dtype) -> Tensor:
    """[L]: 1 / count of each pair, 0 where nothing counts, on the device of `like`."""
    if any(isinstance(count, Tensor) for count in counts):
        return inverse_of(vector(counts, like.device, work))
    return vector([inverse_of(count) for count in counts], like.device, work)


def inverse_of(count: float | Tensor) -> float | Tensor:
    """1 / count, 0 where nothing counts."""
    if isinstance(count, Tensor):
        return torch.where(count == 0, 0, 1 / torch.where(count == 0, 1, count))
    return 1.0 / count if count != 0 else 0.0


def vector(values: Sequence[float | Tensor], device: torch.device, work: torch.dtype) -> Tensor:
    """[L] of numbers and tensors [], without a transfer that waits for a GPU."""
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack(
            [
                value.to(work).reshape(())
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=work, device=device)
                for value in values
            ]
        )
    if all(value == values[0] for value in values):
        return torch.full((len(values),), values[0], dtype=work, device=device)
    if device.type != "cuda":
        return torch.tensor(values, dtype=work, device=device)
    return torch.tensor(values, dtype=work).pin_memory().to(device, non_blocking=True)


def wanted_gradients(*groups: Sequence[Tensor]) -> tuple[list[bool], ...]:
    """For every tensor of every group: whether autograd will ask for its gradient."""
    is_grad = torch.is_grad_enabled()
    return tuple([is_grad and tensor.requires_grad for tensor in group] for group in groups)


def grad_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype a gradient waits in until backward.

    float16 gradients wait in float32: a loss scaler's factor only reaches them in backward, and
    until then most would lie below float16's smallest number.
    """
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def grad_buffers(
    tensors: Sequence[Tensor], wants: Sequence[bool], *, empty=_memory.empty
) -> list[Tensor | None]:
    """One uninitialised gradient buffer per wanted tensor, None elsewhere."""
    return [
        empty(tensor.shape, dtype=grad_dtype(tensor), device=tensor.device) if wanted else None
        for tensor, wanted in zip(tensors, wants, strict=True)
    ]


def present(*groups: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors of all groups in order, without the Nones."""
    return [tensor for group in groups for tensor in group if tensor is not None]


def row_weights_of(mask: Tensor) -> Tensor:
    """A mask as contiguous float32 weights of the same shape."""
    return mask.detach().float().contiguous()


def check_mask(name: str, mask: Tensor) -> None:
    """bool, or float weights."""
    _validate.check_tensor(name, mask)
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(
                f"{name} must be bool or floating-point row weights: got {mask.dtype}; "
                "convert an attention mask with .bool()."
            )
        _validate.check_float(name, mask)
