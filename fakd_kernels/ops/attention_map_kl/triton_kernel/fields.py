"""The line of a launch's table: what a program is told of its layer pair."""

import triton.language as tl
from torch import Tensor

_NAMES = (
    *("first", "pair", "weights", "tokens", "heads", "teacher_heads", "behind", "ahead"),
    *("batches", "slots"),
    *(f"student{name}" for name in ("", "_batch", "_head", "_row")),
    *(f"teacher{name}" for name in ("", "_batch", "_head", "_row")),
    *(f"grad{name}" for name in ("", "_batch", "_head", "_row")),
)
FIELDS = tl.constexpr(len(_NAMES))
# Keys that a query meets: [query - behind, query + ahead]. Teacher heads are counted where heads
# are averaged; else they stand in a table of all pairs' heads, from that place on.
PAIR, WEIGHTS, TOKENS, HEADS, TEACHER_HEADS, BEHIND, AHEAD, BATCHES, SLOTS = (
    tl.constexpr(place) for place in range(1, 10)
)
# A tensor is an address and three strides.
STUDENT, TEACHER, GRAD = (
    tl.constexpr(_NAMES.index(name)) for name in ("student", "teacher", "grad")
)


def make_line(**values: int | Tensor | None) -> list[int | Tensor | None]:
    """Values by the names of fields, in the order of the table; those left out are 0."""
    unknown = values.keys() - set(_NAMES)
    assert not unknown, unknown
    return [values.get(name) for name in _NAMES]


def tensor_values(name: str, tensor: Tensor | None) -> dict[str, int | Tensor | None]:
    """The fields of maps [B, H, T, T]."""
    if tensor is None:
        return {}
    batch, head, row, _ = tensor.stride()
    return {name: tensor, f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": row}
