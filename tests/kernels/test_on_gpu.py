"""Every GPU engine on a card, on the cases of the CPU tests: make bench-gpu, or pytest -m gpu.

The reference engine and the oracle run on the card too, so nothing is compared across devices.
"""

from dataclasses import replace

import pytest
import torch

from fakd_kernels import attention_map_kl, engines, explain
from tests.support import accuracy, attention_cases, attention_checks, cases, output_checks
from tests.support.accuracy import assert_accurate
from tests.support.checks import check_feature_alignment
from tests.support.devices import to_device
from tests.support.output_cases import (
    DENSE_CASES,
    TOPK_CASES,
    OutputCase,
    make_linear,
    make_logits,
    make_topk,
)

ENGINES = ("triton", "cuda")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
MAKERS = {"linear": make_linear, "logits": make_logits, "topk": make_topk}
OUTPUTS = [
    pytest.param(name, case, id=f"{name}-{case.id}")
    for name in MAKERS
    for case in (TOPK_CASES if name == "topk" else DENSE_CASES)
]
on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def by_id(listed):
    return [pytest.param(case, id=case.id) for case in listed]


def on_gpu(inputs, engine: str):
    """The inputs there; skips a case that is not this engine's, which Triton's all are."""
    status = engines()[engine]
    if not status.is_usable:
        pytest.skip(status.reason)
    inputs = to_device(inputs, "cuda")
    try:
        inputs.call(engine=engine)
    except RuntimeError as error:
        if engine == "triton" or "must be able to serve" not in str(error):
            raise
        pytest.skip(str(error))
    return inputs


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("case", by_id(cases.CASES))
@pytest.mark.parametrize("engine", ENGINES)
def test_feature_alignment(engine, case):
    for index, dtype in enumerate((FLOAT32, BFLOAT16, FLOAT16)):
        inputs = on_gpu(cases.make_inputs(case, dtype), engine)
        euclidean = ("squared", "distance")[index % 2]
        check_feature_alignment(inputs, engine=engine, euclidean=euclidean)


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("case", by_id(attention_cases.CASES))
def test_attention_kl(case, monkeypatch):
    # float32 goes to tensor cores as three tf32 products, whose sums are cut, not rounded.
    monkeypatch.setattr(accuracy, "FLOOR_UNITS", 24)
    for dtype, distance in ((FLOAT32, "kl"), (BFLOAT16, "kl"), (FLOAT16, "jsd"), (FLOAT32, "mse")):
        inputs = on_gpu(attention_cases.make_inputs(case, dtype), "triton")
        attention_checks.check(inputs, "triton", distance=distance)


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize(("maker", "case"), OUTPUTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_outputs(engine, maker, case):
    for dtypes in ("f32", "bf16"):
        inputs = on_gpu(MAKERS[maker](case, dtypes), engine)
        output_checks.check(replace(inputs, origin=("", "")), engine)


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("engine", ENGINES)
def test_linear_kl_of_a_large_head(engine):
    """dH and dW in bfloat16 are products of three parts of the tokens."""
    sides = (65600, 65600), (256, 320)
    case = OutputCase("large", "", (1100,), *sides, mask="float", labels="some", spread=4.0)
    inputs = on_gpu(make_linear(case, "bf16"), engine)
    output_checks.check(replace(inputs, origin=("", "")), engine, ce_weight=0.5)


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("tokens", [1, 17, 300, 1024])
def test_attention_map_kl(tokens, dtype):
    """By whichever engine serves it, as `explain` says."""
    student, teacher = (torch.randn(2, 3, tokens, tokens, device="cuda") for _ in range(2))
    student, teacher = (t.softmax(-1).to(dtype) for t in (student, teacher))
    student.requires_grad_()

    def results(maps, engine):
        loss = attention_map_kl(maps, teacher.to(maps.dtype), engine=engine).loss
        return loss, *torch.autograd.grad(loss, maps)

    truth = results(student.detach().double().requires_grad_(), "reference")
    eager = results(student, "reference")
    words = explain("attention_map_kl", student, teacher)
    for index, values in enumerate(zip(results(student, None), truth, eager, strict=True)):
        assert_accurate(words, *values, FLOAT32 if index == 0 else dtype)


def test_moved_inputs_are_what_they_were():
    """Strides, sharing and leaves; needs no card."""
    for case in cases.CASES:
        here = cases.make_inputs(case)
        there = to_device(here, "cpu")
        assert there.leaves.keys() == here.leaves.keys()
        for name, leaf in here.leaves.items():
            assert there.leaves[name].is_leaf
            assert there.leaves[name].stride() == leaf.stride()
            assert there.leaves[name].data_ptr() != leaf.data_ptr() or leaf.numel() == 0
            torch.testing.assert_close(there.leaves[name], leaf, equal_nan=True, rtol=0, atol=0)
        if case.layout != "strided":
            check_feature_alignment(there, engine=None)
