"""topk_kl on the reference and C++ engines, against the float64 formula."""

import pytest
import torch
import torch.nn.functional as F

from fakd_kernels import explain, logit_kl, topk_kl
from fakd_kernels.ops.topk_kl.arguments import lower
from tests.support.output_cases import DTYPES, TOPK_CASES, OutputCase, make_topk
from tests.support.output_checks import ENGINES, check, check_learned_weights, results

CASES = {case.id: case for case in TOPK_CASES}
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.mark.parametrize("case", TOPK_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(
    ("engine", "dtypes"), [(engine, dtypes) for engine in ENGINES for dtypes in DTYPES]
)
def test_value_and_gradients(case, engine, dtypes):
    check(make_topk(case, dtypes), engine)


def _dense(inputs, *, ghost: bool, temperature: float = 1.0):
    """The docstring's lines, with the probabilities themselves, in float64."""
    t = {name: v.double() for name, v in inputs.tensors.items() if v is not None}
    indices = inputs.tensors["teacher_indices"].flatten(0, 1)
    logits = F.linear(t["student_hidden"], t["student_head"]).flatten(0, 1)
    stored = t["teacher_logprobs"].flatten(0, 1)
    if ghost:
        log_s = logits.log_softmax(-1).gather(1, indices)
        log_s, log_t = (
            torch.cat([p, (1 - p.exp().sum(-1, keepdim=True)).log()], -1) for p in (log_s, stored)
        )
    else:
        log_s = (logits.gather(1, indices) / temperature).log_softmax(-1)
        log_t = (stored / temperature).log_softmax(-1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("ghost", "temperature"), [(False, 1.0), (False, 2.0), (True, 1.0)])
def test_replaces_what_the_docstring_says(engine, ghost, temperature):
    inputs = make_topk(CASES["plain"])
    options = {"ghost": ghost, "temperature": temperature}
    got, want = inputs.call(engine=engine, **options).loss, _dense(inputs, **options)
    torch.testing.assert_close(got, want.float())
    leaves = list(inputs.leaves.values())
    for a, b in zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_vocabulary_stored_is_the_dense_distance(engine, ghost):
    inputs = make_topk(CASES["all"])
    teacher = torch.empty_like(inputs.tensors["teacher_logprobs"]).scatter(
        -1, inputs.tensors["teacher_indices"], inputs.tensors["teacher_logprobs"]
    )
    hidden, head = inputs.leaves.values()
    want = logit_kl(hidden @ head.T, teacher).loss
    got = inputs.call(engine=engine, ghost=ghost).loss
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, head)),
        torch.autograd.grad(want, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("labels", ["none", "all"])
@pytest.mark.parametrize("ghost", [False, True])
def test_gradcheck_of_the_reference_engine(ghost, labels):
    case = OutputCase("", "", (7,), (9, 9), (3, 2), labels=labels, k=3, entries="some")
    inputs = make_topk(case).to(torch.float64)
    options = {"ghost": ghost, "student_softcap": 3.0, "mask": torch.rand(7)}
    options["temperature"] = 1.0 if ghost else 1.5
    options["ce_weight"] = 0.0 if labels == "none" else 0.4

    def loss(*_):
        return inputs.call(engine="reference", **options).loss

    assert torch.autograd.gradcheck(loss, list(inputs.leaves.values()))


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_copy_of_the_teacher_has_no_loss_and_no_gradient(engine, ghost):
    case = OutputCase("", "", vocab=(331, 331), widths=(24, 24), distance_to=0.0, k=16)
    inputs = make_topk(case)
    got = results(inputs, engine=engine, ghost=ghost)
    assert abs(got["loss"].item()) < 1e-6
    assert all(got[name].abs().max() < 2e-6 for name in inputs.leaves)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_ghost_teaches_all_other_tokens(engine):
    inputs = make_topk(CASES["plain"])
    stored = inputs.tensors["teacher_indices"].flatten()
    others = torch.ones(61, dtype=torch.bool).index_fill(0, stored, False)
    for ghost in (False, True):
        got = results(inputs, engine=engine, ghost=ghost)["student_head"][others]
        assert bool(got.any()) == (ghost and bool(others.any()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ghost", [False, True])
def test_order_and_padding_of_entries_do_not_matter(engine, ghost):
    inputs = make_topk(CASES["plain"])
    want = results(inputs, engine=engine, ghost=ghost)
    order = torch.randperm(7)
    t = inputs.tensors
    t["teacher_indices"] = F.pad(t["teacher_indices"], (0, 2), value=-1)[..., order].int()
    t["teacher_logprobs"] = F.pad(t["teacher_logprobs"], (0, 2), value=torch.nan)[..., order]
    for name, value in results(inputs, engine=engine, ghost=ghost).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ghost", [False, True])
def test_a_token_without_entries_has_distance_0(engine, ghost):
    inputs = make_topk(CASES["labels"])
    inputs.tensors["teacher_indices"][1, 3] = -1
    inputs.tensors["labels"][1, 3] = 5
    result = inputs.call(engine=engine, ghost=ghost, kl_weight=1.0, ce_weight=0.0)
    place = inputs.tensors["student_hidden"].shape[1] + 3
    assert abs(result.per_token[place]) < 1e-6
    with_ce = inputs.call(engine=engine, ghost=ghost, kl_weight=1.0, ce_weight=1.0)
    assert with_ce.per_token[place] > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("case_id", ["float", "biases", "some"])
def test_small_blocks_give_the_same_numbers(engine, ghost, case_id):
    inputs = make_topk(CASES[case_id], "bf16")
    inputs.options.pop("temperature", None)
    for block_bytes in (1, 3 * 4 * 61):
        check(inputs, engine, ghost=ghost, block_bytes=block_bytes)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case_id", ["holes", "ghost-float"])
def test_tokens_that_do_not_count_may_hold_anything(engine, case_id):
    inputs, hostile = make_topk(CASES[case_id]), make_topk(CASES[case_id])
    t = hostile.tensors
    away = t["mask"] == 0
    with torch.no_grad():
        t["student_hidden"].masked_fill_(away[..., None], torch.nan)
        t["teacher_logprobs"].masked_fill_(away[..., None], torch.nan)
        t["teacher_indices"].masked_fill_(away[..., None], 10**6)
        if t["labels"] is not None:
            t["labels"].masked_fill_(away, 10**6)
    want = results(inputs, engine=engine)
    for name, value in results(hostile, engine=engine).items():
        torch.testing.assert_close(value, want[name], rtol=0, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ghost", [False, True])
def test_nan_reaches_the_loss(engine, ghost):
    for name in ("student_hidden", "teacher_logprobs"):
        inputs = make_topk(CASES["plain"])
        with torch.no_grad():
            inputs.tensors[name][1, 7, 3] = torch.nan
        assert inputs.call(engine=engine, ghost=ghost).loss.isnan(), name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wanted", ["student_hidden", "student_head", "student_bias", "none"])
def test_only_what_is_trained_costs_a_gradient(engine, wanted):
    inputs = make_topk(CASES["biases"])
    t = inputs.tensors
    for name in inputs.trained:
        t[name].requires_grad_(name == wanted)
    t["teacher_logprobs"].requires_grad_()
    *_, grads = torch.ops.fakd.topk_kl(*inputs.call_lowered(lower, engine=engine))
    assert len(grads) == (wanted != "none")
    loss = inputs.call(engine=engine).loss
    assert loss.requires_grad == (wanted != "none")
    if wanted != "none":
        loss.backward()
        full = results(make_topk(CASES["biases"]), engine=engine)
        torch.testing.assert_close(4 * t[wanted].grad, full[wanted], rtol=1e-5, atol=1e-7)
    assert t["teacher_logprobs"].grad is None


@pytest.mark.parametrize("engine", ENGINES)
def test_learned_weights_receive_their_gradients(engine):
    check_learned_weights(make_topk(CASES["warm"]), engine)


def test_teacher_cache_of_another_tokenizer_is_refused():
    logprobs, indices = torch.randn(4, 100).log_softmax(-1).topk(50)
    with pytest.raises(ValueError, match=r"teacher_indices must be from 0 to 59.*tokenizer"):
        topk_kl(torch.randn(4, 8), torch.randn(60, 8), indices, logprobs)


def test_explain_says_who_serves():
    inputs = make_topk(CASES["plain"])
    text = explain("topk_kl", **inputs.tensors, ghost=True)
    assert "served by the cpu engine" in text
    assert "123 tokens, 12 wide, 5 entries and a ghost of a vocabulary of 61" in text
