"""What a call of `feature_alignment` is given: checked, flattened and turned into coefficients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _engines, _pairs, _validate

EUCLIDEAN = ("squared", "distance")
ROUTES = ("auto", "direct", "gram")


def lower(
    student,
    teacher,
    projection,
    bias,
    mask,
    cosine_weight,
    euclidean_weight,
    euclidean,
    pair_weights,
    normalizer,
    eps,
    route,
    engine,
) -> tuple[tuple, Tensor]:
    """The checked arguments of the registered op, and 1 / normalizer [L] for the logged means."""
    call = Arguments.of(student, teacher, projection, bias, mask)
    device = call.student[0].device
    _validate.check_choice("euclidean", euclidean, EUCLIDEAN)
    _validate.check_choice("route", route, ROUTES)
    _validate.check_number("eps", eps, minimum=0.0)
    _validate.check_scalar("cosine_weight", cosine_weight, device)
    _validate.check_scalar("euclidean_weight", euclidean_weight, device)
    _pairs.check_normalizer(normalizer, device)

    work = _pairs.work_dtype((*call.student, *call.teacher, *call.projections, *call.biases))
    inverse = call.inverse_normalizers(normalizer, work)
    scale = _pairs.pair_weights_of(pair_weights, len(call.student), device, work) * inverse
    lowered = (
        call.student,
        call.teacher,
        call.projections,
        call.biases,
        call.row_weights,
        torch.stack([cosine_weight * scale, euclidean_weight * scale], dim=1),
        call.projection_of,
        call.bias_of,
        call.row_weights_of,
        *_pairs.wanted_gradients(call.student, call.projections, call.biases),
        float(eps),
        euclidean,
        route,
        _engines.requested(engine) or "",
    )
    return lowered, inverse


@dataclass(frozen=True)
class Arguments:
    """Checked arguments: rows flattened, shared tensors listed once and referred to by index."""

    student: list[Tensor]
    teacher: list[Tensor]
    projections: list[Tensor]
    biases: list[Tensor]
    row_weights: list[Tensor]
    projection_of: list[int]
    bias_of: list[int]
    row_weights_of: list[int]

    @staticmethod
    def of(student, teacher, projection, bias, mask) -> "Arguments":
        students = _validate.as_list("student", student)
        teachers = _validate.as_list("teacher", teacher)
        count = len(students)
        _validate.check_count("teacher", len(teachers), count)
        projections = _validate.as_optional_list("projection", projection, count)
        biases = _validate.as_optional_list("bias", bias, count)
        masks = _validate.as_optional_list("mask", mask, count)
        device = students[0].device
        for index in range(count):
            _check_pair(
                index,
                students[index],
                teachers[index],
                projections[index],
                biases[index],
                masks[index],
                device,
            )
        unique_projections, projection_of = _pairs.unique(projections)
        unique_biases, bias_of = _pairs.unique(biases)
        unique_masks, row_weights_of = _pairs.unique(masks)
        students = [
            tensor if weight is None else _pairs.autocast(tensor)
            for tensor, weight in zip(students, projections, strict=True)
        ]
        unique_projections = [_pairs.autocast(tensor) for tensor in unique_projections]
        unique_biases = [_pairs.autocast(tensor) for tensor in unique_biases]
        return Arguments(
            [_pairs.flat(tensor) for tensor in students],
            [_pairs.flat(tensor.detach()) for tensor in teachers],
            [tensor.contiguous() for tensor in unique_projections],
            [tensor.contiguous() for tensor in unique_biases],
            [_pairs.row_weights_of(tensor.reshape(-1)) for tensor in unique_masks],
            projection_of,
            bias_of,
            row_weights_of,
        )

    def inverse_normalizers(self, normalizer: float | Tensor | None, work: torch.dtype) -> Tensor:
        """[L]: 1 / normalizer of each pair, 0 where nothing counts."""
        counts = []
        for tensor, index in zip(self.student, self.row_weights_of, strict=True):
            if normalizer is not None:
                count = normalizer
            elif index >= 0:
                count = self.row_weights[index].sum(dtype=work)
            else:
                count = tensor.shape[0]
            counts.append(count)
        return _pairs.inverse(counts, self.student[0], work)


def _check_pair(index, student, teacher, projection, bias, mask, device) -> None:
    name = {key: f"{key}[{index}]" for key in ("student", "teacher", "projection", "bias", "mask")}
    for key, tensor in (("student", student), ("teacher", teacher)):
        _validate.check_float(name[key], tensor)
        _validate.check_rank(name[key], tensor, (2, 3), "[B, T, D] or [N, D]")
        _validate.check_device(name[key], tensor, "student[0]", device)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{name['teacher']} must have the same tokens as {name['student']}: got "
            f"{list(teacher.shape[:-1])} and {list(student.shape[:-1])}; drop the extra positions."
        )
    student_width, teacher_width = student.shape[-1], teacher.shape[-1]
    if projection is None:
        if student_width != teacher_width:
            raise ValueError(
                f"{name['projection']} must be given where the widths differ: got "
                f"{student_width} (student) and {teacher_width} (teacher); pass a tensor of shape "
                f"[{teacher_width}, {student_width}]."
            )
        if bias is not None:
            raise ValueError(
                f"{name['bias']} must come with a projection: got a bias alone; "
                "pass projection too, or add the bias to the student."
            )
    else:
        _validate.check_float(name["projection"], projection)
        _validate.check_device(name["projection"], projection, "student[0]", device)
        if tuple(projection.shape) != (teacher_width, student_width):
            raise ValueError(
                f"{name['projection']} must have the shape [Dt, Ds] = [{teacher_width}, "
                f"{student_width}]: got {list(projection.shape)}; nn.Linear(Ds, Dt).weight fits."
            )
    if bias is not None:
        _validate.check_float(name["bias"], bias)
        _validate.check_device(name["bias"], bias, "student[0]", device)
        if tuple(bias.shape) != (teacher_width,):
            raise ValueError(
                f"{name['bias']} must have the shape [Dt] = [{teacher_width}]: got "
                f"{list(bias.shape)}; nn.Linear(Ds, Dt).bias fits."
            )
    if mask is not None:
        _pairs.check_mask(name["mask"], mask)
        _validate.check_device(name["mask"], mask, "student[0]", device)
        if mask.shape != student.shape[:-1] and mask.shape != (student.shape[:-1].numel(),):
            raise ValueError(
                f"{name['mask']} must have one weight per token of {name['student']}: got "
                f"{list(mask.shape)} for {list(student.shape[:-1])}; pass [B, T] or [N]."
            )
