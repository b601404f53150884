"""linear_kl, logit_kl and topk_kl: bad calls in words, registration, compilation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fakd_kernels import linear_kl, logit_kl, topk_kl
from fakd_kernels.ops.linear_kl import arguments as of_linear
from fakd_kernels.ops.linear_kl import dispatch as of_linear_dispatch
from fakd_kernels.ops.logit_kl import arguments as of_logits
from fakd_kernels.ops.topk_kl import arguments as of_topk
from fakd_kernels.ops.topk_kl import dispatch as of_topk_dispatch
from tests.support.output_cases import (
    DENSE_CASES,
    TOPK_CASES,
    OutputCase,
    make_linear,
    make_logits,
    make_topk,
)

DENSE = {case.id: case for case in DENSE_CASES}
TOPK = {case.id: case for case in TOPK_CASES}
OPS = {
    "linear_kl": (torch.ops.fakd.linear_kl, make_linear, DENSE, of_linear.lower),
    "logit_kl": (torch.ops.fakd.logit_kl, make_logits, DENSE, of_logits.lower),
    "topk_kl": (torch.ops.fakd.topk_kl, make_topk, TOPK, of_topk.lower),
}


def _linear(**changes):
    tensors = {
        "student_hidden": torch.randn(2, 6, 8), "student_head": torch.randn(11, 8),
        "teacher_hidden": torch.randn(2, 6, 4), "teacher_head": torch.randn(11, 4),
    }  # fmt: skip
    return lambda: linear_kl(**tensors | changes)


def _logits(*shapes, **options):
    return lambda: logit_kl(*(torch.randn(shape) for shape in shapes), **options)


def _topk(**changes):
    logprobs, indices = torch.randn(12, 11).log_softmax(-1).topk(3)
    tensors = {
        "student_hidden": torch.randn(2, 6, 8), "student_head": torch.randn(11, 8),
        "teacher_indices": indices.view(2, 6, 3), "teacher_logprobs": logprobs.view(2, 6, 3),
    }  # fmt: skip
    return lambda: topk_kl(**tensors | changes)


_LABELS = torch.zeros(2, 6, dtype=torch.int64)
BAD_CALLS = {
    "hidden-rank": (
        _linear(student_hidden=torch.randn(8)), ValueError,
        r"student_hidden must have the shape \[B, T, D\] or \[N, D\]: got \[8\]"),
    "head-width": (
        _linear(student_head=torch.randn(11, 9)), ValueError,
        r"student_head must be as wide as student_hidden: got \[11, 9\] for 8 wide states"),
    "teacher-head": (
        _linear(teacher_head=torch.randn(4, 11)), ValueError, "teacher_head must be as wide as"),
    "bias": (
        _linear(student_bias=torch.randn(8)), ValueError,
        r"student_bias must have the shape \[V\] = \[11\]: got \[8\]"),
    "tokens": (
        _linear(teacher_hidden=torch.randn(2, 5, 4)), ValueError,
        r"teacher_hidden must have the same tokens as the student: got \[2, 5\] and \[2, 6\]"),
    "vocab": (
        _linear(teacher_head=torch.randn(12, 4)), ValueError,
        r"equal size: got 11 .student. and 12 .teacher.*vocab='prefix'"),
    "vocab-name": (_linear(vocab="suffix"), ValueError, "vocab must be one of 'prefix'"),
    "vocab-0": (
        _linear(student_head=torch.randn(0, 8), teacher_head=torch.randn(0, 4)), ValueError,
        "at least 1 entry: got 0"),
    "integers": (
        _linear(student_hidden=torch.ones(2, 6, 8).int()), TypeError, "got torch.int32"),
    "labels-missing": (
        _linear(ce_weight=0.5), ValueError, "labels must be given where ce_weight is not 0"),
    "labels-learned": (
        _linear(ce_weight=torch.tensor(0.0)), ValueError, "labels must be given where ce_weight"),
    "labels-dtype": (
        _linear(labels=_LABELS.int()), TypeError, r"labels must be int64: got torch.int32"),
    "labels-shape": (
        _linear(labels=_LABELS[:, 1:]), ValueError,
        r"labels must have one entry per token of the student: got \[2, 5\] for \[2, 6\]"),
    "labels-above": (
        _linear(labels=_LABELS + 11), ValueError, "labels must be from 0 to 10, .*: got 11"),
    "labels-below": (
        _linear(labels=_LABELS - 1), ValueError, "labels must be from 0 to 10, .*: got -1"),
    "labels-prefix": (
        _linear(teacher_head=torch.randn(9, 4), vocab="prefix", labels=_LABELS + 9), ValueError,
        "labels must be from 0 to 8, .*: got 9"),
    "ignore-index": (
        _linear(labels=_LABELS, ignore_index=None), TypeError, "ignore_index must be an int"),
    "mask-shape": (
        _linear(mask=torch.ones(2, 6, 6).bool()), ValueError, "mask must have one entry per token"),
    "mask-int": (_linear(mask=_LABELS), TypeError, "mask must be bool or floating-point"),
    "mask-negative": (
        _linear(mask=-torch.ones(2, 6)), ValueError, "mask must hold finite weights >= 0: got"),
    "mask-nan": (
        _linear(mask=torch.full((2, 6), torch.nan)), ValueError, "mask must hold finite weights"),
    "mask-infinite": (
        _linear(mask=torch.full((2, 6), torch.inf)), ValueError, "got numbers from inf to inf"),
    "mask-list": (_linear(mask=[True] * 12), TypeError, "mask must be a tensor: got list"),
    "labels-list": (_linear(labels=[1] * 12), TypeError, "labels must be a tensor: got list"),
    "no-teacher": (
        _linear(teacher_hidden=None), TypeError, "teacher_hidden must be a tensor: got NoneType"),
    "temperature": (_linear(temperature=0.0), ValueError, "temperature must be greater than 0"),
    "distance": (_linear(distance="mse"), ValueError, "distance must be one of 'kl', 'reverse_kl'"),
    "beta-0": (_linear(jsd_beta=0.0), ValueError, "jsd_beta must be greater than 0"),
    "beta-1": (_linear(jsd_beta=1.0), ValueError, "jsd_beta must be less than 1: got 1.0"),
    "softcap": (_linear(student_softcap=-1.0), ValueError, "student_softcap must be greater"),
    "teacher-softcap": (_linear(teacher_softcap=0.0), ValueError, "teacher_softcap must be gr"),
    "weight": (_linear(kl_weight=torch.ones(2)), ValueError, "kl_weight must be a number or a 0-d"),
    "normalizer": (_linear(normalizer=0.0), ValueError, "normalizer must be greater than "),
    "normalizer-tiny": (_linear(normalizer=1e-46), ValueError, "normalizer must be greater than "),
    "block": (_linear(block_bytes=0), ValueError, "block_bytes must be at least 1: got 0"),
    "block-float": (_linear(block_bytes=1e6), TypeError, "block_bytes must be None or an int"),
    "engine": (_linear(engine="fast"), ValueError, "engine must be one of"),
    "engine-double": (
        _linear(student_hidden=torch.randn(2, 6, 8).double(), engine="cpu"), RuntimeError,
        "float64 is served by the reference engine only"),
    "logits-rank": (_logits((5,), (5,)), ValueError, r"\[B, T, V\] or \[N, V\]: got \[5\]"),
    "logits-tokens": (_logits((4, 5), (3, 5)), ValueError, "same tokens as the student"),
    "logits-vocab": (_logits((4, 5), (4, 6)), ValueError, "equal size: got 5 .student. and 6"),
    "indices-dtype": (
        _topk(teacher_indices=torch.ones(2, 6, 3)), TypeError, "teacher_indices must be int64"),
    "logprobs-dtype": (
        _topk(teacher_logprobs=_LABELS[..., None]), TypeError, "teacher_logprobs must be float16"),
    "k": (
        _topk(teacher_logprobs=torch.randn(2, 6, 4)), ValueError,
        "both hold k >= 1 entries per token: got 3 and 4"),
    "k-above": (
        _topk(student_head=torch.randn(2, 8)), ValueError, "at most V = 2 entries per token"),
    "topk-tokens": (
        _topk(student_hidden=torch.randn(2, 7, 8)), ValueError, "teacher_indices must have the sa"),
    "indices-above": (
        _topk(student_head=torch.randn(4, 8)), ValueError,
        "teacher_indices must be from 0 to 3, or -1 .*: got .* tokenizer"),
    "indices-twice": (
        _topk(teacher_indices=_LABELS[..., None].expand(2, 6, 3)), ValueError,
        "teacher_indices must differ within a token: got 0 twice"),
    "logprobs-sum": (
        _topk(teacher_logprobs=torch.zeros(2, 6, 3)), ValueError,
        "sum to at most 1: got a sum of 3"),
    "ghost-temperature": (
        _topk(ghost=True, temperature=2.0), ValueError, "temperature must be 1 with ghost=True"),
    "ghost": (_topk(ghost=1), TypeError, "ghost must be a bool: got int"),
    "squared": (
        _linear(scale_by_temperature_squared=None), TypeError,
        "scale_by_temperature_squared must be a bool"),
    "topk-labels": (_topk(ce_weight=1.0), ValueError, "labels must be given"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_in_words(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("op", "case_id"),
    [
        *((op, case_id) for op in ("linear_kl", "logit_kl") for case_id in ("plain", "softcap")),
        ("linear_kl", "prefix-student"),
        ("topk_kl", "warm"),
        ("topk_kl", "ghost-float"),
    ],
)
def test_opcheck(op, case_id, grad):
    registered, make, cases, lower = OPS[op]
    inputs = make(cases[case_id])
    for leaf in inputs.leaves.values():
        leaf.requires_grad_(grad)
    torch.library.opcheck(registered.default, inputs.call_lowered(lower))


class _Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize(
    ("op", "dispatch", "options"),
    [
        ("linear_kl", of_linear_dispatch, {"distance": "jsd", "ce_weight": 0.5}),
        ("topk_kl", of_topk_dispatch, {"ghost": True, "ce_weight": 0.5}),
        ("topk_kl", of_topk_dispatch, {"labels": None}),
    ],
)
def test_the_reference_engine_never_holds_all_logits(op, dispatch, options):
    _, make, _, lower = OPS[op]
    tokens, vocab = 64, 500
    inputs = make(OutputCase("", "", (tokens,), (vocab, vocab), (4, 4), labels="all"))
    block = 4 * 2 * 4 * vocab  # four tokens of both sides
    lowered = inputs.call_lowered(lower, engine="reference", block_bytes=block, **options)
    with torch.no_grad(), _Largest() as largest:
        problem, chosen, _ = dispatch.resolve(*lowered)
        dispatch.FILL[chosen](problem)
    assert vocab * 4 <= largest.elements < tokens * vocab / 3


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_with_dynamic_shapes(op):
    """Ignored labels included: elsewhere a compiled loss was silently wrong with them."""
    torch._dynamo.reset()
    make = OPS[op][1]
    function = {"linear_kl": linear_kl, "logit_kl": logit_kl, "topk_kl": topk_kl}[op]

    def loss(tensors, temperature, ce_weight):
        result = function(**tensors, temperature=temperature, ce_weight=ce_weight)
        return result.loss, result.per_token

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens, temperature in ((11, 1.5), (17, 2.5)):
        inputs = make(OutputCase("", "", (2, tokens), labels="some", mask="float"))
        leaves = list(inputs.leaves.values())
        got = compiled(inputs.tensors, temperature, 0.3)
        want = loss(inputs.tensors, temperature, 0.3)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got[0], leaves), torch.autograd.grad(want[0], leaves), strict=True
        ):
            torch.testing.assert_close(a, b)
