"""Argument checks: the one place that words errors about types, shapes, dtypes and devices.

Every sentence has four parts: the argument, the rule, what was received, the remedy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_INFINITY = float("inf")  # math.isfinite cannot be traced by torch.compile
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_list(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A single tensor is one layer pair; a list holds one tensor per layer pair."""
    values = [value] if isinstance(value, Tensor) else value
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{name} must be a tensor or a list of tensors, one per layer pair: "
            f"got {type(value).__name__}; pass [tensor, ...]."
        )
    if len(values) == 0:
        raise ValueError(f"{name} must hold at least one layer pair: got an empty list; pass one.")
    for index, item in enumerate(values):
        check_tensor(f"{name}[{index}]", item)
    return list(values)


def as_optional_list(
    name: str, value: Tensor | Sequence[Tensor | None] | None, count: int
) -> list[Tensor | None]:
    """One entry per layer pair; None or a single tensor serves every pair."""
    if value is None or isinstance(value, Tensor):
        return [value] * count
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{name} must be None, a tensor or a list with one entry per layer pair: "
            f"got {type(value).__name__}; pass a list."
        )
    check_count(name, len(value), count)
    for index, item in enumerate(value):
        if item is not None and not isinstance(item, Tensor):
            raise TypeError(
                f"{name}[{index}] must be a tensor or None: got {type(item).__name__}; "
                "pass a tensor."
            )
    return list(value)


def check_count(name: str, received: int, expected: int) -> None:
    if received != expected:
        raise ValueError(
            f"{name} must have one entry per layer pair: got {received} entries for "
            f"{expected} pairs; make the lists equally long."
        )


def check_count_of(name: str, received: int, expected: int, what: str) -> None:
    if received != expected:
        raise ValueError(
            f"{name} must have one entry per {what}: got {received} for {expected}; "
            "make the list as long."
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor: got {type(tensor).__name__}; pass a tensor.")


def check_float(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64: got {tensor.dtype}; "
            f"convert it with .float()."
        )


def check_device(name: str, tensor: Tensor, other_name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"{name} must be on the device of {other_name}: got {tensor.device} and {device}; "
            "move one of them with .to(device)."
        )


def check_rank(name: str, tensor: Tensor, ranks: tuple[int, ...], axes: str) -> None:
    if tensor.dim() not in ranks:
        raise ValueError(
            f"{name} must have the shape {axes}: got {list(tensor.shape)}; "
            "reshape it before the call."
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}: got {value!r}; choose one."
        )


def check_number(name: str, value: float, *, minimum: float | None = None) -> None:
    """A finite Python number, strictly greater than `minimum` where one is given."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(
            f"{name} must be a number: got {type(value).__name__}; pass a Python float."
        )
    if not -_INFINITY < value < _INFINITY:
        raise ValueError(f"{name} must be finite: got {value}; pass a finite number.")
    if minimum is not None and value <= minimum:
        raise ValueError(
            f"{name} must be greater than {minimum}: got {value}; pass a larger number."
        )


def check_scalar(name: str, value: float | Tensor, device: torch.device) -> None:
    """A finite number, or a 0-dim floating-point tensor on `device`."""
    if not isinstance(value, Tensor):
        check_number(name, value)
        return
    check_float(name, value)
    if value.dim() != 0:
        raise ValueError(
            f"{name} must be a number or a 0-dim tensor: got the shape {list(value.shape)}; "
            "pass one weight, or use pair_weights for one per layer pair."
        )
    check_device(name, value, "student", device)


def check_masks(row_weights: Sequence[Tensor]) -> None:
    for index, weights in enumerate(row_weights):
        check_row_weights(f"mask[{index}]", weights)


def check_row_weights(name: str, weights: Tensor) -> None:
    """Finite weights >= 0. Reads the data, so CPU tensors only: a GPU would have to wait."""
    if weights.device.type != "cpu" or weights.numel() == 0:
        return
    least, most = (bound.item() for bound in weights.aminmax())
    if not (least >= 0 and most < _INFINITY):  # NaN is neither
        raise ValueError(
            f"{name} must hold finite weights >= 0: got numbers from {least} to {most}; clamp it, "
            "or pass a bool mask."
        )
