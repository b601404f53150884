"""Inputs of a case on another device, laid out there as they are here."""

import dataclasses

import torch
from torch import Tensor


def to_device(value, device: str, known: dict[int, object] | None = None):
    """The same numbers with the same strides; what was shared stays shared, leaves stay leaves."""
    known = {} if known is None else known

    def move(inner):
        return to_device(inner, device, known)

    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = _move(value, device)
        return known[id(value)]
    if isinstance(value, list | tuple):
        return type(value)(move(inner) for inner in value)
    if isinstance(value, dict):
        return {name: move(inner) for name, inner in value.items()}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **move(fields))
    return value


def _move(tensor: Tensor, device: str) -> Tensor:
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
    view = tensor.size(), tensor.stride(), tensor.storage_offset()
    moved = memory.to(device, copy=True).as_strided(*view)
    return moved.detach().requires_grad_(tensor.requires_grad)
