"""Compiled models: they compile in the first steps only, and learn what uncompiled ones learn."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.hooks import RemovableHandle

from fakd import (
    DistillConfig,
    Distiller,
    LinearKLLoss,
    capture_attention,
    capture_hidden_states,
)
from tests.support.models import tiny_batch, tiny_model
from tests.training.test_lm_head import causal_lm

# PyTorch hides it, but not where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def counter():
    """A backend that counts its graphs."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


def models() -> tuple[nn.Module, nn.Module]:
    """A teacher and a student, without dropout."""
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = tiny_model(layers=4, width=32, labels=3, seed=1, **options)
    student = tiny_model(layers=2, labels=3, seed=2, **options)
    for model in (teacher, student):
        # Models set it in their first step, and would compile once more for that.
        model.config.problem_type = "single_label_classification"
    return teacher, student


def make(teacher: nn.Module, student: nn.Module) -> Distiller:
    torch.manual_seed(3)
    return Distiller(teacher, student, mapping=[(0, 0), (1, 2), (2, 4)])


def student(backend) -> tuple[Distiller, Callable]:
    teacher, student = models()
    distiller = make(teacher, torch.compile(student, backend=backend))
    return distiller, distiller


def both_in_place(backend) -> tuple[Distiller, Callable]:
    teacher, student = models()
    teacher.compile(backend=backend)
    student.compile(backend=backend)
    distiller = make(teacher, student)
    return distiller, distiller


def distiller(backend) -> tuple[Distiller, Callable]:
    distiller = make(*models())
    return distiller, torch.compile(distiller, backend=backend)


@pytest.mark.parametrize("compiled", [student, both_in_place, distiller])
def test_steps_compile_nothing_anew(compiled, counter):
    distiller, call = compiled(counter)
    plain, counts = make(*models()), []
    for seed in range(4):
        batch = tiny_batch(labels=3, seed=seed)
        loss, expected = call(**batch).loss, plain(**batch).loss
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, [*distiller.parameters()])
        for got, want in zip(
            gradients, torch.autograd.grad(expected, [*plain.parameters()]), strict=True
        ):
            torch.testing.assert_close(got, want)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[1:] == counts[1:2] * 3
    for model in (distiller.teacher, distiller.student):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_scores_between_steps_compile_once(counter):
    distiller, call = student(counter)
    batch, counts = tiny_batch(labels=3), []
    expected = distiller.student._orig_mod(**batch).logits
    for _ in range(4):
        torch.testing.assert_close(call(**batch).logits, expected)
        with torch.no_grad():
            torch.testing.assert_close(distiller.student(**batch).logits, expected)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


def test_hooks_have_the_same_ids_in_equal_contexts():
    model = tiny_model()

    def ids() -> list[tuple[int, ...]]:
        return [(*m._forward_pre_hooks, *m._forward_hooks) for m in model.modules()]

    found = []
    for _ in range(2):
        with (
            capture_hidden_states(model, [1, 4]),
            capture_attention(model, [2]),
            capture_hidden_states(model, [1]),
        ):
            found.append(ids())
            model.register_forward_hook(lambda *_: None).remove()  # ids that others take
    assert found[0] == found[1]
    # On the encoder alone begin and end three contexts, and no id stands twice.
    assert sorted(map(len, found[0]))[-1] == 6
    assert not any(ids())
    kept = model.register_forward_hook(lambda *_: None)
    with capture_hidden_states(model, [1]):
        assert all(kept.id not in own for own in found[0])
    assert list(model._forward_hooks) == [kept.id]


def test_a_compiled_language_model_has_the_same_losses_and_runs_compiled(counter):
    teacher, student, config = causal_lm("llama"), causal_lm("qwen3"), DistillConfig(alpha=0.5)
    plain = Distiller.from_config(teacher, student, config)
    compiled = torch.compile(student, backend=counter)
    distiller = Distiller.from_config(teacher, compiled, config)
    assert isinstance(distiller.output, LinearKLLoss)
    distiller.feature = plain.feature
    counts = []
    for seed in range(3):
        batch = tiny_batch(seed=seed)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        assert distiller.counts(**batch) == plain.counts(**batch)
        before = counter.frame_count
        torch.testing.assert_close(distiller(**batch).logs, plain(**batch).logs)
        counts.append(counter.frame_count - before)
    assert counts == [1, 0, 0]


def test_ids_of_hooks_are_nobody_elses():
    """Those of PyTorch only ever rise: the hooks of other threads rely on it."""
    model, ids = tiny_model(layers=2), []
    for _ in range(3):
        with capture_hidden_states(model, [1, 2]):
            handle = model.register_forward_hook(lambda *_: None)
            ids.append(handle.id)
            handle.remove()
    assert ids == sorted(set(ids))
    assert max(ids) < RemovableHandle.next_id < 1 << 62
