"""Hostile inputs of the ops: every row is there for a reason, and says which."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fakd_kernels.ops.feature_alignment import feature_alignment, feature_alignment_reference


@dataclass(frozen=True)
class FeatureCase:
    """One call of `feature_alignment`: the shapes of its layer pairs, and how to fill them."""

    id: str
    why: str
    pairs: tuple[tuple[int, int, int], ...] = ((35, 48, 64),)  # (N, Ds, Dt)
    projection: str = "own"  # "own" | "shared" | "none"
    bias: bool = False
    mask: str = "none"  # "none" | "bool" | "float" | "zeros" | "one" | "ones"
    # "randn" | "near-2" | "near-3" | "fitted" | "equal" | "zeros" | "huge" | "tiny"
    fill: str = "randn"
    layout: str = "plain"  # "plain" | "strided" | "transposed"
    options: dict = field(default_factory=dict)


CASES = (
    FeatureCase("aligned", "sizes of a whole tile", ((128, 64, 128),)),
    FeatureCase("prime", "no size is a multiple of anything", ((37, 29, 53),)),
    FeatureCase("wide-student", "Ds > Dt: the direct route", ((33, 96, 40),)),
    FeatureCase("narrow-student", "Ds < Dt / 2: the gram route", ((70, 24, 160),)),
    FeatureCase("one-row", "a single token", ((1, 16, 24),)),
    FeatureCase("one-column", "features of width one", ((9, 1, 1),)),
    FeatureCase("empty", "no token at all", ((0, 8, 8),)),
    FeatureCase("bias", "projection with bias", ((41, 24, 72),), bias=True),
    FeatureCase("ragged", "pairs differ in every size", ((17, 8, 40), (64, 32, 24), (5, 12, 12))),
    FeatureCase(
        "shared", "one projection and bias for three pairs", ((67, 16, 48),) * 3, "shared", True
    ),
    FeatureCase("same-width", "no projection", ((50, 72, 72),), "none"),
    FeatureCase("same-width-many", "pairs in one launch", ((19, 33, 33), (64, 96, 96)), "none"),
    FeatureCase("bool-mask", "padding", ((40, 24, 56),), mask="bool"),
    FeatureCase("float-mask", "row weights", ((40, 24, 56), (40, 24, 56)), mask="float"),
    FeatureCase("float-mask-same", "likewise, as it is", ((40, 56, 56),), "none", mask="float"),
    FeatureCase("all-masked", "loss 0 and gradient 0", ((12, 8, 20),), mask="zeros"),
    FeatureCase("all-masked-same", "likewise, as it is", ((12, 20, 20),), "none", mask="zeros"),
    # Wide enough that the worst error of eager in a single row is no luck.
    FeatureCase("one-kept", "a single unmasked token", ((12, 40, 96),), mask="one"),
    FeatureCase("near-2", "|p - t| / |t| = 1e-2", ((64, 24, 96),), fill="near-2"),
    FeatureCase("near-3", "|p - t| / |t| = 1e-3", ((64, 24, 96),), fill="near-3"),
    FeatureCase("near-3-same", "likewise, no projection", ((64, 96, 96),), "none", fill="near-3"),
    FeatureCase("fitted", "t = W x + noise: gradients cancel", ((300, 24, 192),), fill="fitted"),
    FeatureCase("equal", "student = teacher", ((32, 48, 48),), "none", fill="equal"),
    FeatureCase("zeros", "zero rows: the norms are clamped", ((64, 24, 40),), fill="zeros"),
    FeatureCase("zeros-same", "likewise, no projection", ((64, 40, 40),), "none", fill="zeros"),
    FeatureCase("huge", "1e4 times larger", ((24, 20, 56),), fill="huge"),
    FeatureCase("tiny", "1e-4 times smaller", ((24, 20, 56),), fill="tiny"),
    FeatureCase("strided", "rows apart in memory", ((30, 24, 56),), layout="strided"),
    FeatureCase("transposed", "last axis not contiguous", ((30, 24, 56),), layout="transposed"),
    FeatureCase(
        "weights", "unequal weights", ((30, 24, 56), (11, 9, 30)),
        options={"cosine_weight": 0.3, "euclidean_weight": 1.7, "pair_weights": [0.2, 2.0]},
    ),
    FeatureCase("normalizer", "a caller's own divisor", options={"normalizer": 1234.5}),
    FeatureCase("cosine-only", "a weight of zero", options={"euclidean_weight": 0.0}),
    FeatureCase("wide-row", "more columns than a tile", ((33, 40, 1536),)),
    FeatureCase("wide-row-same", "likewise, no projection", ((7, 5003, 5003),), "none"),
)  # fmt: skip
CASES_BY_ID = {case.id: case for case in CASES}

_NEAR = {"near-2": 1e-2, "near-3": 1e-3, "equal": 0.0, "fitted": 0.5}
_SCALE = {"huge": 1e4, "tiny": 1e-4}


@dataclass
class FeatureInputs:
    """Arguments of a call; `leaves` are the tensors that receive gradients."""

    student: list[Tensor]
    teacher: list[Tensor]
    projection: list[Tensor | None]
    bias: list[Tensor | None]
    mask: list[Tensor | None]
    options: dict

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {}
        for name in ("student", "projection", "bias"):
            for index, tensor in enumerate(getattr(self, name)):
                if tensor is not None and not any(tensor is known for known in named.values()):
                    named[f"{name}[{index}]"] = tensor
        return named

    def double(self) -> "FeatureInputs":
        """The same rounded values in float64; what was shared stays shared."""
        known: dict[int, Tensor] = {}

        def convert(tensors):
            for tensor in tensors:
                if tensor is not None and id(tensor) not in known:
                    copy = tensor.detach()
                    copy = copy.double() if copy.is_floating_point() else copy.clone()
                    known[id(tensor)] = copy.requires_grad_(tensor.requires_grad)
            return [None if tensor is None else known[id(tensor)] for tensor in tensors]

        return replace(
            self,
            student=convert(self.student),
            teacher=convert(self.teacher),
            projection=convert(self.projection),
            bias=convert(self.bias),
            mask=convert(self.mask),
        )

    def call(self, **options):
        return feature_alignment(
            self.student,
            self.teacher,
            self.projection,
            self.bias,
            mask=self.mask,
            **{**self.options, **options},
        )

    def call_reference(self, **options):
        options = {"pair_weights": [1 / len(self.student)] * len(self.student)} | {
            **self.options,
            **options,
        }
        return feature_alignment_reference(
            self.student, self.teacher, self.projection, self.bias, self.mask, **options
        )


def make_inputs(
    case: FeatureCase,
    student_dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    projection_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> FeatureInputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    teacher_dtype = teacher_dtype or student_dtype
    projection_dtype = projection_dtype or student_dtype
    inputs = FeatureInputs([], [], [], [], [], dict(case.options))
    for n, ds, dt in case.pairs:
        x, t = randn(n, ds), randn(n, dt)
        if case.projection == "none":
            weight = offset = None
        elif case.projection == "shared" and inputs.projection:
            weight, offset = inputs.projection[0], inputs.bias[0]
        else:
            weight = (randn(dt, ds) / ds**0.5).to(projection_dtype)
            offset = randn(dt).to(projection_dtype) if case.bias else None
        x = x * _SCALE.get(case.fill, 1)
        t = t * _SCALE.get(case.fill, 1)
        if case.fill == "zeros":
            x[::2] = 0
            t[::3] = 0
        x = x.to(student_dtype)
        if case.fill in _NEAR:
            p = x.double() if weight is None else x.double() @ weight.double().T
            noise = randn(n, dt).double()
            noise *= p.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
            t = p + _NEAR[case.fill] * noise
        x, t = (_lay_out(tensor, case.layout) for tensor in (x, t.to(teacher_dtype)))
        inputs.student.append(x.to(device).requires_grad_())
        inputs.teacher.append(t.to(device))
        inputs.projection.append(_leaf(weight, device))
        inputs.bias.append(_leaf(offset, device))
        inputs.mask.append(_mask(case.mask, n, generator, device))
    return inputs


def _leaf(tensor: Tensor | None, device: str) -> Tensor | None:
    if tensor is None or tensor.requires_grad:
        return tensor
    return tensor.to(device).requires_grad_()


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], 1)[:, 0]
    if layout == "transposed":
        return tensor.T.contiguous().T
    return tensor


def _mask(kind: str, rows: int, generator: torch.Generator, device: str) -> Tensor | None:
    if kind == "none":
        return None
    uniform = torch.rand(rows, generator=generator)
    one = torch.zeros(rows, dtype=torch.bool)
    one[rows // 2] = True
    masks = {
        "bool": uniform > 0.4,
        "float": torch.where(uniform > 0.3, uniform, 0),
        "zeros": torch.zeros(rows, dtype=torch.bool),
        "ones": torch.ones(rows, dtype=torch.bool),
        "one": one,
    }
    return masks[kind].to(device)
