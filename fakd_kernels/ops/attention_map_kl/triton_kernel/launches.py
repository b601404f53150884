"""From a call to launches: pairs that are alike share one, whatever their sizes."""

import torch
from torch import Tensor

from ...._triton import make_table
from ...._triton_outputs import on_device
from ...._triton_sums import reduce_slots
from ..problem import Pair, Problem
from .fields import make_line, tensor_values
from .variants import Group, maps_variant


def fill(problem: Problem) -> None:
    """Fill the sums and gradients of `problem`."""
    device = problem.coefficients.device
    groups: dict[Group, list[int]] = {}
    first_heads, heads = [], []
    for index, pair in enumerate(problem.pairs):
        groups.setdefault(Group.of(problem, pair), []).append(index)
        first_heads.append(len(heads))
        heads += pair.teacher_heads or ()
    with on_device(device):
        arguments = [make_table([[head] for head in heads], device)] if heads else []
        arguments.append(problem.coefficients.contiguous())
        if problem.are_scores:
            arguments.append(1 / problem.temperature)
        slots: dict[int, Tensor] = {}
        for group, members in groups.items():
            lines, first = [], 0
            for index in members:
                pair = problem.pairs[index]
                slots[index] = _make_slots(pair, group.tile.tokens)
                values = _pair_values(pair, first_heads[index])
                lines.append(make_line(first=first, pair=index, slots=slots[index], **values))
                first += len(slots[index])
            variant = maps_variant(group, problem.distance, len(lines))
            variant.launch(first, device, make_table(lines, device), *arguments)
        reduce_slots(
            [(pair.sums, slots[index]) for index, pair in enumerate(problem.pairs)], device
        )


def _make_slots(pair: Pair, rows: int) -> Tensor:
    """One for every program: by compared head, batch entry and block of rows."""
    batch, _, tokens, _ = pair.student.shape
    programs = len(pair.sums) * batch * -(-tokens // rows)
    return torch.empty(programs, dtype=torch.float64, device=pair.student.device)


def _pair_values(pair: Pair, first_head: int) -> dict[str, int | Tensor | None]:
    batch, heads, tokens, _ = pair.student.shape
    behind = tokens if pair.window is None else min(pair.window - 1, tokens)
    return {
        "weights": pair.row_weights,
        "tokens": tokens,
        "heads": heads,
        "teacher_heads": pair.teacher.shape[1] if pair.teacher_heads is None else first_head,
        "behind": behind,
        "ahead": 0 if pair.is_causal else behind,
        "batches": batch,
        **tensor_values("student", pair.student),
        **tensor_values("teacher", pair.teacher),
        **tensor_values("grad", pair.grad),
    }
