"""What a call of `feature_alignment` is given: checked, flattened and turned into coefficients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _engines, _validate

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
    if normalizer is not None:
        _validate.check_scalar("normalizer", normalizer, device)
        if not isinstance(normalizer, Tensor):
            _validate.check_number("normalizer", normalizer, minimum=0.0)

    work = call.work_dtype()
    inverse = call.inverse_normalizers(normalizer, work)
    scale = pair_weights_of(pair_weights, len(call.student), device, work) * inverse
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
        *call.wanted_gradients(),
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
        unique_projections, projection_of = _unique(projections)
        unique_biases, bias_of = _unique(biases)
        unique_masks, row_weights_of = _unique(masks)
        if torch.is_autocast_enabled(device.type):  # what F.linear does to its arguments
            half = torch.get_autocast_dtype(device.type)
            students = [
                tensor if weight is None else _autocast(tensor, half)
                for tensor, weight in zip(students, projections, strict=True)
            ]
            unique_projections = [_autocast(tensor, half) for tensor in unique_projections]
            unique_biases = [_autocast(tensor, half) for tensor in unique_biases]
        return Arguments(
            [_rows(tensor) for tensor in students],
            [_rows(tensor.detach()) for tensor in teachers],
            [tensor.contiguous() for tensor in unique_projections],
            [tensor.contiguous() for tensor in unique_biases],
            [tensor.detach().reshape(-1).float().contiguous() for tensor in unique_masks],
            projection_of,
            bias_of,
            row_weights_of,
        )

    def wanted_gradients(self) -> tuple[list[bool], list[bool], list[bool]]:
        """For each student, projection and bias: whether autograd will ask for its gradient."""
        is_grad = torch.is_grad_enabled()
        return tuple(
            [is_grad and tensor.requires_grad for tensor in tensors]
            for tensors in (self.student, self.projections, self.biases)
        )

    def work_dtype(self) -> torch.dtype:
        """float32, or float64 where any tensor is."""
        tensors = (*self.student, *self.teacher, *self.projections, *self.biases)
        is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
        return torch.float64 if is_double else torch.float32

    def inverse_normalizers(self, normalizer: float | Tensor | None, work: torch.dtype) -> Tensor:
        """[L]: 1 / normalizer of each pair, 0 where nothing counts."""
        like = self.student[0]
        counts = []
        for tensor, index in zip(self.student, self.row_weights_of, strict=True):
            if normalizer is not None:
                count = normalizer
            elif index >= 0:
                count = self.row_weights[index].sum()
            else:
                count = tensor.shape[0]
            counts.append(count)
        if any(isinstance(count, Tensor) for count in counts):
            tensors = [
                count.to(work).reshape(())
                if isinstance(count, Tensor)
                else like.new_full((), count, dtype=work)
                for count in counts
            ]
            count = torch.stack(tensors)
            return torch.where(count == 0, 0, 1 / torch.where(count == 0, 1, count))
        inverse = [1.0 / count if count != 0 else 0.0 for count in counts]
        return torch.tensor(inverse, dtype=work, device=like.device)


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
        if mask.dtype != torch.bool:
            if not mask.is_floating_point():
                raise TypeError(
                    f"{name['mask']} must be bool or floating-point row weights: got "
                    f"{mask.dtype}; convert an attention mask with .bool()."
                )
            _validate.check_float(name["mask"], mask)
        _validate.check_device(name["mask"], mask, "student[0]", device)
        if mask.shape != student.shape[:-1] and mask.shape != (student.shape[:-1].numel(),):
            raise ValueError(
                f"{name['mask']} must have one weight per token of {name['student']}: got "
                f"{list(mask.shape)} for {list(student.shape[:-1])}; pass [B, T] or [N]."
            )


def pair_weights_of(weights, count: int, device: torch.device, work: torch.dtype) -> Tensor:
    """[L]."""
    if weights is None:
        return torch.full((count,), 1.0 / count, dtype=work, device=device)
    if isinstance(weights, Tensor):
        _validate.check_float("pair_weights", weights)
        _validate.check_device("pair_weights", weights, "student[0]", device)
        if tuple(weights.shape) != (count,):
            raise ValueError(
                f"pair_weights must have the shape [L] = [{count}]: got {list(weights.shape)}; "
                "pass one weight per layer pair."
            )
        return weights.to(work)
    _validate.check_count("pair_weights", len(weights), count)
    for index, weight in enumerate(weights):
        _validate.check_number(f"pair_weights[{index}]", weight)
    return torch.tensor([float(weight) for weight in weights], dtype=work, device=device)


def _autocast(tensor: Tensor, half: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(half)


def _rows(tensor: Tensor) -> Tensor:
    """[N, D] with a contiguous last axis: a view where the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _unique(tensors: list[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """The distinct tensors, by identity, and each entry's place among them (-1 for None)."""
    distinct: list[Tensor] = []
    places = []
    for tensor in tensors:
        place = -1
        if tensor is not None:
            matches = [i for i, known in enumerate(distinct) if known is tensor]
            place = matches[0] if matches else len(distinct)
            if not matches:
                distinct.append(tensor)
        places.append(place)
    return distinct, places
