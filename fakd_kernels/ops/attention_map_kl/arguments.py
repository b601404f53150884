"""What a call of `attention_map_kl` is given: checked, completed and turned into coefficients."""

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
from .problem import INPUTS


def lower(
    student_maps,
    teacher_maps,
    mask,
    causal,
    window,
    inputs,
    temperature,
    heads,
    distance,
    weight,
    pair_weights,
    normalizer,
    engine,
) -> tuple[tuple, Tensor]:
    """The checked arguments of the registered op, and 1 / normalizer [L] for the logged means."""
    student = _validate.as_list("student_maps", student_maps)
    teacher = _validate.as_list("teacher_maps", teacher_maps)
    count = len(student)
    _validate.check_count("teacher_maps", len(teacher), count)
    device = student[0].device
    masks = _validate.as_optional_list("mask", mask, count)
    for index in range(count):
        _check_pair(index, student[index], teacher[index], device)
        check_mask(index, masks[index], student[index])
    _validate.check_choice("inputs", inputs, INPUTS)
    _validate.check_choice("distance", distance, DISTANCES)
    _validate.check_number("temperature", temperature, minimum=0.0)
    if inputs == "probabilities" and temperature != 1:
        raise ValueError(
            f"temperature must be 1 for inputs='probabilities': got {temperature}; pass scores."
        )
    _validate.check_scalar("weight", weight, device)
    _pairs.check_normalizer(normalizer, device)
    causal = [check_causal(label, value) for label, value in apart("causal", causal, count)]
    window = [check_window(label, value) for label, value in apart("window", window, count)]
    teacher_heads = teacher_heads_of(heads, student, teacher)
    rows = [(s.shape[0], s.shape[2], 1 if heads == "mean" else s.shape[1]) for s in student]
    work = _pairs.work_dtype([*student, *teacher])
    weights, weights_of, scale, inverse = row_scales(
        masks, rows, pair_weights, normalizer, student[0], work
    )
    student = [_pairs.rows_contiguous(s) for s in student]
    lowered = (
        student,
        [_pairs.rows_contiguous(t.detach()) for t in teacher],
        weights,
        weight * scale,
        weights_of,
        *_pairs.wanted_gradients(student),
        causal,
        window,
        inputs == "scores",
        float(temperature),
        teacher_heads,
        distance,
        _engines.requested(engine) or "",
    )
    return lowered, inverse


def _check_pair(index: int, student: Tensor, teacher: Tensor, device: torch.device) -> None:
    for name, maps in (("student_maps", student), ("teacher_maps", teacher)):
        label = f"{name}[{index}]"
        _validate.check_float(label, maps)
        _validate.check_rank(label, maps, (4,), "[B, H, T, T]")
        _validate.check_device(label, maps, "student_maps[0]", device)
        if maps.shape[2] != maps.shape[3]:
            raise ValueError(
                f"{label} must have as many keys as queries: got {list(maps.shape)}; pass maps of "
                "self-attention without a cache."
            )
    if (student.shape[0], student.shape[2]) != (teacher.shape[0], teacher.shape[2]):
        raise ValueError(
            f"teacher_maps[{index}] must have the batch and tokens of student_maps[{index}]: got "
            f"{list(teacher.shape)} and {list(student.shape)}; give both models the same tokens."
        )
