"""Lays out a call as steps on the device: how pairs are grouped, and which buffers they share.

Pairs without a projection: one launch for all pairs of equal dtypes and equal padded width.
Others: pairs of equal dtypes make one group, and every step of a group is one launch.

    gram    G = W^T W -> U = T W, V = X G -> rows: values, dX
            -> dW = T^T diag(b) X + W (X^T diag(a) X)
    direct  per chunk: list rows -> P = X W^T -> rows: values, dP -> dX = dP W -> dW += dP^T X

A chunk holds as many rows, of any pairs, as fit a block of P that stays in L2. The chunks of the
gram pairs hold the rows whose sums cancel there (`gram_rows_kernel`). Only the device knows which,
so every chunk is launched, and the tiles of one without such a row end at once.

A plan is made on the device, or on "meta", where buffers have no memory, to be described only.
"""

import itertools
from functools import partial

import torch

from .... import _triton
from ..problem import Pair, Problem
from . import direct, gram, tiles, variants
from .group import Group, Key, Shared
from .steps import Member, Step, Steps, name_pairs


def plan(problem: Problem, device: torch.device) -> list[Step]:
    """The steps that fill `problem`, with their buffers on `device`."""
    slots = list(itertools.accumulate(map(_count_slots, problem.pairs), initial=0))
    steps = Steps(problem, device, slots)
    members = [Member(index, pair) for index, pair in enumerate(problem.pairs)]
    _add_rows(steps, [member for member in members if member.pair.route == "none"])
    projected = [member for member in members if member.pair.route != "none"]
    if projected:
        _add_projected(steps, projected)
    lines = [(first, end - first) for first, end in itertools.pairwise(slots)]
    steps.launch(
        "values: sum the slots of each pair",
        variants.reduce_variant(),
        len(lines),
        problem.sums,
        steps.partial,
        lines,
    )
    return steps.steps


def _count_slots(pair: Pair) -> int:
    """Slots for the values of a pair: one for each program of its row kernels."""
    n, width = pair.teacher.shape
    if pair.route == "none":
        return tiles.count_blocks(n, tiles.align_block(width)[0])
    return direct.count_slots(n, width) + (tiles.gram_blocks(n) if pair.route == "gram" else 0)


def _add_rows(steps: Steps, members: list[Member]) -> None:
    """Pairs without a projection."""
    groups: dict[tuple, list[Member]] = {}
    for member in members:
        x, t = member.pair.student, member.pair.teacher
        block = tiles.align_block(x.shape[1])
        is_wide = x.shape[1] > block[1]
        is_aligned = _triton.is_aligned(x) and _triton.is_aligned(t)
        groups.setdefault((x.dtype, t.dtype, block, is_wide, is_aligned), []).append(member)
    for (x_dtype, t_dtype, block, is_wide, is_aligned), group in groups.items():
        variant = variants.align_variant(
            x_dtype,
            t_dtype,
            variants.grad_type(x_dtype),
            block,
            is_wide,
            False,
            steps.problem.is_squared,
            _triton.next_power_of_2(len(group)),
            is_aligned,
        )
        lines, first = [], 0
        for index, pair in group:
            (n, width), x, t = pair.student.shape, pair.student, pair.teacher
            fields = (first, index, x, t, pair.row_weights, pair.grad_student, n, width)
            fields += (x.stride(0), t.stride(0), steps.slots[index], None, None)
            lines.append(fields)
            first += tiles.count_blocks(n, block[0])
        words = f"{name_pairs(group)} without a projection, value and gradient"
        steps.launch_rows(words, variant, first, lines)


def _add_projected(steps: Steps, members: list[Member]) -> None:
    shared = Shared(steps, members)
    masked = [
        pair.grad_student
        for _, pair in members
        if pair.route == "direct" and pair.row_weights is not None and pair.grad_student is not None
    ]
    if masked:
        steps.add("gradients of rows of weight 0", partial(torch._foreach_zero_, masked))
    groups: dict[Key, list[Member]] = {}
    for member in members:
        groups.setdefault(Key.of(member.pair), []).append(member)
    for key, own in groups.items():
        group = Group(steps, shared, key)
        rows = [(m, m.pair.row_weights) for m in own if m.pair.route == "direct"]
        rows += gram.add_steps(group, [m for m in own if m.pair.route == "gram"])
        direct.add_steps(group, rows)
    shared.add_results()
