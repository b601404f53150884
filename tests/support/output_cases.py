"""Hostile inputs of linear_kl, logit_kl and topk_kl: every row is there for a reason, and says
which."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fakd_kernels import linear_kl, logit_kl, topk_kl
from fakd_kernels.ops.linear_kl import linear_kl_reference
from fakd_kernels.ops.logit_kl import logit_kl_reference
from fakd_kernels.ops.topk_kl import topk_kl_reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# student's hidden states and head, teacher's hidden states and head
DTYPES = {
    "f32": (F32, F32, F32, F32),
    "bf16": (BF16, BF16, BF16, BF16),
    "f16": (F16, F16, F16, F16),
    "mixed": (BF16, F32, F32, F16),
}
# Dtypes and distances meet nowhere in the arithmetic: not every pair of them needs a test.
DISTANCES = {
    "f32": ("kl", "reverse_kl", "jsd"),
    "bf16": ("kl", "reverse_kl", "jsd"),
    "f16": ("kl",),
    "mixed": ("jsd",),
}


@dataclass(frozen=True)
class OutputCase:
    """One call; the teacher is drawn apart unless `distance_to` says how near it is."""

    id: str
    why: str
    leading: tuple[int, ...] = (3, 41)
    vocab: tuple[int, int] = (61, 61)  # student's and teacher's
    widths: tuple[int, int] = (12, 20)
    spread: float = 3.0  # standard deviation of the logits
    distance_to: float | None = None  # the teacher is the student, and this times noise
    mask: str = "none"  # "none" | "holes" | "float" | "zeros" | "one"
    labels: str = "none"  # "none" | "all" | "some" | "ignored"
    has_biases: bool = False
    layout: str = "plain"  # "plain" | "rows" | "transposed"
    k: int = 5
    entries: str = "all"  # "all" | "some": of the k stored ones
    slack: float = 1.0  # what the error of eager is multiplied by, before the rule
    options: dict = field(default_factory=dict)


_CE = {"kl_weight": 0.4, "ce_weight": 0.6}
_COMMON = (
    OutputCase("plain", "unequal widths"),
    OutputCase("aligned", "sizes of whole vectors", (64,), (256, 256), (32, 64)),
    OutputCase("primes", "sizes of no whole vector", (67,), (131, 131), (7, 13)),
    # Eager's rounding of a single token may be small by luck.
    OutputCase("one-row", "a single token", (1,), slack=2.0),
    OutputCase("no-row", "no token at all: loss 0", (0,)),
    OutputCase("wide", "a vocabulary far wider than the states", (9,), (2003, 2003), (4, 3)),
    OutputCase("spread", "logits up to 100", spread=30.0),
    OutputCase("huge", "logits up to 1000: softmax is one-hot", spread=300.0, labels="all"),
    OutputCase("tiny", "logits of 1e-5: every softmax is uniform", spread=1e-5),
    OutputCase("near-2", "the teacher within 1 %", distance_to=1e-2),
    OutputCase("near-3", "the teacher within 0.1 %", distance_to=1e-3),
    OutputCase("holes", "masked tokens anywhere", mask="holes"),
    OutputCase("float", "row weights", mask="float", labels="some", options=_CE),
    OutputCase("zeros", "nothing counts: loss 0", mask="zeros", labels="all", options=_CE),
    OutputCase("ignored", "every label is ignored: loss 0", labels="ignored", options=_CE),
    OutputCase("one", "one token counts", mask="one", labels="all", slack=2.0, options=_CE),
    OutputCase("labels", "some labels are ignored", labels="some", options=_CE),
    OutputCase("ce", "cross-entropy alone", labels="some", options={**_CE, "kl_weight": 0.0}),
    OutputCase("logged", "labels without a weight: the cross-entropy is a log", labels="some"),
    OutputCase("biases", "biases on both sides", has_biases=True, labels="all", options=_CE),
    OutputCase("rows", "rows of wider matrices", layout="rows", has_biases=True),
    OutputCase("transposed", "strides that no engine takes", layout="transposed", has_biases=True),
    OutputCase("normalizer", "one of the caller's", mask="holes", options={"normalizer": 17.5}),
)
_CAPPED = {"student_softcap": 5.0, "temperature": 1.7}
DENSE_CASES = (
    *_COMMON,
    OutputCase("vocab-1", "a vocabulary of one: loss 0", vocab=(1, 1), labels="all", options=_CE),
    OutputCase("vocab-2", "a vocabulary of two", vocab=(2, 2), labels="all", options=_CE),
    OutputCase("warm", "temperature, labels at 1", labels="all", options={"temperature": 3, **_CE}),
    OutputCase(
        "cold",
        "temperature below 1, not squared",
        options={"temperature": 0.5, "scale_by_temperature_squared": False},
    ),
    OutputCase(
        "softcap",
        "as Gemma 2, unequal caps",
        spread=8.0,
        labels="some",
        has_biases=True,
        options={**_CAPPED, "teacher_softcap": 30.0, **_CE},
    ),
    OutputCase("beta", "an uneven mixture", options={"jsd_beta": 0.1}),
    OutputCase("beta-high", "hardly any of the student", options={"jsd_beta": 0.999}),
    OutputCase(
        "prefix-student",
        "a padded student",
        vocab=(61, 53),
        labels="all",
        has_biases=True,
        options={"vocab": "prefix", **_CE},
    ),
    OutputCase("prefix-teacher", "a padded teacher", vocab=(53, 61), options={"vocab": "prefix"}),
)
LINEAR_CASES = (
    *DENSE_CASES,
    OutputCase("deep", "several tiles of products, cut short", (85,), (555, 555), (70, 45)),
)
_GHOST = {"ghost": True}
TOPK_CASES = (
    *_COMMON,
    *(
        replace(case, id=f"ghost-{case.id}", options={**case.options, **_GHOST})
        for case in _COMMON
        if case.id != "transposed"
    ),
    OutputCase("k-1", "one entry: the distance is 0 without a ghost", k=1, labels="all"),
    OutputCase("ghost-k-1", "one entry and the rest", k=1, options=_GHOST),
    OutputCase("all", "every token is stored", vocab=(6, 6), k=6),
    OutputCase("ghost-all", "nothing is left for the ghost", vocab=(6, 6), k=6, options=_GHOST),
    OutputCase("some", "unused entries, tokens without any", entries="some", options=_CAPPED),
    OutputCase("ghost-some", "likewise", entries="some", labels="some", options={**_GHOST, **_CE}),
    OutputCase("warm", "temperature, labels at 1", labels="all", options={**_CAPPED, **_CE}),
    OutputCase("ghost-softcap", "a cap", spread=8.0, options={**_GHOST, "student_softcap": 5.0}),
)


@dataclass
class OutputInputs:
    """Arguments of a call, by name; those of `trained` receive gradients."""

    op: Callable
    reference: Callable
    tensors: dict[str, Tensor | None]
    trained: tuple[str, ...]
    options: dict = field(default_factory=dict)
    origin: tuple[str, ...] = ("",)  # the listed case and its dtypes
    slack: float = 1.0

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in self.trained}

    def to(self, dtype: torch.dtype) -> "OutputInputs":
        tensors = {
            name: t.detach().to(dtype) if t is not None and t.is_floating_point() else t
            for name, t in self.tensors.items()
        }
        for name in self.trained:
            tensors[name].requires_grad_(self.tensors[name].requires_grad)
        return replace(self, tensors=tensors)

    def call(self, **options):
        return self.op(**{**self.tensors, **self.options, **options})

    def call_reference(self, **options):
        options.pop("block_bytes", None)
        return self.reference(**{**self.tensors, **self.options, **options})

    def call_lowered(self, lower: Callable, **options) -> tuple:
        """The arguments of the registered op, as leaves."""
        parameters = inspect.signature(self.op).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        lowered, _ = lower(**{**defaults, **self.tensors, **self.options, **options})
        return tuple(
            t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
            for t in lowered
        )


class _Draw:
    """Random tensors of one case, always the same."""

    def __init__(self, case: OutputCase) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(0)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """The same numbers with other strides."""
        if self.case.layout == "rows":
            *leading, width = tensor.shape
            return torch.cat([tensor, self.randn(*leading, 5).to(tensor)], -1)[..., :width]
        if self.case.layout == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        return tensor

    def projection(self, side: int) -> tuple[Tensor, Tensor]:
        """Hidden states and a head whose product has the spread of the case."""
        width = self.case.widths[side]
        head = self.randn(self.case.vocab[side], width) * (self.case.spread / width**0.5)
        return self.randn(*self.case.leading, width), head

    def rows(self) -> dict[str, Tensor | None]:
        """Labels and mask."""
        case = self.case
        uniform = torch.rand(*case.leading, generator=self.generator)
        place = torch.arange(uniform.numel()).reshape(case.leading)
        labels = torch.randint(min(case.vocab), case.leading, generator=self.generator)
        is_ignored = torch.rand(*case.leading, generator=self.generator) < 0.3
        masks = {
            "none": None,
            "holes": uniform > 0.4,
            "float": torch.where(uniform > 0.3, uniform, 0),
            "zeros": torch.zeros(case.leading, dtype=torch.bool),
            "one": place == uniform.numel() // 2,
        }
        chosen = {
            "none": None,
            "all": labels,
            "some": torch.where(is_ignored, -100, labels),
            "ignored": torch.full_like(labels, -100),
        }
        return {"labels": chosen[case.labels], "mask": masks[case.mask]}


def make_linear(case: OutputCase, dtypes: str = "f32") -> OutputInputs:
    draw = _Draw(case)
    (student, head), (teacher, teacher_head) = draw.projection(0), draw.projection(1)
    if case.distance_to is not None:
        teacher = student + case.distance_to * draw.randn(*student.shape)
        teacher_head = head.clone()
    of = DTYPES[dtypes]
    tensors = {
        "student_hidden": draw.laid_out(student.to(of[0])),
        "student_head": draw.laid_out(head.to(of[1])),
        "teacher_hidden": draw.laid_out(teacher.to(of[2])),
        "teacher_head": draw.laid_out(teacher_head.to(of[3])),
        **draw.rows(),
    }
    trained = ["student_hidden", "student_head"]
    if case.has_biases:
        tensors["student_bias"] = draw.randn(case.vocab[0]).to(of[1])
        tensors["teacher_bias"] = draw.randn(case.vocab[1]).to(of[3])
        trained.append("student_bias")
    inputs = OutputInputs(linear_kl, linear_kl_reference, tensors, tuple(trained))
    return _trained(inputs, case, dtypes)


def make_logits(case: OutputCase, dtypes: str = "f32") -> OutputInputs:
    draw = _Draw(case)
    student, teacher = (draw.randn(*case.leading, size) * case.spread for size in case.vocab)
    if case.distance_to is not None:
        teacher = student * (1 + case.distance_to * draw.randn(*student.shape))
    of = DTYPES[dtypes]
    tensors = {
        "student_logits": draw.laid_out(student.to(of[0])),
        "teacher_logits": draw.laid_out(teacher.to(of[2])),
        **draw.rows(),
    }
    inputs = OutputInputs(logit_kl, logit_kl_reference, tensors, ("student_logits",))
    return _trained(inputs, case, dtypes)


def make_topk(case: OutputCase, dtypes: str = "f32") -> OutputInputs:
    linear = make_linear(case, dtypes)
    tensors = linear.tensors
    teacher, head = tensors.pop("teacher_hidden").float(), tensors.pop("teacher_head").float()
    tensors.pop("teacher_bias", None)
    logprobs, indices = (teacher @ head.T).log_softmax(-1).topk(case.k, -1)
    if case.entries == "some":
        flat = indices.view(-1, case.k)
        flat[::3, 1:3], flat[4], flat[5, 0] = -1, -1, -1
        logprobs = logprobs.masked_fill(indices < 0, torch.nan)
    tensors |= {"teacher_indices": indices, "teacher_logprobs": logprobs.to(DTYPES[dtypes][2])}
    inputs = OutputInputs(topk_kl, topk_kl_reference, tensors, linear.trained)
    return _trained(inputs, case, dtypes)


def _trained(inputs: OutputInputs, case: OutputCase, dtypes: str) -> OutputInputs:
    for leaf in inputs.leaves.values():
        leaf.requires_grad_()
    origin = (case.id, dtypes)
    return replace(inputs, options=dict(case.options), origin=origin, slack=case.slack)
