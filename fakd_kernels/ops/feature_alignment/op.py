"""Feature alignment: the public function, and the registered op beneath it.

    p = h_S W^T + b
    L = sum_l pair_weight_l / normalizer_l * sum_i w_i (cosine_weight (1 - cos(p_i, t_i))
                                                        + euclidean_weight distance(p_i, t_i))

`fakd::feature_alignment` computes the value and every wanted gradient in one pass; backward only
scales the gradients by the incoming scalar. Engines fill buffers that are allocated here, so one
fake implementation is true of all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import _engines, _extension, _validate
from ..._backward import scale_gradients
from . import cpu, reference, triton_kernel
from .problem import Pair, Problem, choose_route, count_flops, grad_dtype, pick

EUCLIDEAN = ("squared", "distance")
ROUTES = ("auto", "direct", "gram")


@dataclass(frozen=True)
class FeatureAlignment:
    """The result of `feature_alignment`; a pytree. Only `loss` carries a gradient."""

    loss: Tensor  # []
    cosine: Tensor  # [L], detached: weighted mean of 1 - cos
    euclidean: Tensor  # [L], detached: weighted mean of the Euclidean term


pytree.register_dataclass(FeatureAlignment)


def feature_alignment(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    projection: Tensor | Sequence[Tensor | None] | None = None,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    cosine_weight: float | Tensor = 1.0,
    euclidean_weight: float | Tensor = 1.0,
    euclidean: str = "squared",
    pair_weights: Sequence[float] | Tensor | None = None,
    normalizer: float | Tensor | None = None,
    eps: float = 1e-8,
    route: str = "auto",
    engine: str | None = None,
) -> FeatureAlignment:
    """Align hidden states with a teacher's, over many layer pairs in one call.

    Equivalent to, summed over the layer pairs with `pair_weights`:

        p = F.linear(student, projection, bias)
        cosine = (1 - F.cosine_similarity(p, teacher, dim=-1)).mean()
        euclidean = (p - teacher).square().mean()    # or (p - teacher).norm(dim=-1).mean()
        loss = cosine_weight * cosine + euclidean_weight * euclidean

    without storing p, and with the gradients computed in the same pass as the value.

    Args:
        student: one tensor per pair, `[B, T, Ds]` or `[N, Ds]`, float16 | bfloat16 | float32 |
            float64 (reference engine only). A single tensor is one pair. Copied if the last axis
            is not contiguous or the leading axes cannot be viewed as one.
        teacher: one tensor per pair, `[B, T, Dt]` or `[N, Dt]`; any of these dtypes, pair by pair.
            Never receives a gradient, even where it requires one.
        projection: one tensor per pair, `[Dt, Ds]` (`nn.Linear` layout), or None where Ds = Dt.
            The same tensor may serve several pairs; its gradient is the sum.
        bias: one tensor per pair, `[Dt]`, or None. Needs a projection.
        mask: `[B, T]` or `[N]`, bool or float row weights >= 0 (negative weights are refused on
            a CPU; on a GPU the check would stall the stream). One for all pairs, or one per pair.
            Rows of weight 0 count nowhere and are not read: a NaN there does no harm.
        cosine_weight: number, or a 0-dim tensor, which receives its gradient (learned weight).
        euclidean_weight: likewise.
        euclidean: "squared": |p - t|^2 / Dt; "distance": |p - t| (gradient 0 where p = t).
        pair_weights: L numbers or a tensor `[L]`; default 1 / L each.
        normalizer: what the weighted row sums are divided by, > 0; default the sum of the row
            weights of the pair. Pass the global count for gradient accumulation or data parallelism.
        eps: > 0. Norms are clamped at it, as in `F.cosine_similarity`.
        route: "auto" | "direct" | "gram", the order of the matrix products (see `count_flops`).
        engine: None, or "reference" | "cpu" | "triton" to force one. `FAKD_ENGINE` likewise.

    Returns:
        `FeatureAlignment`: loss [], cosine [L] and euclidean [L] (the last two detached), float32
        (float64 for float64 inputs).
        All rows masked, or no rows at all: loss 0 and gradients 0.

    Raises:
        ValueError: shapes, ranges, devices or list lengths. TypeError: dtypes or types.
        RuntimeError: a forced engine cannot serve; a second derivative is asked for.

    Numerics:
        Products and sums accumulate in float32 (float64 for float64 inputs). Gradients have the
        dtype of their tensor; those of float16 tensors stay in float32 until backward, so they do
        not underflow before a loss scaler's factor reaches them. The gram route returns to the
        direct one for rows where |p - t|^2 would cancel. Deterministic on every engine. NaN and
        inf in counted rows reach the loss. Zero rows: cosine 0, finite gradients.

    Source:
        L_feat and L_dist of arXiv 2412.19449. The gradient form dL/dp = A p + B t is derived in
        `reference.row_terms`.
    """
    call = _Call.of(student, teacher, projection, bias, mask)
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
    pairs = _pair_weights(pair_weights, len(call.student), device, work)

    inverse = call.inverse_normalizers(normalizer, work)  # [L]
    scale = pairs * inverse
    coefficients = torch.stack([cosine_weight * scale, euclidean_weight * scale], dim=1)
    is_grad = torch.is_grad_enabled()
    loss, sums, _ = torch.ops.fakd.feature_alignment(
        call.student,
        call.teacher,
        call.projections,
        call.biases,
        call.row_weights,
        coefficients,
        call.projection_of,
        call.bias_of,
        call.row_weights_of,
        [is_grad and tensor.requires_grad for tensor in call.student],
        [is_grad and tensor.requires_grad for tensor in call.projections],
        [is_grad and tensor.requires_grad for tensor in call.biases],
        float(eps),
        euclidean,
        route,
        _engines.requested(engine) or "",
    )
    means = sums.detach() * inverse.detach()[:, None]
    return FeatureAlignment(loss, means[:, 0], means[:, 1])


@dataclass(frozen=True)
class _Call:
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
    def of(student, teacher, projection, bias, mask) -> "_Call":
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
        return _Call(
            [_rows(tensor) for tensor in students],
            [_rows(tensor.detach()) for tensor in teachers],
            [tensor.contiguous() for tensor in unique_projections],
            [tensor.contiguous() for tensor in unique_biases],
            [tensor.detach().reshape(-1).float().contiguous() for tensor in unique_masks],
            projection_of,
            bias_of,
            row_weights_of,
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


def _pair_weights(weights, count: int, device: torch.device, work: torch.dtype) -> Tensor:
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


torch.library.define(
    "fakd::feature_alignment",
    "(Tensor[] student, Tensor[] teacher, Tensor[] projections, Tensor[] biases, "
    "Tensor[] row_weights, Tensor coefficients, int[] projection_of, int[] bias_of, "
    "int[] row_weights_of, bool[] wants_student, bool[] wants_projection, bool[] wants_bias, "
    "float eps, str euclidean, str route, str engine) -> (Tensor, Tensor, Tensor[])",
)


def _allocate(student, projections, biases, wants_student, wants_projection, wants_bias):
    """One gradient buffer per wanted tensor, None elsewhere, for each of the three lists."""
    return tuple(
        [
            torch.empty(tensor.shape, dtype=grad_dtype(tensor), device=tensor.device)
            if wanted
            else None
            for tensor, wanted in zip(tensors, wants, strict=True)
        ]
        for tensors, wants in (
            (student, wants_student),
            (projections, wants_projection),
            (biases, wants_bias),
        )
    )


def _wanted(grads: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    return [grad for group in grads for grad in group if grad is not None]


@torch.library.impl("fakd::feature_alignment", "CompositeExplicitAutograd")
def _feature_alignment(
    student,
    teacher,
    projections,
    biases,
    row_weights,
    coefficients,
    projection_of,
    bias_of,
    row_weights_of,
    wants_student,
    wants_projection,
    wants_bias,
    eps,
    euclidean,
    route,
    engine,
):
    _validate.check_row_weights(row_weights)
    grads = _allocate(student, projections, biases, wants_student, wants_projection, wants_bias)
    pairs = []
    for index, (x, t) in enumerate(zip(student, teacher, strict=True)):
        place = projection_of[index]
        pairs.append(
            Pair(
                student=x,
                teacher=t,
                projection=pick(projections, place),
                bias=pick(biases, bias_of[index]),
                row_weights=pick(row_weights, row_weights_of[index]),
                grad_student=grads[0][index],
                projection_index=place,
                bias_index=bias_of[index],
                route="none"
                if place < 0
                else choose_route(
                    route,
                    x.shape[0],
                    x.shape[1],
                    t.shape[1],
                    wants_student[index],
                    wants_projection[place],
                ),
            )
        )
    sums = torch.zeros_like(coefficients)
    problem = Problem(
        pairs, coefficients, sums, grads[1], grads[2], euclidean == "squared", eps
    )
    chosen = _engines.choose("feature_alignment", student[0].device, refusals(problem), engine)
    _FILL[chosen](problem)
    loss = torch.where(coefficients == 0, 0, coefficients * sums).sum()
    return loss, sums, _wanted(grads)


_FILL = {"reference": reference.fill, "cpu": cpu.fill, "triton": triton_kernel.fill}


def refusals(problem: Problem) -> _engines.Refusals:
    """Why each engine cannot serve this call, None where it can."""
    tensors = [
        tensor
        for pair in problem.pairs
        for tensor in (pair.student, pair.teacher, pair.projection, pair.bias)
        if tensor is not None
    ]
    device = tensors[0].device.type
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    double = "float64 is served by the reference engine only" if is_double else None
    cpu_reason = double
    if device != "cpu":
        cpu_reason = f"it serves CPU tensors, these are on {device}"
    triton_reason = double
    if device != "cuda" and not (device == "cpu" and _engines.interpreted()):
        triton_reason = f"it serves CUDA tensors, these are on {device}"
    return {
        "reference": None,
        "cpu": cpu_reason or _extension.cpu_absent(),
        "triton": triton_reason or _engines.triton_absent(),
    }


@torch.library.register_fake("fakd::feature_alignment")
def _fake(
    student,
    teacher,
    projections,
    biases,
    row_weights,
    coefficients,
    projection_of,
    bias_of,
    row_weights_of,
    wants_student,
    wants_projection,
    wants_bias,
    eps,
    euclidean,
    route,
    engine,
):
    grads = _allocate(student, projections, biases, wants_student, wants_projection, wants_bias)
    return coefficients.new_empty(()), torch.empty_like(coefficients), _wanted(grads)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, projections, biases, row_weights = inputs[:5]
    _, sums, grads = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sums, *grads)
    ctx.save_for_backward(sums, *grads)
    ctx.wants = inputs[9:12]
    ctx.dtypes = [
        tensor.dtype
        for tensors, wants in zip((student, projections, biases), ctx.wants, strict=True)
        for tensor, wanted in zip(tensors, wants, strict=True)
        if wanted
    ]
    ctx.counts = (len(teacher), len(row_weights))


def _backward(ctx, grad_loss, _grad_sums, _grad_grads):
    teacher_count, row_weights_count = ctx.counts
    student, projections, biases = ([None] * len(wants) for wants in ctx.wants)
    grad_coefficients = None
    if grad_loss is not None:
        sums, *grads = ctx.saved_tensors
        scaled = iter(scale_gradients(grads, grad_loss, ctx.dtypes))
        student, projections, biases = (
            [next(scaled) if wanted else None for wanted in wants] for wants in ctx.wants
        )
        if ctx.needs_input_grad[5]:
            grad_coefficients = grad_loss * sums
    return (
        student,
        [None] * teacher_count,
        projections,
        biases,
        [None] * row_weights_count,
        grad_coefficients,
        *[None] * 3,
        # register_autograd counts an empty list as a list of tensors, and wants one back.
        *[None if wants else [] for wants in ctx.wants],
        *[None] * 4,
    )


torch.library.register_autograd(
    "fakd::feature_alignment", _backward, setup_context=_setup_context
)
