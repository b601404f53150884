"""The gram route: values and gradients from U = T W and V = X (W^T W), without P."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .... import _triton
from ..problem import Pair
from . import tiles, variants
from .group import Group
from .steps import Member, name_pairs


class _Square(NamedTuple):
    """What a projection and its bias give to every row."""

    gram: Tensor  # G = W^T W, [terms, Ds, Ds]
    shift: Tensor  # c = W^T b, [Ds]
    bias_square: Tensor  # b.b, [1]


class _State(NamedTuple):
    """A pair, and what is kept of it between steps."""

    index: int
    pair: Pair
    square: _Square
    teacher_sums: Tensor  # [2 + tiles, N]
    student_sums: Tensor  # [2 + tiles, N]
    scales: Tensor  # [3, N]: a, b, is_cancelled
    u: Tensor | None  # [N, Ds], as is v; None where the student wants no gradient
    v: Tensor | None


def add_steps(group: Group, members: list[Member]) -> list[tuple[Member, Tensor]]:
    """Returns the members, each with what is 1 for the rows that are left to the direct route."""
    if not members:
        return []
    squares = _add_squares(group, members)
    tile = tiles.choose_tile(group.capability, group.dtypes.gram, has_sums=True)
    empty, states = group.steps.empty, []
    for index, pair in members:
        n, width = pair.student.shape
        planes = 2 + tiles.count_blocks(width, tile.n)
        states.append(
            _State(
                index,
                pair,
                squares[pair.projection_index, pair.bias_index],
                teacher_sums=empty(planes, n),
                student_sums=empty(planes, n),
                scales=empty(3, n),
                u=None if pair.grad_student is None else empty(n, width),
                v=None if pair.grad_student is None else empty(n, width),
            )
        )
    _add_statistics(group, states)
    _add_rows(group, states)
    _add_projection_gradients(group, states)
    _add_bias_gradients(group, states)
    return [(Member(state.index, state.pair), state.scales[2]) for state in states]


def _add_squares(group: Group, members: list[Member]) -> dict[tuple[int, int], _Square]:
    """By projection and bias."""
    steps, shared, dtypes = group.steps, group.shared, group.dtypes
    grams: dict[int, Tensor] = {}
    results, jobs, sums = {}, [], []
    for _, pair in members:
        w, (height, width) = pair.projection, pair.projection.shape
        place = pair.projection_index, pair.bias_index
        if pair.projection_index not in grams:
            gram = steps.empty(dtypes.terms, width, width, dtype=dtypes.gram_dtype)
            grams[pair.projection_index] = gram
            jobs.append((gram, False, [(w, w, height, width, width, None, None, None)]))
        if place in results:
            continue
        gram = grams[pair.projection_index]
        if pair.bias is None:
            results[place] = _Square(gram, shared.zeros, shared.zeros)
        else:
            bias = shared.bias(pair)
            results[place] = _Square(gram, steps.empty(width), steps.empty(1))
            sums.append((results[place].shift, False, [(w, width, height, bias, None)]))
            square = results[place].bias_square
            steps.add("b.b", partial(torch.linalg.vecdot, bias[None], bias[None], out=square))
    group.launch_outer("G = W^T W", "gram", jobs)
    group.launch_column_sums("c = W^T b", dtypes.w, sums)
    return results


def _add_statistics(group: Group, states: list[_State]) -> None:
    """U and V, with the sums of their rows."""
    teacher, student = [], []
    for state in states:
        pair, (n, width) = state.pair, state.pair.student.shape
        x, t, weights = pair.student, pair.teacher, pair.row_weights
        fields = (t, pair.projection, x, state.u, state.teacher_sums, weights)
        fields += (group.shared.bias(pair), n, width, t.shape[1], t.stride(0), x.stride(0))
        teacher.append((n, width, fields))
        fields = (x, state.square.gram, x, state.v, state.student_sums, weights)
        fields += (state.square.shift, n, width, width, x.stride(0), x.stride(0))
        student.append((n, width, fields))
    make, pairs = variants.statistics_variant, name_pairs(states)
    group.launch_product(f"{pairs}, U = T W with row sums", make, True, teacher)
    group.launch_product(f"{pairs}, V = X (W^T W) with row sums", make, False, student)


def _add_rows(group: Group, states: list[_State]) -> None:
    lines, first = [], 0
    for state in states:
        pair, (n, width) = state.pair, state.pair.student.shape
        sum_tiles = state.teacher_sums.shape[0] - 2
        fields = (first, state.index, n, width, pair.teacher.shape[1], sum_tiles, pair.row_weights)
        fields += (state.teacher_sums, state.student_sums)
        fields += (state.square.shift, state.square.bias_square, state.u, state.v)
        fields += (pair.grad_student, state.scales, group.steps.slots[state.index])
        lines.append(fields)
        first += tiles.gram_blocks(n)
    variant = variants.gram_rows_variant(
        group.dtypes.x,
        group.dtypes.cancelled,
        not group.dtypes.is_half,
        group.problem.is_squared,
        _triton.next_power_of_2(len(lines)),
        group.is_aligned,
    )
    group.steps.launch_rows(f"{name_pairs(states)}, values and dX", variant, first, lines)


def _add_projection_gradients(group: Group, states: list[_State]) -> None:
    """dW = T^T diag(b) X + W (X^T diag(a) X); `_add_bias_gradients` adds what the bias does."""
    shared, dtypes = group.shared, group.dtypes
    users: dict[int, list[_State]] = {}
    for state in states:
        if group.problem.wants_projection(state.pair):
            users.setdefault(state.pair.projection_index, []).append(state)
    inner_jobs, scaled_jobs, lines = [], [], []
    for index, own in users.items():
        w = own[0].pair.projection
        height, width = w.shape
        total = shared.totals["projection", index]
        inner = group.steps.empty(dtypes.terms, width, width, dtype=dtypes.gram_dtype)
        segments = [_segment(s.pair.student, s.pair.student, s.scales[0]) for s in own]
        inner_jobs.append((inner, False, segments))
        segments = [_segment(s.pair.teacher, s.pair.student, s.scales[1]) for s in own]
        scaled_jobs.append((total, shared.claim("projection", index), segments))
        fields = (w, inner, total, None, height, width, width, width, None, None)
        lines.append((height, width, fields))
    group.launch_outer("X^T diag(a) X", "inner", inner_jobs)
    group.launch_outer("dW = T^T diag(b) X", "scaled", scaled_jobs)
    make = variants.product_variant
    group.launch_product("dW += W (X^T diag(a) X)", make, "add", lines)


def _segment(left: Tensor, right: Tensor, scale: Tensor) -> tuple:
    return left, right, left.shape[0], left.stride(0), right.stride(0), scale, None, None


def _add_bias_gradients(group: Group, states: list[_State]) -> None:
    """db = T^T b + W (X^T a) + bias sum(a), and dW += bias (X^T a)^T."""
    problem, shared, dtypes = group.problem, group.shared, group.dtypes
    terms, x_jobs = [], []
    t_segments: dict[int, list] = {}
    for state in states:
        pair, a, b = state.pair, state.scales[0], state.scales[1]
        x, t = pair.student, pair.teacher
        if pair.bias is None:
            continue
        if problem.wants_bias(pair) or problem.wants_projection(pair):
            x_sum = group.steps.empty(x.shape[1])
            x_jobs.append((x_sum, False, [(x, x.stride(0), x.shape[0], a, None)]))
            grad_projection = shared.totals.get(("projection", pair.projection_index))
            grad_bias = shared.totals.get(("bias", pair.bias_index))
            bias = shared.bias(pair)
            terms.append((grad_projection, grad_bias, pair.projection, bias, a, x_sum))
        if problem.wants_bias(pair):
            segment = (t, t.stride(0), t.shape[0], b, None)
            t_segments.setdefault(pair.bias_index, []).append(segment)
    group.launch_column_sums("X^T a", dtypes.x, x_jobs)
    t_jobs = [
        (shared.totals["bias", index], shared.claim("bias", index), segments)
        for index, segments in t_segments.items()
    ]
    group.launch_column_sums("db = T^T b", dtypes.t, t_jobs)
    for arguments in terms:
        group.steps.add("terms of the bias in dW and db", partial(_add_bias_terms, *arguments))


def _add_bias_terms(
    grad_projection: Tensor | None,
    grad_bias: Tensor | None,
    projection: Tensor,
    bias: Tensor,
    a: Tensor,
    x_sum: Tensor,
) -> None:
    """Small products left to torch: nothing to fuse, and 1 / N of the work around them."""
    if grad_projection is not None:
        grad_projection.addr_(bias, x_sum)
    if grad_bias is not None:
        grad_bias.addmv_(projection.float(), x_sum)
        grad_bias.addcmul_(bias, a.sum())
