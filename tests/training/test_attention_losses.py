"""`AttentionKLLoss` and `RelationKLLoss`: what they compute, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fakd import AttentionInputs, AttentionKLLoss, RelationKLLoss, capture_attention
from tests.support.models import tiny_batch, tiny_model

MASK = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])


def inputs(heads=4, width=8, *, key_heads=None, seed=0, **options) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)

    def randn(count: int) -> Tensor:
        return torch.randn(2, count, 6, width, generator=generator).requires_grad_()

    key_heads = key_heads or heads
    fields = {"scale": width**-0.5, "softcap": None, "is_causal": False, "window": None}
    return AttentionInputs(
        randn(heads), randn(key_heads), randn(key_heads), **fields | {"mask": MASK} | options
    )


def maps(one: AttentionInputs) -> Tensor:
    """Attention probabilities [B, H, T, T], as a model computes them."""
    key = one.key.repeat_interleave(one.query.shape[1] // one.key.shape[1], 1)
    scores = one.query @ key.mT * one.scale
    if one.softcap is not None:
        scores = one.softcap * torch.tanh(scores / one.softcap)
    i, j = torch.arange(6)[:, None], torch.arange(6)
    shown = (j <= i) if one.is_causal else (i == i) & (j == j)
    if one.window is not None:
        shown = shown & ((i - j).abs() < one.window)
    shown = shown & MASK[:, None, None] | (i == j)
    return scores.masked_fill(~shown, -torch.inf).softmax(-1)


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    shown = teacher > 0
    rows = (teacher * (teacher.where(shown, 1).log() - student.where(shown, 1).log())).sum(-1)
    return rows.transpose(1, 2)[MASK].mean()


def grads(loss: Tensor, sides) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [tensor for one in sides for tensor in (one.query, one.key)])


def test_value_and_gradients_of_unlike_pairs():
    """Windows, softcaps, scales and heads differ from pair to pair, in one call."""
    options = [
        {"is_causal": True, "window": 3},
        {"is_causal": True},
        {"softcap": 2.0, "scale": 0.5, "key_heads": 2},
    ]
    student = [inputs(seed=index, **one) for index, one in enumerate(options)]
    teacher = [inputs(width=16, seed=9 + index, **one) for index, one in enumerate(options)]
    weights = [0.2, 1.0, 2.0]
    loss = AttentionKLLoss(3, weight=0.5, pair_weights=weights)
    result = loss(student, teacher)
    terms = [
        kl(maps(theirs).detach(), maps(ours)) for ours, theirs in zip(student, teacher, strict=True)
    ]
    expected = 0.5 * sum(weight * term for weight, term in zip(weights, terms, strict=True))
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.per_pair, torch.stack(terms).detach())
    torch.testing.assert_close(grads(result.loss, student), grads(expected, student))
    logs = loss.logs(result)
    assert list(logs) == ["attention", "weighted_attention"]
    torch.testing.assert_close(logs["weighted_attention"], result.loss.detach())
    torch.testing.assert_close(logs["weighted_attention"], 0.5 * logs["attention"])
    assert not any(value.requires_grad for value in logs.values())


def test_head_rules():
    few, many, other = inputs(2), inputs(4, seed=1), inputs(4, seed=2)
    mean = kl(maps(many).mean(1, keepdim=True), maps(few).mean(1, keepdim=True))
    for heads in ("mean", "auto"):
        torch.testing.assert_close(AttentionKLLoss(1, heads=heads)([few], [many]).loss, mean)
    matched = kl(maps(many), maps(other))
    for heads in ("match", "auto", [0, 1, 2, 3]):
        torch.testing.assert_close(AttentionKLLoss(1, heads=heads)([other], [many]).loss, matched)
    chosen = kl(maps(many)[:, [3, 0]], maps(few))
    torch.testing.assert_close(AttentionKLLoss(1, heads=[3, 0])([few], [many]).loss, chosen)
    # One pair of unequal counts decides for all.
    both = AttentionKLLoss(2, heads="auto")([few, other], [many, many])
    torch.testing.assert_close(both.per_pair[0], mean.detach())
    assert [len(values) for values in both.per_head] == [1, 1]


@pytest.mark.parametrize("distance", ["kl", "reverse_kl", "jsd", "mse"])
def test_settings_reach_the_op(distance):
    loss = AttentionKLLoss(1, distance=distance, temperature=2.0, engine="reference")
    ours, theirs = inputs(), inputs(seed=1)
    once = loss([ours], [theirs]).loss
    twice = loss([ours], [theirs], normalizer=20).loss
    torch.testing.assert_close(twice, once * 4 * 10 / 20)
    assert float(loss([ours], [ours]).loss.detach()) == pytest.approx(0, abs=1e-7)


def test_row_weights():
    ours, theirs = inputs(), inputs(seed=1)
    loss = AttentionKLLoss(1)
    ones = MASK.float()
    torch.testing.assert_close(loss([ours], [theirs], ones).loss, loss([ours], [theirs]).loss)
    first = ones * torch.tensor([[1.0], [1e-9]])
    alone = [
        replace(one, query=one.query[:1], key=one.key[:1], mask=None) for one in (ours, theirs)
    ]
    expected = loss(*([one] for one in alone)).loss
    torch.testing.assert_close(loss([ours], [theirs], first).loss, expected)
    everyone = replace(ours, mask=None), replace(theirs, mask=torch.ones_like(MASK))
    assert loss([everyone[0]], [everyone[1]]).loss.isfinite()


def relation_by_hand(ours: Tensor, theirs: Tensor, heads: int) -> Tensor:
    """arXiv 2012.15828, section 3.1, with padding."""
    probabilities = []
    for x in (ours, theirs.detach()):
        joined = x.transpose(1, 2).reshape(2, 6, -1)
        width = joined.shape[-1] // heads
        split = torch.stack(joined.split(width, dim=-1), 1)  # [B, heads, T, width]
        scores = split @ split.mT / width**0.5
        probabilities.append(scores.masked_fill(~MASK[:, None, None], -torch.inf).softmax(-1))
    return kl(probabilities[1], probabilities[0])


def test_relations():
    student = [inputs(2, 6, seed=index) for index in range(2)]
    teacher = [inputs(6, 4, key_heads=3, seed=5 + index) for index in range(2)]
    loss = RelationKLLoss(2, 3, weight=2.0, pair_weights=[0.25, 1.0])
    result = loss(student, teacher)
    terms = {
        name: [
            relation_by_hand(getattr(ours, field), getattr(theirs, field), 3)
            for ours, theirs in zip(student, teacher, strict=True)
        ]
        for name, field in (("q", "query"), ("k", "key"), ("v", "value"))
    }
    expected = {name: 0.25 * first + second for name, (first, second) in terms.items()}
    mean = sum(expected.values()) / 3
    torch.testing.assert_close(result.loss, 2 * mean)
    leaves = [getattr(one, field) for one in student for field in ("query", "key", "value")]
    torch.testing.assert_close(
        torch.autograd.grad(result.loss, leaves), torch.autograd.grad(2 * mean, leaves)
    )
    logs = loss.logs(result)
    assert list(logs) == [
        "relation_q",
        "relation_k",
        "relation_v",
        "relation",
        "weighted_relation",
    ]
    torch.testing.assert_close(logs["relation_v"], expected["v"].detach())
    torch.testing.assert_close(logs["weighted_relation"], result.loss.detach())
    some = RelationKLLoss(2, 3, relations=("k",))(student, teacher)
    torch.testing.assert_close(some.loss, sum(terms["k"]) / 2)


def test_relations_of_models():
    """Heads, key heads and widths differ; only divisors must agree."""
    student = tiny_model("llama", layers=2)
    teacher = tiny_model("qwen3", num_attention_heads=6, head_dim=4, num_key_value_heads=2)
    batch = tiny_batch()
    with torch.no_grad(), capture_attention(teacher, [2, 4], values=True) as theirs:
        teacher(**batch)
    with capture_attention(student, [1, 2], values=True) as ours:
        student(**batch)
    loss = RelationKLLoss(2, 4)
    assert loss.needs_values
    assert not RelationKLLoss(2, 4, relations=("q", "k")).needs_values
    result = loss([ours[1], ours[2]], [theirs[2], theirs[4]])
    result.loss.backward()
    assert student.layers[1].self_attn.v_proj.weight.grad.abs().sum() > 0
    assert student.layers[1].self_attn.o_proj.weight.grad is None


def test_read_well():
    assert AttentionKLLoss(3, heads="auto", weight=0.5).extra_repr() == (
        "3 pairs, heads=auto, distance=kl, temperature=1, weight=0.5"
    )
    assert RelationKLLoss(1, 12, relations=("q", "v")).extra_repr() == (
        "1 pairs, relation_heads=12, relations=qv, distance=kl, temperature=1, weight=1"
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AttentionKLLoss(0), "pairs must be an integer >= 1: got 0"),
        (lambda: AttentionKLLoss(1.0), r"pairs must be an integer >= 1: got 1\.0"),
        (lambda: AttentionKLLoss(1, heads="all"), "heads must be one of 'match', 'mean', 'auto'"),
        (lambda: AttentionKLLoss(1, distance="cosine"), "distance must be one of 'kl', "),
        (lambda: AttentionKLLoss(1, temperature=0.0), "temperature must be finite and > 0: got 0"),
        (lambda: AttentionKLLoss(1, weight=-1.0), "weight must be a finite number >= 0: got -1"),
        (lambda: AttentionKLLoss(2, pair_weights=[1]), "pair_weights must have one entry per"),
        (lambda: RelationKLLoss(1, 0), "relation_heads must be an integer >= 1: got 0"),
        (lambda: RelationKLLoss(1, 4, relations=()), r"each of its relations once: got \[\]"),
        (lambda: RelationKLLoss(1, 4, relations=("q", "q")), r"once: got \['q', 'q'\]"),
        (lambda: RelationKLLoss(1, 4, relations=("q", "o")), "one of 'q', 'k', 'v': got 'o'"),
    ],
)
def test_impossible_settings(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"is_causal": True}, "pair 0 must both be causal, or neither: got False and True"),
        ({"window": 3}, "pair 0 must have the same window: got None and 3; map layers"),
        ({"mask": None}, "must count the same tokens: got masks that differ"),
        ({"mask": MASK.flip(1)}, "must count the same tokens"),
        ({"heads": 2}, r"heads='match' must have equal head counts in pair 0: got 4 .* and 2"),
    ],
)
def test_sides_that_do_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        AttentionKLLoss(1)([inputs()], [inputs(**options)])


def test_impossible_inputs():
    loss, ours, theirs = AttentionKLLoss(1), inputs(), inputs(seed=1)
    with pytest.raises(ValueError, match="teacher must have one entry per layer pair: got 2 for 1"):
        loss([ours], [theirs, theirs])
    with pytest.raises(
        TypeError, match=r"student must be a list of AttentionInputs.* got Attention"
    ):
        loss(ours, [theirs])
    with pytest.raises(TypeError, match="got list of others; pass what capture_attention gives"):
        loss([ours], [theirs.query])
    short = replace(theirs, query=theirs.query[:, :, 1:], key=theirs.key[:, :, 1:])
    with pytest.raises(
        ValueError, match=r"see the same tokens.* got \(2, 6\) and \(2, 5\); use one"
    ):
        loss([ours], [short])
    with pytest.raises(ValueError, match="mask must be 0 exactly where the models of pair 0 mask"):
        loss([ours], [theirs], torch.ones(2, 6))
    with pytest.raises(
        ValueError, match=r"relation_heads must divide .* got 5 for 32 in the query"
    ):
        RelationKLLoss(1, 5)([ours], [theirs])
    with pytest.raises(ValueError, match=r"student\[0\] must hold values .* values=True"):
        RelationKLLoss(1, 4)([replace(ours, value=None)], [theirs])


def test_encoder_and_decoder_do_not_compare():
    student, teacher, batch = tiny_model("bert"), tiny_model("gpt2"), tiny_batch()
    with torch.no_grad():
        with capture_attention(student, [1]) as ours:
            student(**batch)
        with capture_attention(teacher, [1]) as theirs:
            teacher(**batch)
    with pytest.raises(ValueError, match="both be causal, or neither: got False and True; align"):
        AttentionKLLoss(1)([ours[1]], [theirs[1]])
