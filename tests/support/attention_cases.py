"""Hostile inputs of attention_kl: every row is there for a reason, and says which."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fakd_kernels.ops.attention_kl import attention_kl, attention_kl_reference


@dataclass(frozen=True)
class AttentionCase:
    """One call of `attention_kl`; a pair is (B, T, (H, Hkv, K) student, (H, Hkv, K) teacher)."""

    id: str
    why: str
    pairs: tuple = ((2, 37, (4, 4, 20), (4, 4, 24)),)
    mask: str = "none"  # "none" | "left" | "right" | "holes" | "float" | "zeros" | "one"
    spread: float = 1.0  # standard deviation of the scores
    is_equal: bool = False  # the teacher is the student
    options: dict = field(default_factory=dict)


_GQA = ((2, 33, (4, 2, 16), (4, 1, 24)),)
CASES = (
    AttentionCase("plain", "unequal widths"),
    AttentionCase("aligned", "sizes of whole blocks", ((1, 128, (2, 2, 32), (2, 2, 64)),)),
    AttentionCase("blocks", "several, and many wide keys", ((1, 531, (2, 2, 128), (2, 1, 16)),)),
    AttentionCase("gqa", "grouped keys, other groups in the teacher", _GQA),
    AttentionCase("one-token", "a single key", ((3, 1, (2, 2, 8), (2, 1, 8)),)),
    AttentionCase("one-wide", "heads of width one", ((2, 9, (2, 2, 1), (2, 2, 1)),)),
    AttentionCase("spread", "scores up to 30", spread=30.0),
    AttentionCase("causal", "keys up to the query", options={"causal": True}),
    AttentionCase("window", "keys on both sides", options={"window": 5}),
    AttentionCase("causal-window", "as Mistral", options={"causal": True, "window": 4}),
    AttentionCase(
        "far-window",
        "blocks of queries that begin with different keys",
        ((1, 230, (4, 2, 40), (4, 4, 33)),),
        options={"causal": True, "window": 70},
    ),
    AttentionCase("window-1", "every row sees itself alone", options={"window": 1}),
    AttentionCase("left", "padding on the left", mask="left", options={"causal": True}),
    AttentionCase("right", "padding on the right", mask="right", options={"causal": True}),
    AttentionCase("holes", "masked tokens anywhere", mask="holes", options={"window": 7}),
    AttentionCase("float", "row weights", _GQA, mask="float"),
    AttentionCase("zeros", "nothing counts: loss 0", mask="zeros"),
    AttentionCase("one", "one token counts", mask="one"),
    AttentionCase(
        "softcap",
        "as Gemma 2, unequal caps, a scale and a temperature",
        spread=8.0,
        options={
            "student_softcap": 5.0,
            "teacher_softcap": 50.0,
            "student_scale": 0.3,
            "temperature": 1.7,
            "causal": True,
        },
    ),
    AttentionCase("heads", "a teacher head of each head", options={"heads": [1, 3, 0, 0]}),
    AttentionCase(
        "mean", "heads averaged", ((2, 19, (4, 2, 8), (6, 3, 12)),), options={"heads": "mean"}
    ),
    AttentionCase(
        "mean-spread",
        "averages of probabilities that underflow; caps, a window and padding",
        ((2, 133, (3, 1, 16), (4, 4, 8)),),
        mask="holes",
        spread=30.0,
        options={"heads": "mean", "causal": True, "window": 90, "teacher_softcap": 60.0},
    ),
    AttentionCase(
        "mean-blocks",
        "several blocks",
        ((1, 300, (6, 6, 8), (6, 2, 8)),),
        options={"heads": "mean"},
    ),
    AttentionCase("equal", "student = teacher", ((2, 40, (3, 3, 16), (3, 3, 16)),), is_equal=True),
    AttentionCase(
        "ragged",
        "pairs differ in every size",
        (
            (2, 17, (4, 4, 8), (4, 2, 16)),
            (1, 50, (4, 1, 24), (4, 4, 24)),
            (3, 5, (4, 2, 12), (4, 4, 8)),
        ),
        options={"weight": 0.7, "pair_weights": [0.5, 2.0, 1.0]},
    ),
    AttentionCase(
        "alternating",
        "pairs differ in masks, scales and caps",
        ((2, 17, (4, 2, 8), (4, 2, 16)), (2, 17, (4, 2, 8), (4, 2, 16))),
        mask="left",
        options={
            "causal": [True, False],
            "window": [None, 3],
            "student_scale": [None, 0.2],
            "teacher_scale": [0.4, 0.3],
            "student_softcap": [2.0, None],
            "teacher_softcap": [None, 3.0],
        },
    ),
)
CASES_BY_ID = {case.id: case for case in CASES}


@dataclass
class AttentionInputs:
    """Arguments of a call; queries and keys of the student receive gradients."""

    tensors: list[list[Tensor]]  # student_q, student_k, teacher_q, teacher_k
    mask: list[Tensor | None]
    options: dict

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {
            f"{name}[{index}]": tensor
            for name, tensors in zip(("student_q", "student_k"), self.tensors, strict=False)
            for index, tensor in enumerate(tensors)
        }

    def double(self) -> "AttentionInputs":
        tensors = [
            [t.detach().double().requires_grad_(t.requires_grad) for t in group]
            for group in self.tensors
        ]
        return replace(self, tensors=tensors)

    def call(self, **options):
        return attention_kl(*self.tensors, mask=self.mask, **{**self.options, **options})

    def call_reference(self, **options):
        count = len(self.mask)
        options = {"pair_weights": [1 / count] * count} | self.options | options
        return attention_kl_reference(*self.tensors, self.mask, **options)


def make_inputs(
    case: AttentionCase,
    student_dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    root = case.spread**0.5

    def heads(batch, tokens, count, width, dtype):
        # As models hand them over: [B, T, H, K] in memory.
        tensor = torch.randn(batch, tokens, count, width, generator=generator) * root
        return tensor.to(dtype).transpose(1, 2)

    groups: list[list[Tensor]] = [[], [], [], []]
    masks = []
    for batch, tokens, student, teacher in case.pairs:
        for place, side, dtype in ((0, student, student_dtype), (2, teacher, teacher_dtype)):
            for offset in (0, 1):
                tensor = heads(batch, tokens, side[offset], side[2], dtype or student_dtype)
                groups[place + offset].append(tensor)
        if case.is_equal:
            for offset in (0, 1):
                groups[2 + offset][-1] = groups[offset][-1].to(teacher_dtype or student_dtype)
        for offset in (0, 1):
            groups[offset][-1] = groups[offset][-1].clone().requires_grad_()
        masks.append(_mask(case.mask, batch, tokens, generator))
    return AttentionInputs(groups, masks, dict(case.options))


def _mask(kind: str, batch: int, tokens: int, generator: torch.Generator) -> Tensor | None:
    if kind == "none":
        return None
    uniform = torch.rand(batch, tokens, generator=generator)
    place = torch.arange(tokens).expand(batch, tokens)
    padding = torch.arange(1, batch + 1)[:, None] * 3
    masks = {
        "left": place >= padding,
        "right": place < tokens - padding,
        "holes": uniform > 0.4,
        "float": torch.where(uniform > 0.3, uniform, 0),
        "zeros": torch.zeros(batch, tokens, dtype=torch.bool),
        "one": place == tokens // 2,
    }
    return masks[kind]
