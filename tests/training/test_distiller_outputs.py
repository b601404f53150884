"""Output alignment inside the Distiller: heads, shift and padding are right by construction."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fakd import AttentionKLLoss, DistillConfig, Distiller, FeatureAlignmentLoss
from fakd.losses import LinearKLLoss, LogitKLLoss
from tests.support.models import tiny_batch, tiny_model
from tests.training.test_lm_head import FAMILIES, causal_lm


def lm_batch(side: str = "right") -> dict:
    batch = tiny_batch(3, 9)
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_has_no_loss_and_no_gradient(family, side):
    teacher = causal_lm(family)
    distiller = Distiller(teacher, copy.deepcopy(teacher), output=LinearKLLoss(temperature=2.0))
    loss = distiller(**lm_batch(side)).loss
    loss.backward()
    assert abs(loss.item()) < 1e-6
    for name, parameter in distiller.student.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-6, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_is_the_models_own(family, side):
    teacher, student = causal_lm(family), causal_lm(family)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = lm_batch(side)
    own = student(**batch).loss
    distiller = Distiller(teacher, student, output=LinearKLLoss(kl_weight=0.5, ce_weight=1.0))
    output = distiller(**batch)
    torch.testing.assert_close(output.logs["task"], own.detach())
    assert output.logits is None
    own_grads = torch.autograd.grad(own, list(student.parameters()), allow_unused=True)
    distiller = Distiller(teacher, student, output=LinearKLLoss(kl_weight=0.0, ce_weight=1.0))
    loss = distiller(**batch).loss
    grads = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
    for got, want in zip(grads, own_grads, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("with_labels", [True, False])
def test_kl_is_that_of_the_models_logits(with_labels):
    teacher, student = causal_lm("llama"), causal_lm("llama")
    with torch.no_grad():
        student.lm_head.weight.add_(torch.randn_like(student.lm_head.weight))
    batch = lm_batch()
    mask = batch["attention_mask"]
    labels = batch.pop("labels")
    ours, theirs = student(**batch).logits[:, :-1], teacher(**batch).logits[:, :-1]
    rows = F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="none").sum(-1)
    want = rows[mask[:, 1:].bool()].mean()
    distiller = Distiller(teacher, student, output=LinearKLLoss())
    got = distiller(**batch, **({"labels": labels} if with_labels else {}))
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(got.logs["soft"], want.detach())


def test_all_four_terms_at_once():
    teacher, student = causal_lm("llama"), causal_lm("llama")
    config = DistillConfig(alpha=0.7, beta=0.3, gamma=0.2, delta=0.1, temperature=2.0)
    distiller = Distiller.from_config(teacher, student, config)
    assert isinstance(distiller.output, LinearKLLoss)
    output = distiller(**lm_batch())
    terms = ["soft", "task", "cosine", "euclidean", "attention"]
    assert {*terms, *(f"weighted_{term}" for term in terms)} <= output.logs.keys()
    total = sum(output.logs[f"weighted_{term}"] for term in terms)
    torch.testing.assert_close(output.loss.detach(), total)
    output.loss.backward()


def test_classifiers_compare_their_logits():
    teacher, student = (tiny_model("bert", labels=3, seed=seed) for seed in (0, 1))
    batch = tiny_batch(4, labels=3)
    distiller = Distiller.from_config(
        teacher, student, DistillConfig(alpha=2.0, beta=0.0, delta=0.0, temperature=3.0)
    )
    assert isinstance(distiller.output, LogitKLLoss)
    assert distiller.pairs == []
    output = distiller(**batch)
    labels = batch.pop("labels")
    ours, theirs = student(**batch).logits, teacher(**batch).logits
    kl = F.kl_div((ours / 3).log_softmax(-1), (theirs / 3).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(output.loss, 18 * kl + F.cross_entropy(ours, labels))


def test_explicit_losses_together():
    teacher, student = causal_lm("gemma2"), causal_lm("gemma2")
    distiller = Distiller(
        teacher,
        student,
        mapping=[(1, 1), (2, 2)],
        feature=FeatureAlignmentLoss(16, 16, 2),
        attention=AttentionKLLoss(2),
        output=LinearKLLoss(ce_weight=1.0),
    )
    distiller(**lm_batch()).loss.backward()
    assert student.model.embed_tokens.weight.grad is not None


def test_next_tokens_are_counted_as_the_loss_does():
    distiller = Distiller(
        causal_lm("llama"), causal_lm("qwen3"), output=LinearKLLoss(ce_weight=1.0)
    )
    batch, found = lm_batch("left"), []
    batch["labels"][0, 3:5] = -100
    distiller.output.register_forward_hook(lambda _, __, result: found.append(result.tokens))
    distiller(**batch)
    counts = distiller.counts(**batch)
    assert counts["next_tokens"] == found[0]
    # The model's own loss knows no mask, and the padding has no label.
    assert counts["labels"] == (batch["labels"][:, 1:] != -100).sum()
    del batch["labels"]
    distiller.output.ce_weight = 0.0
    distiller(**batch)
    assert distiller.counts(**batch)["next_tokens"] == found[1] > found[0]


def test_tied_weights_have_one_name_in_what_is_saved():
    distiller, other = (
        Distiller(causal_lm("llama"), causal_lm("qwen3"), output=LinearKLLoss()) for _ in range(2)
    )
    state = distiller.state_dict()
    assert "student.model.embed_tokens.weight" in state
    assert "student.lm_head.weight" not in state
    with torch.no_grad():
        other.student.lm_head.weight.zero_()
    other.load_state_dict(state)
    assert other.student.lm_head.weight is other.student.model.embed_tokens.weight
    assert torch.equal(other.student.lm_head.weight, distiller.student.lm_head.weight)


def test_an_output_loss_needs_a_teacher():
    with pytest.raises(ValueError, match="output must come with a teacher"):
        Distiller(None, causal_lm("llama"), output=LinearKLLoss())
