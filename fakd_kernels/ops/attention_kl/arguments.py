"""What a call of `attention_kl` is given: checked, completed and turned into coefficients."""

import torch
from torch import Tensor

from ... import _engines, _pairs, _validate
from ..._attention import (
    DISTANCES,
    apart,
    check_causal,
    check_mask,
    check_window,
    row_scales,
    teacher_heads_of,
)

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
        check_mask(index, masks[index], lists["student_q"][index])
    _validate.check_number("temperature", temperature, minimum=0.0)
    _validate.check_choice("distance", distance, DISTANCES)
    _validate.check_scalar("weight", weight, device)
    _pairs.check_normalizer(normalizer, device)
    causal = [check_causal(label, value) for label, value in apart("causal", causal, count)]
    window = [check_window(label, value) for label, value in apart("window", window, count)]
    scales, softcaps = [], []
    for side, scale, softcap in zip(
        _SIDES, (student_scale, teacher_scale), (student_softcap, teacher_softcap), strict=True
    ):
        widths = [q.shape[-1] for q in lists[f"{side}_q"]]
        named = apart(f"{side}_scale", scale, count)
        scales.append([_scale(*entry, width) for entry, width in zip(named, widths, strict=True)])
        named = apart(f"{side}_softcap", softcap, count)
        softcaps.append([_softcap(*entry) for entry in named])
    teacher_heads = teacher_heads_of(heads, lists["student_q"], lists["teacher_q"])

    work = _pairs.work_dtype([tensor for tensors in lists.values() for tensor in tensors])
    rows = [
        (q.shape[0], q.shape[2], 1 if heads == "mean" else q.shape[1]) for q in lists["student_q"]
    ]
    weights, weights_of, scale, inverse = row_scales(
        masks, rows, pair_weights, normalizer, lists["student_q"][0], work
    )
    student_q, student_k = (
        [_pairs.rows_contiguous(t) for t in lists[name]] for name in ("student_q", "student_k")
    )
    lowered = (
        student_q,
        student_k,
        [_pairs.rows_contiguous(t.detach()) for t in lists["teacher_q"]],
        [_pairs.rows_contiguous(t.detach()) for t in lists["teacher_k"]],
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


def _scale(name: str, scale: float | None, width: int) -> float:
    if scale is None:
        return width**-0.5 if width > 0 else 1.0
    _validate.check_number(name, scale)
    return float(scale)


def _softcap(name: str, softcap: float | None) -> float:
    """0 stands for none."""
    if softcap is None:
        return 0.0
    _validate.check_number(name, softcap, minimum=0.0)
    return float(softcap)
