"""What a call of `attention_kl` is given: checked, completed and turned into coefficients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _engines, _pairs, _validate
from .problem import DISTANCES

_SIDES = ("student", "teacher")


def lower(
    student_q,
    student_k,
    teacher_q,
    teacher_k,
    mask,
    causal,
    window,
    student_scale,
    teacher_scale,
    student_softcap,
    teacher_softcap,
    temperature,
    heads,
    distance,
    weight,
    pair_weights,
    normalizer,
    engine,
) -> tuple[tuple, Tensor]:
    """The checked arguments of the registered op, and 1 / normalizer [L] for the logged means."""
    named = {
        "student_q": student_q,
        "student_k": student_k,
        "teacher_q": teacher_q,
        "teacher_k": teacher_k,
    }
    lists = {name: _validate.as_list(name, value) for name, value in named.items()}
    count = len(lists["student_q"])
    for name, tensors in lists.items():
        _validate.check_count(name, len(tensors), count)
    device = lists["student_q"][0].device
    masks = _validate.as_optional_list("mask", mask, count)
    for index in range(count):
        _check_pair(index, {name: tensors[index] for name, tensors in lists.items()}, device)
        _check_mask(index, masks[index], lists["student_q"][index])
    _validate.check_number("temperature", temperature, minimum=0.0)
    _validate.check_choice("distance", distance, DISTANCES)
    _validate.check_scalar("weight", weight, device)
    _pairs.check_normalizer(normalizer, device)
    causal = [_causal(label, value) for label, value in _apart("causal", causal, count)]
    window = [_window(label, value) for label, value in _apart("window", window, count)]
    scales, softcaps = [], []
    for side, scale, softcap in zip(
        _SIDES, (student_scale, teacher_scale), (student_softcap, teacher_softcap), strict=True
    ):
        widths = [q.shape[-1] for q in lists[f"{side}_q"]]
        named = _apart(f"{side}_scale", scale, count)
        scales.append([_scale(*entry, width) for entry, width in zip(named, widths, strict=True)])
        named = _apart(f"{side}_softcap", softcap, count)
        softcaps.append([_softcap(*entry) for entry in named])
    teacher_heads = _teacher_heads(heads, lists["student_q"], lists["teacher_q"])

    weights, weights_of = _pairs.unique(masks)
    weights = [_pairs.row_weights_of(w) for w in weights]
    work = _pairs.work_dtype([tensor for tensors in lists.values() for tensor in tensors])
    counts = []
    for index, q in enumerate(lists["student_q"]):
        compared = 1 if heads == "mean" else q.shape[1]
        if normalizer is not None:
            counts.append(normalizer)
        elif weights_of[index] >= 0:
            counts.append(weights[weights_of[index]].sum(dtype=work) * compared)
        else:
            counts.append(q.shape[0] * q.shape[2] * compared)
    inverse = _pairs.inverse(counts, lists["student_q"][0], work)
    scale = _pairs.pair_weights_of(pair_weights, count, device, work) * inverse
    student_q, student_k = (
        [_rows_contiguous(t) for t in lists[name]] for name in ("student_q", "student_k")
    )
    lowered = (
        student_q,
        student_k,
        [_rows_contiguous(t.detach()) for t in lists["teacher_q"]],
        [_rows_contiguous(t.detach()) for t in lists["teacher_k"]],
        weights,
        weight * scale,
        weights_of,
        *_pairs.wanted_gradients(student_q, student_k),
        *scales,
        *softcaps,
        causal,
        window,
        float(temperature),
        teacher_heads,
        distance,
        _engines.requested(engine) or "",
    )
    return lowered, inverse


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """Any strides, but a contiguous last axis."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _check_pair(index: int, tensors: dict[str, Tensor], device: torch.device) -> None:
    for name, tensor in tensors.items():
        label = f"{name}[{index}]"
        _validate.check_float(label, tensor)
        _validate.check_rank(label, tensor, (4,), "[B, H, T, K]")
        _validate.check_device(label, tensor, "student_q[0]", device)
    tokens = {name: (t.shape[0], t.shape[2]) for name, t in tensors.items()}
    for name, found in tokens.items():
        if found != tokens["student_q"]:
            raise ValueError(
                f"{name}[{index}] must have the batch and tokens of student_q[{index}]: got "
                f"{list(found)} and {list(tokens['student_q'])}; give both models the same tokens."
            )
    for side in _SIDES:
        q, k = tensors[f"{side}_q"], tensors[f"{side}_k"]
        if q.shape[3] != k.shape[3]:
            raise ValueError(
                f"{side}_k[{index}] must be as wide as {side}_q[{index}]: got {k.shape[3]} and "
                f"{q.shape[3]}; pass query and key of the same layer."
            )
        if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
            raise ValueError(
                f"{side}_k[{index}] must have a number of heads that divides that of "
                f"{side}_q[{index}]: got {k.shape[1]} and {q.shape[1]}; pass keys before they "
                "are repeated, or as many as queries."
            )


def _check_mask(index: int, mask: Tensor | None, q: Tensor) -> None:
    if mask is None:
        return
    label = f"mask[{index}]"
    _pairs.check_mask(label, mask)
    _validate.check_device(label, mask, "student_q[0]", q.device)
    if tuple(mask.shape) != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"{label} must have the shape [B, T] = [{q.shape[0]}, {q.shape[2]}]: got "
            f"{list(mask.shape)}; pass the padding mask, not one of T x T."
        )


def _apart(name: str, value, count: int) -> list[tuple[str, object]]:
    """The value of every pair, and what to call it: one for all, or a list with one per pair."""
    if not isinstance(value, (list, tuple)):
        return [(name, value)] * count
    _validate.check_count(name, len(value), count)
    return [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]


def _causal(name: str, causal: bool) -> bool:
    if not isinstance(causal, bool):
        raise TypeError(f"{name} must be a bool: got {type(causal).__name__}; pass True or False.")
    return causal


def _window(name: str, window: int | None) -> int:
    """-1 stands for none."""
    if window is None:
        return -1
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"{name} must be None or an int: got {type(window).__name__}; pass tokens.")
    if window < 1:
        raise ValueError(f"{name} must be at least 1: got {window}; pass None for no window.")
    return window


def _scale(name: str, scale: float | None, width: int) -> float:
    if scale is None:
        return width**-0.5
    _validate.check_number(name, scale)
    return float(scale)


def _softcap(name: str, softcap: float | None) -> float:
    """0 stands for none."""
    if softcap is None:
        return 0.0
    _validate.check_number(name, softcap, minimum=0.0)
    return float(softcap)


def _teacher_heads(
    heads: str | Sequence[int], student: list[Tensor], teacher: list[Tensor]
) -> list[int]:
    """The teacher head of every student head, pair after pair; empty where heads are averaged."""
    if isinstance(heads, str):
        _validate.check_choice("heads", heads, ("match", "mean"))
        if heads == "mean":
            return []
    result: list[int] = []
    for index, (q, t) in enumerate(zip(student, teacher, strict=True)):
        chosen = list(range(q.shape[1])) if isinstance(heads, str) else list(heads)
        if isinstance(heads, str) and q.shape[1] != t.shape[1]:
            raise ValueError(
                f"heads='match' must have equal head counts in pair {index}: got {q.shape[1]} "
                f"(student) and {t.shape[1]} (teacher); use 'mean', or a list with the teacher "
                "head of each student head."
            )
        _validate.check_count_of("heads", len(chosen), q.shape[1], f"student head of pair {index}")
        for head in chosen:
            if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < t.shape[1]:
                raise ValueError(
                    f"heads must be teacher heads from 0 to {t.shape[1] - 1} in pair {index}: got "
                    f"{head!r}; count from 0."
                )
        result += chosen
    return result
