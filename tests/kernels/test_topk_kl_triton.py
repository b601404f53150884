"""The Triton engine of topk_kl in Triton's interpreter, on a CPU, against the oracle.

Run as `TRITON_INTERPRET=1 pytest tests/kernels/test_topk_kl_triton.py`: Triton reads the variable
when it is first imported, so the whole process must have it.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs TRITON_INTERPRET=1 in the environment of the process", allow_module_level=True
    )
pytest.importorskip("triton")

from fakd_kernels import _output_checks, _triton, explain
from fakd_kernels.ops.topk_kl import triton_kernel
from fakd_kernels.ops.topk_kl.arguments import lower
from tests.support.interpreter import prepare_once
from tests.support.output_cases import DTYPES, TOPK_CASES, OutputCase, make_topk
from tests.support.output_checks import check, check_learned_weights, results

prepare_once()
CASES = {case.id: case for case in TOPK_CASES}
# Several tiles a row, of which the stored entries may lie in any.
WIDE = OutputCase("", "", (7,), (331, 331), mask="float", labels="all", k=9, has_biases=True)
pytestmark = [
    pytest.mark.usefixtures("nan_filled_memory"),
    # numpy's, of elements that a mask takes off afterwards
    pytest.mark.filterwarnings("ignore:(invalid|overflow|divide by|All-NaN):RuntimeWarning"),
]


@pytest.mark.parametrize("case", TOPK_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_value_and_gradients(case, dtypes):
    check(make_topk(case, dtypes), "triton")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("labels", ["none", "all"])
def test_wide_rows_in_small_blocks(dtypes, ghost, labels):
    inputs = make_topk(replace(WIDE, labels=labels), dtypes)
    options = {"ghost": ghost, "student_softcap": 6.0, "block_bytes": 3 * 4 * 331}
    options |= {"temperature": 1.0 if ghost else 1.7, "ce_weight": 0.0 if labels == "none" else 0.5}
    with _triton.record_launches() as launches:
        check(inputs, "triton", **options)
    assert [name for name, _ in launches] == ["top_rows_kernel"] * 3 + ["reduce_kernel"]


@pytest.mark.parametrize("ghost", [False, True])
def test_the_label_is_stored_or_is_not(ghost):
    """Its gradient comes from the entries in one case, from the sweep in the other."""
    for is_stored in (True, False):
        inputs = make_topk(replace(WIDE, mask="none"))
        logits = F.linear(inputs.tensors["student_hidden"], inputs.tensors["student_head"])
        stored = inputs.tensors["teacher_indices"]
        others = logits.detach().scatter(-1, stored, torch.inf).argmin(-1)
        inputs.tensors["labels"] = stored[..., 3].clone() if is_stored else others
        check(inputs, "triton", ghost=ghost, ce_weight=0.5)


@pytest.mark.parametrize("ghost", [False, True])
def test_more_entries_than_a_tile(ghost):
    case = OutputCase("", "", (5,), (150, 150), k=100, labels="all")
    check(make_topk(case), "triton", ghost=ghost, ce_weight=0.5)


@pytest.mark.parametrize("ghost", [False, True])
def test_logits_of_minus_infinity_beside_stored_entries(ghost):
    """A bias of -inf, as for padded entries, which are not stored: as if they were not there."""
    whole, part = (
        make_topk(replace(WIDE, has_biases=False)),
        make_topk(replace(WIDE, has_biases=False)),
    )
    head = F.pad(whole.tensors["student_head"].detach(), (0, 0, 0, 9), value=1.0)
    bias = torch.zeros(340).index_fill(0, torch.arange(331, 340), -torch.inf)
    whole.tensors |= {"student_head": head.requires_grad_(), "student_bias": bias}
    got, want = (
        results(inputs, engine="triton", ghost=ghost, ce_weight=0.5) for inputs in (whole, part)
    )
    assert not got["student_head"][331:].any()
    got["student_head"] = got["student_head"][:331]
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ghost", [False, True])
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(ghost):
    case = OutputCase("", "", (9,), (331, 331), (24, 24), distance_to=0.0, k=16)
    got = results(make_topk(case), engine="triton", ghost=ghost)
    assert got["loss"].abs() < 1e-6
    assert all(got[name].abs().max() < 2e-6 for name in ("student_hidden", "student_head"))


@pytest.mark.parametrize("ghost", [False, True])
def test_order_and_padding_of_entries_do_not_matter(ghost):
    inputs = make_topk(WIDE)
    want = results(inputs, engine="triton", ghost=ghost)
    t, order = inputs.tensors, torch.randperm(11)
    t["teacher_indices"] = F.pad(t["teacher_indices"], (0, 2), value=-1)[..., order].int()
    t["teacher_logprobs"] = F.pad(t["teacher_logprobs"], (0, 2), value=torch.nan)[..., order]
    for name, value in results(inputs, engine="triton", ghost=ghost).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ghost", [False, True])
def test_a_token_without_entries_has_distance_0(ghost):
    inputs = make_topk(replace(WIDE, mask="none"))
    inputs.tensors["teacher_indices"][3] = -1
    result = inputs.call(engine="triton", ghost=ghost)
    assert result.per_token[3].abs() < 1e-6
    assert (result.per_token[:3] > 0).all()
    (grad,) = torch.autograd.grad(result.loss, inputs.tensors["student_hidden"])
    assert not grad[3].any()
    assert inputs.call(engine="triton", ghost=ghost, ce_weight=1.0).per_token[3] > 0.1


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tokens_that_do_not_count_may_hold_anything(ghost, value):
    inputs, hostile = make_topk(WIDE), make_topk(WIDE)
    t = hostile.tensors
    away = t["mask"] == 0
    assert away.any()
    with torch.no_grad():
        t["student_hidden"].masked_fill_(away[..., None], value)
        t["teacher_logprobs"].masked_fill_(away[..., None], torch.nan)
        t["teacher_indices"].masked_fill_(away[..., None], 10**12)
        t["labels"].masked_fill_(away, 10**12)
    want, got = (
        results(each, engine="triton", ghost=ghost, ce_weight=0.5) for each in (inputs, hostile)
    )
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=0)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("name", ["student_hidden", "teacher_logprobs"])
def test_nan_reaches_the_loss(name, ghost):
    inputs = make_topk(replace(WIDE, mask="none"))
    with torch.no_grad():
        inputs.tensors[name][5, 3] = torch.nan
    per_token = inputs.call(engine="triton", ghost=ghost).per_token
    assert per_token.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("wrong", [331, 2**40])
def test_what_a_card_cannot_refuse_is_nan(ghost, wrong, monkeypatch):
    """Labels and indices outside the vocabulary: a check of a GPU's tensors would wait for it."""
    for check_of in ("check_values", "check_support"):
        monkeypatch.setattr(_output_checks, check_of, lambda *_: None)
    inputs = make_topk(replace(WIDE, mask="none"))
    inputs.tensors["teacher_indices"][2, 1] = wrong
    inputs.tensors["labels"][4] = wrong
    result = inputs.call(engine="triton", ghost=ghost, ce_weight=0.5)
    assert result.per_token.isnan().nonzero().tolist() == [[2], [4]]


@pytest.mark.parametrize("wanted", ["student_hidden", "student_head", "student_bias", "none"])
def test_only_what_is_trained_costs_a_gradient(wanted):
    inputs = make_topk(CASES["biases"])
    full = results(inputs, engine="triton")
    for name in inputs.trained:
        inputs.tensors[name].requires_grad_(name == wanted)
    *_, grads = torch.ops.fakd.topk_kl(*inputs.call_lowered(lower, engine="triton"))
    assert len(grads) == (wanted != "none")
    result = inputs.call(engine="triton")
    assert torch.equal(result.loss.detach(), full["loss"].detach())
    if wanted != "none":
        (grad,) = torch.autograd.grad(4 * result.loss, inputs.tensors[wanted])
        torch.testing.assert_close(grad, full[wanted], rtol=0, atol=0)


def test_learned_weights_receive_their_gradients():
    check_learned_weights(make_topk(CASES["warm"]), "triton")


def test_equal_bits_every_run():
    inputs = make_topk(WIDE, "bf16")
    first, second = (results(inputs, engine="triton", ghost=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals_in_words(monkeypatch):
    inputs = make_topk(CASES["plain"])
    with pytest.raises(RuntimeError, match="float64 is served by the reference engine only"):
        inputs.to(torch.float64).call(engine="triton")
    monkeypatch.setattr(triton_kernel, "MOST_ENTRIES", 4)
    with pytest.raises(RuntimeError, match="up to 4 entries per token: got 5"):
        inputs.call(engine="triton")


def test_explain_says_who_serves():
    words = explain("topk_kl", **make_topk(CASES["plain"]).tensors, engine="triton", ghost=True)
    assert words.startswith("topk_kl: served by the triton engine.")
