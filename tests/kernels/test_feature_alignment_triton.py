"""The Triton engine of feature_alignment in Triton's interpreter, on a CPU, against the oracle.

Run as `TRITON_INTERPRET=1 pytest tests/kernels/test_feature_alignment_triton.py`: Triton reads the
variable when it is first imported, so the whole process must have it.
"""

import math
import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 in the environment of the process", allow_module_level=True
    )
pytest.importorskip("triton")

import fakd_kernels
from fakd_kernels import _triton
from fakd_kernels._scale import scale_
from fakd_kernels.ops.feature_alignment import dispatch, projected, triton_kernel
from tests.support.cases import CASES, CASES_BY_ID, FeatureCase, make_inputs
from tests.support.checks import check_feature_alignment

DTYPES = {
    "fp32": (torch.float32,) * 3,
    "bf16": (torch.bfloat16,) * 3,
    "fp16": (torch.float16,) * 3,
    "mixed": (torch.bfloat16, torch.float32, torch.float32),
}


def check(inputs, euclidean="squared"):
    check_feature_alignment(inputs, engine="triton", euclidean=euclidean)


def run(inputs):
    """Loss and gradients."""
    loss = inputs.call(engine="triton").loss
    return loss, *torch.autograd.grad(loss, list(inputs.leaves.values()))


def rows():
    """Every case in fp32 and bf16; in the other dtypes those about numbers rather than shapes."""
    for case in CASES:
        is_about_numbers = case.fill != "randn" or case.id in ("aligned", "bias", "float-mask")
        for index, dtypes in enumerate(DTYPES):
            if dtypes in ("fp32", "bf16") or is_about_numbers:
                yield pytest.param(case, dtypes, index % 2, id=f"{case.id}-{dtypes}")


@pytest.mark.parametrize(("case", "dtypes", "turn"), list(rows()))
def test_value_and_gradients(case, dtypes, turn):
    """The dtypes take the two distances in turn."""
    check(make_inputs(case, *DTYPES[dtypes]), ("squared", "distance")[turn])


@pytest.mark.parametrize("frozen", ["student", "projection", "bias"])
def test_frozen_parts(frozen):
    inputs = make_inputs(CASES_BY_ID["shared"], torch.bfloat16)
    for tensor in getattr(inputs, frozen):
        tensor.requires_grad_(False)
    check(inputs)


def test_only_the_bias_learns():
    inputs = make_inputs(CASES_BY_ID["bias"])
    for tensor in (*inputs.student, *inputs.projection):
        tensor.requires_grad_(False)
    check(inputs, "distance")


@pytest.mark.parametrize("case", ["bias", "near-3", "same-width", "bool-mask"])
def test_values_alone_without_gradients(case):
    inputs = make_inputs(CASES_BY_ID[case], torch.bfloat16)
    learned = inputs.call(engine="triton")
    with torch.no_grad():
        result = inputs.call(engine="triton")
    assert torch.equal(result.loss, learned.loss)


def test_the_gram_route_is_refused_in_words():
    inputs = make_inputs(CASES_BY_ID["bias"])
    with pytest.raises(RuntimeError, match="it takes the direct route alone"):
        inputs.call(route="gram", engine="triton")


def test_learned_weights():
    inputs = make_inputs(CASES_BY_ID["ragged"])
    weights = [torch.tensor(value, requires_grad=True) for value in (0.7, 1.3)]
    options = dict(cosine_weight=weights[0], euclidean_weight=weights[1])
    got = torch.autograd.grad(inputs.call(**options, engine="triton").loss, weights)
    expected = torch.autograd.grad(inputs.call_reference(**options)[0], weights)
    torch.testing.assert_close(got, expected)


def test_rows_of_weight_zero_are_not_read():
    for case in ("bool-mask", "float-mask-same"):
        inputs = make_inputs(CASES_BY_ID[case])
        masked = inputs.mask[0] == 0
        expected = run(inputs)
        with torch.no_grad():
            inputs.student[0][masked] = float("nan")
            inputs.teacher[0][masked] = float("inf")
        torch.testing.assert_close(run(inputs), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, on NaN
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_in_a_counted_row_reaches_the_loss(where):
    for case in ("same-width", "bias"):
        inputs = make_inputs(CASES_BY_ID[case])
        with torch.no_grad():
            getattr(inputs, where)[0][3, 2] = float("nan")
        assert math.isnan(inputs.call(engine="triton").loss.detach())


def test_equal_bits_every_run():
    inputs = make_inputs(CASES_BY_ID["shared"], torch.bfloat16)
    first, second = (run(inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_one_launch_for_all_pairs_without_a_projection():
    case = FeatureCase("", "", ((19, 48, 48), (64, 64, 64), (0, 48, 48), (3, 64, 64)), "none")
    inputs = make_inputs(case, torch.bfloat16)
    with _triton.record_launches() as launches:
        inputs.call(engine="triton")
    assert [name for name, _ in launches] == ["align_rows_kernel", "reduce_kernel"]


def test_launches_do_not_grow_with_the_number_of_pairs():
    counts = []
    for pairs in (1, 5):
        inputs = make_inputs(FeatureCase("", "", ((20, 16, 48),) * pairs))
        with _triton.record_launches() as launches:
            inputs.call(engine="triton")
        counts.append(len(launches))
    assert counts == [2, 2]


def test_many_chunks_give_the_same_numbers(monkeypatch):
    """Chunks of 128 rows, several per pair; gradients of the projection accumulate over them."""
    monkeypatch.setattr(projected, "CHUNK_BYTES", 1)
    case = FeatureCase("", "", ((300, 24, 40), (150, 24, 40)), "shared", True, "bool", "near-2")
    with _triton.record_launches() as launches:
        check(make_inputs(case))
    assert [name for name, _ in launches].count("align_rows_kernel") == 5


def test_chunks_are_packed_up_to_the_budget(monkeypatch):
    monkeypatch.setattr(projected, "CHUNK_BYTES", 4 * 256 * 128)
    inputs = make_inputs(FeatureCase("", "", ((300, 16, 256), (70, 16, 256), (50, 16, 128))))
    with torch.no_grad(), _triton.record_launches() as launches:
        inputs.call(engine="triton")
    # Pieces of 128, 128, 44 + 70 rows; then 50 rows, half as wide, find no room beside these.
    assert [name for name, _ in launches].count("align_rows_kernel") == 4


def test_explain_computes_nothing_and_lists_the_launches():
    inputs = make_inputs(CASES_BY_ID["ragged"])
    with _triton.record_launches() as launches:
        words = fakd_kernels.explain(
            "feature_alignment", inputs.student, inputs.teacher, inputs.projection, engine="triton"
        )
    assert launches == []
    lines = words.splitlines()
    assert lines[0] == "feature_alignment: served by the triton engine."
    assert "3 pairs in chunks, 1 in all: P = X W^T by torch, align_rows_kernel" in words
    assert lines[-1] == "  reduce_kernel: their values"


@pytest.mark.parametrize("factor", [1.0, -0.375])
def test_scale_in_one_launch(factor):
    sizes = (1, 4096, 4097, 0, 9001)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(size, generator=generator).to(dtype)
        for size in sizes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    expected = [(tensor.float() * factor).to(tensor.dtype) for tensor in tensors]
    with _triton.record_launches() as launches:
        scale_(tensors, torch.tensor(factor))
    assert [name for name, _ in launches] == ["scale_kernel"]
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)


def test_neighbours_of_a_gradient_are_not_touched(monkeypatch):
    """The gradient buffer lies between sentinels, as a slice of a larger tensor."""
    inputs = make_inputs(FeatureCase("", "", ((13, 24, 40),)))
    margin = 64
    whole = torch.full((13 * 24 + 2 * margin,), 7.0)

    def fill(problem):
        (pair,) = problem.pairs
        inside = whole[margin:-margin].view(13, 24)
        triton_kernel.fill(replace(problem, pairs=[replace(pair, grad_student=inside)]))

    monkeypatch.setitem(dispatch.FILL, "triton", fill)
    inputs.call(engine="triton")
    assert (whole[:margin] == 7).all()
    assert (whole[-margin:] == 7).all()
    assert (whole[margin:-margin] != 7).all()
