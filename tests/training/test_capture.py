"""Capture: the model's own hidden states, with gradients, and no hook left behind."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fakd import capture_hidden_states
from fakd.architectures import find_blocks
from tests.support.models import FAMILIES, FINAL_NORM, tiny_batch, tiny_model


def hook_count(model) -> int:
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_output_hidden_states(family):
    model, batch = tiny_model(family), tiny_batch()
    with torch.no_grad(), capture_hidden_states(model, range(5)) as states:
        theirs = model(**batch, output_hidden_states=True).hidden_states
    assert sorted(states) == list(range(5))
    for layer in range(4):
        assert torch.equal(states[layer], theirs[layer])
    last = states[4]
    if family in FINAL_NORM:
        assert not torch.equal(last, theirs[4])
        last = model.get_submodule(FINAL_NORM[family])(last)
    assert torch.equal(last, theirs[4])


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "albert"])
def test_same_states_with_a_head(family):
    model, batch = tiny_model(family, labels=3), tiny_batch()
    model.config.pad_token_id = 0
    with torch.no_grad():
        with capture_hidden_states(model, [2]) as states:
            model(**batch)
        with capture_hidden_states(model.base_model, [2]) as base_states:
            model.base_model(**batch)
    assert torch.equal(states[2], base_states[2])


def test_only_chosen_layers():
    model = tiny_model()
    before = hook_count(model)
    with capture_hidden_states(model, [2]) as states:
        assert hook_count(model) == before + 3  # one block, and two on the module that runs them
        model(**tiny_batch())
    assert list(states) == [2]


def test_gradients_flow_through_the_captured_tensor():
    model = tiny_model()
    with capture_hidden_states(model, [1, 2]) as states:
        model(**tiny_batch())
    states[2].square().sum().backward()
    first, second, third, _ = find_blocks(model).modules
    for block in (first, second):
        assert all(parameter.grad is not None for parameter in block.parameters())
    assert all(parameter.grad is None for parameter in third.parameters())


def test_last_forward_wins_and_states_outlive_the_context():
    model = tiny_model()
    with torch.no_grad(), capture_hidden_states(model, [1]) as states:
        assert states == {}
        model(**tiny_batch(seed=1))
        first = states[1]
        model(**tiny_batch(seed=2))
    assert not torch.equal(states[1], first)
    second = states[1]
    model(**tiny_batch(seed=3))
    assert states[1] is second


def test_no_hook_left_behind():
    model = tiny_model()
    before = hook_count(model)
    with capture_hidden_states(model, [0, 4]):
        model(**tiny_batch())
    assert hook_count(model) == before
    with pytest.raises(IndexError), capture_hidden_states(model, [0, 4]) as states:
        model(input_ids=torch.tensor([[10**6]]))
    assert hook_count(model) == before
    assert states == {}


def test_error_inside_a_block_is_the_one_that_is_raised():
    model = tiny_model()
    before = hook_count(model)
    find_blocks(model).modules[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), capture_hidden_states(model, [4]):
        model(**tiny_batch())
    assert hook_count(model) == before + 1


def test_two_models_and_two_contexts_at_once():
    student, teacher, batch = tiny_model(layers=2), tiny_model("gpt2", seed=1), tiny_batch()
    with (
        torch.no_grad(),
        capture_hidden_states(student, [1, 2]) as ours,
        capture_hidden_states(teacher, [4]) as theirs,
        capture_hidden_states(student, [2]) as again,
    ):
        student(**batch)
        teacher(**batch)
    assert sorted(ours) == [1, 2]
    assert sorted(theirs) == [4]
    assert again[2] is ours[2]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing(family, use_reentrant):
    batch, grads = tiny_batch(), []
    for is_checkpointed in (False, True):
        model = tiny_model(family).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if is_checkpointed:
            checkpointing = functools.partial(checkpoint, use_reentrant=use_reentrant)
            model._set_gradient_checkpointing(True, checkpointing)
            model.enable_input_require_grads()
        with capture_hidden_states(model, [0, 2]) as states:
            model(**batch)
            captured = dict(states)
            sum(state.square().sum() for state in states.values()).backward()
        # What backward ran again was not captured.
        assert all(states[layer] is captured[layer] for layer in (0, 2))
        grads.append([p.grad for p in find_blocks(model).modules[1].parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_checkpointing_that_hides_gradients_is_refused():
    # Older transformers checkpoint around a block's hooks; so may any model.
    model = tiny_model().train()
    block = find_blocks(model).modules[3]
    block.forward = functools.partial(_checkpointed_inside, block.forward)
    with (
        capture_hidden_states(model, [4]),
        pytest.raises(RuntimeError, match="layer 4 must be captured with its gradients"),
    ):
        model(**tiny_batch())


def _checkpointed_inside(forward, *args, **kwargs):
    with torch.no_grad():
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def test_frozen_layers_are_not_mistaken_for_hidden_gradients():
    model = tiny_model().requires_grad_(False)
    with capture_hidden_states(model, [4]) as states:
        model(**tiny_batch())
    assert not states[4].requires_grad


def test_compiled_inside_the_context():
    model, batch = tiny_model(layers=2), tiny_batch()
    with torch.no_grad(), capture_hidden_states(model, [1, 2]) as states:
        model(**batch)
        plain = dict(states)
        torch.compile(model, backend="eager")(**batch)
    for layer in (1, 2):
        torch.testing.assert_close(states[layer], plain[layer])


def test_skipped_layer():
    model = tiny_model("opt", layerdrop=1.0).train()
    with (
        capture_hidden_states(model, [2]),
        pytest.raises(RuntimeError, match=r"\[2\] did not; switch LayerDrop off"),
    ):
        model(**tiny_batch())


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([], "layers must name at least one layer"),
        ([5], r"integers from 0 \(embeddings\) to 4: got 5; BertModel has 4 blocks"),
        ([-1], "got -1"),
        ([1.0], "got 1.0"),
    ],
)
def test_errors(layers, match):
    with pytest.raises(ValueError, match=match), capture_hidden_states(tiny_model(), layers):
        pass
