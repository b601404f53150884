"""What the launches of a call share, and those of gradients: `match` and `mean` make the others."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .... import _triton
from ...._triton_sums import reduce_slots
from ..problem import Pair, Problem
from . import variants
from .fields import make_line
from .lines import pair_values
from .tiles import count_blocks
from .variants import Form

T = TypeVar("T")


@dataclass
class Member:
    """A pair, its place in the problem, and what is kept of it between launches."""

    index: int
    pair: Pair
    form: Form
    kept: dict[str, Tensor | int] = field(default_factory=dict)  # fields of its lines
    slots: Tensor | None = None  # of values, those of one compared head after the other
    key_total: Tensor | None = None  # of heads="mean" only

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, heads and tokens of the student."""
        batch, heads, tokens, _ = self.pair.student.q.shape
        return batch, heads, tokens

    @property
    def wants_any(self) -> bool:
        return self.pair.grad_q is not None or self.pair.grad_k is not None


class Call:
    """A call on its way."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.device = problem.coefficients.device
        self.capability = _triton.capability(self.device)
        self.coefficients = problem.coefficients.contiguous()
        self.is_tf32 = _triton.is_tf32_allowed()
        self.members = [
            Member(index, pair, Form.of(pair, self.is_tf32))
            for index, pair in enumerate(problem.pairs)
        ]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def launch(
        self,
        variant: _triton.Variant,
        jobs: Sequence[dict],
        *others: Tensor,
        count: Callable[[_triton.Variant, dict], int] | None = None,
    ) -> None:
        """One launch for all jobs: the values of their lines."""
        if not jobs:
            return
        lines, first = [], 0
        for values in jobs:
            lines.append(make_line(first=first, **values))
            first += (count or count_programs)(variant, values)
        variant.launch(first, self.device, _triton.make_table(lines, self.device), *others)

    def reduce(self) -> None:
        """Values of blocks become sums."""
        reduce_slots([(member.pair.sums, member.slots) for member in self.members], self.device)


def count_programs(variant: _triton.Variant, values: dict) -> int:
    """Of kernels whose program takes a block of own rows of one query head."""
    blocks = count_blocks(values["end"] - values["begin"], variant.constants["BLOCK_OWN"])
    return values["batches"] * values["student_heads"] * blocks


def grouped(items: Sequence[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    """Items by what a launch must have in common."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


@dataclass
class Strip:
    """Query rows [begin, end) of a pair, whose gradients are taken in one launch."""

    member: Member
    begin: int
    end: int
    key_out: Tensor | None  # where dK goes, or is added
    key_parts: Tensor | None  # dK of every query head, where it is more than is written at once
    is_added: bool = False
    map_size: int = 0  # of heads="mean" only, as are these
    map: Tensor | None = None
    slots: Tensor | None = None

    @property
    def form(self) -> Form:
        return self.member.form

    def values(self, problem: Problem, own: str) -> dict:
        values = pair_values(problem, self.member.index, own, (self.begin, self.end))
        return values | self.member.kept | {"map": self.map, "slots": self.slots}


def by_form(items: Sequence[T]) -> list[tuple[Form, list[T]]]:
    return list(grouped(items, lambda item: item.form).items())


def add_gradients(call: Call, strips: Sequence[Strip], heads: Tensor, is_mean: bool) -> None:
    """dQ of the rows of each strip; dK, or what they add to it."""
    for form, group in by_form(strips):
        for own in ("q", "k"):
            jobs = []
            for strip in group:
                grad = strip.member.pair.grad_q
                if own == "k":
                    grad = strip.key_out if strip.key_parts is None else strip.key_parts
                if grad is None:
                    continue
                values = strip.values(call.problem, own) | {"grad": grad}
                # A program whose rows go in steps makes one piece of the gradient.
                step = form.student.pieces[0][1] if form.student.step else values["student_width"]
                jobs += [values | {"column": c} for c in range(0, values["student_width"], step)]
            variant = variants.gradient_variant(
                form, call.problem.distance, own == "q", is_mean, call.capability, len(jobs)
            )
            call.launch(variant, jobs, heads, call.coefficients)
    _add_groups(call, [strip for strip in strips if strip.key_parts is not None])


def _add_groups(call: Call, strips: Sequence[Strip]) -> None:
    """dK of key heads from those of their query heads."""
    dtypes = grouped(strips, lambda strip: (strip.key_parts.dtype, strip.key_out.dtype))
    for (parts, out), group in dtypes.items():
        lines, first = [], 0
        for strip in group:
            batch, key_heads, tokens, width = strip.key_out.shape
            size, members = tokens * width, strip.key_parts.shape[1] // key_heads
            lines.append((first, strip.key_parts, strip.key_out, size, members, strip.is_added))
            first += batch * key_heads * count_blocks(size, variants.GROUP_BLOCK)
        types = _triton.TL_DTYPES[parts], _triton.TL_DTYPES[out]
        table = _triton.make_table(lines, call.device)
        variants.group_variant(*types, len(lines)).launch(first, call.device, table)
