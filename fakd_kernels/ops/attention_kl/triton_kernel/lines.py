"""From a layer pair to the line of a table: which rows are own, and how far they reach."""

import math

from torch import Tensor

from ..problem import Pair, Problem, Side

LOG2_E = 1 / math.log(2)


def pair_values(
    problem: Problem, index: int, own: str, strip: tuple[int, int] | None = None
) -> dict[str, int | float | Tensor | None]:
    """Fields of a pair whose own rows are its queries ("q") or keys ("k").

    `strip` restricts its queries to [begin, end).
    """
    pair = problem.pairs[index]
    tokens = pair.student.q.shape[2]
    back = tokens if pair.window is None else min(pair.window - 1, tokens)
    ahead = 0 if pair.is_causal else back
    queries, keys = strip or (0, tokens), (0, tokens)
    is_of_queries = own == "q"
    (begin, end), (lower, upper) = (queries, keys) if is_of_queries else (keys, queries)
    # A key sees its queries in a mirror: those behind it are ahead.
    before, after = (back, ahead) if is_of_queries else (ahead, back)
    return {
        "pair": index,
        "weights": pair.row_weights,
        "tokens": tokens,
        "begin": begin,
        "end": end,
        "lower": lower,
        "upper": upper,
        "before": before,
        "after": after,
        "batches": pair.student.q.shape[0],
        "factor": _factor(problem, pair),
        **side_values("student", pair.student, problem.temperature, own),
        **side_values("teacher", pair.teacher, problem.temperature, own),
    }


def side_values(name: str, side: Side, temperature: float, own: str) -> dict:
    group = side.q.shape[1] // side.k.shape[1]
    q, k = (side.q, 1), (side.k, group)
    (own_rows, own_group), (other_rows, other_group) = (q, k) if own == "q" else (k, q)
    if side.softcap is None:
        inner, outer = side.scale * LOG2_E / temperature, 1.0
    else:
        inner, outer = side.scale / side.softcap, side.softcap * LOG2_E / temperature
    values = {
        **_rows("own", own_rows),
        **_rows("other", other_rows),
        "heads": side.q.shape[1],
        "own_group": own_group,
        "other_group": other_group,
        "width": side.q.shape[3],
        "inner": inner,
        "outer": outer,
    }
    return {f"{name}_{key}": value for key, value in values.items()}


def _rows(name: str, tensor: Tensor) -> dict:
    batch, head, token, _ = tensor.stride()
    return {name: tensor, f"{name}_batch": batch, f"{name}_head": head, f"{name}_token": token}


def _factor(problem: Problem, pair: Pair) -> float:
    """Of a gradient: natural scores by q.k, the kernels' unit, and the share of a head."""
    unit = math.log(2) if problem.distance in ("reverse_kl", "jsd") else 1.0
    heads = pair.student.q.shape[1] if pair.teacher_heads is None else 1
    return pair.student.scale / problem.temperature * unit / heads
