"""Attention capture beside everything else: nothing mixes, and nothing stays behind."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fakd import AttentionKLLoss, Distiller, capture_attention, capture_hidden_states
from fakd.architectures import find_blocks
from tests.support.models import tiny_batch, tiny_model


def state_of(*models) -> list:
    """Everything that capture could have left behind."""
    hooks = [
        len(hooks)
        for model in models
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    forwards = [module.__dict__.get("forward") for model in models for module in model.modules()]
    return [
        hooks,
        forwards,
        [copy.deepcopy(model.config.to_dict()) for model in models],
        [model.config._attn_implementation for model in models],
        dict(ALL_ATTENTION_FUNCTIONS),
        dict(ALL_MASK_ATTENTION_FUNCTIONS),
        AttentionInterface.get_interface,
    ]


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def loss_of(captured: dict, layers, seed: int = 5) -> torch.Tensor:
    """The loss against a fixed random teacher of the same shapes."""
    generator = torch.Generator().manual_seed(seed)

    def random_like(tensor):
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    ours = [captured[layer] for layer in layers]
    theirs = [
        type(one)(**vars(one) | {"query": random_like(one.query), "key": random_like(one.key)})
        for one in ours
    ]
    return AttentionKLLoss(len(layers))(ours, theirs).loss


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nothing_is_left_behind_and_nothing_changes(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    before, expected = state_of(model), model(**tiny_batch())[0]
    with capture_attention(model, [1, 4]) as captured:
        assert captured == {}
        output = model(**tiny_batch())[0]
        assert model.config._attn_implementation == implementation
    assert torch.equal(output, expected)
    assert state_of(model) == before
    again = model(**tiny_batch(seed=1))[0]
    assert again.shape == expected.shape
    assert sorted(captured) == [1, 4]


def test_nothing_is_left_behind_by_errors():
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(IndexError), capture_attention(model, [1]) as captured:
        model(input_ids=torch.tensor([[10**6]]))
    assert captured == {}
    handle = find_blocks(model).modules[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), capture_attention(model, [4]):
        model(**tiny_batch())
    handle.remove()
    with pytest.raises(KeyboardInterrupt), capture_attention(model, [4]):
        raise KeyboardInterrupt
    assert state_of(model) == before


def test_the_last_forward_wins():
    model = tiny_model()
    with torch.no_grad(), capture_attention(model, [1]) as captured:
        model(**tiny_batch(seed=1))
        first = captured[1]
        model(**tiny_batch(seed=2))
    second = captured[1]
    assert not torch.equal(first.query, second.query)
    model(**tiny_batch(seed=3))
    assert captured[1] is second


def test_contexts_nest_and_close_in_any_order():
    model, batch = tiny_model(), tiny_batch()
    before = state_of(model)
    first, second = capture_attention(model, [1, 2]), capture_attention(model, [2])
    outer, inner = first.__enter__(), second.__enter__()
    with torch.no_grad():
        model(**batch)
    assert sorted(outer) == [1, 2]
    assert inner[2].query is outer[2].query
    kept = outer[2]
    first.__exit__(None, None, None)
    with torch.no_grad():
        model(**batch)
    assert outer[2] is kept
    assert inner[2].query is not kept.query
    second.__exit__(None, None, None)
    assert state_of(model) == before


def test_models_of_one_class_and_one_config_do_not_mix():
    teacher = tiny_model("llama", seed=1)
    student = type(teacher)(teacher.config).eval()
    batch, before = tiny_batch(), state_of(teacher, student)
    with torch.no_grad():
        with capture_attention(teacher, [1, 3]) as alone:
            teacher(**batch)
        with (
            capture_attention(teacher, [1, 3]) as theirs,
            capture_attention(student, [2]) as ours,
        ):
            teacher(**batch)
            assert ours == {}
            student(**batch)
    assert (sorted(theirs), sorted(ours)) == ([1, 3], [2])
    assert torch.equal(theirs[3].key, alone[3].key)
    assert state_of(teacher, student) == before


def test_beside_captured_hidden_states():
    model, batch = tiny_model("qwen3"), tiny_batch()
    with (
        torch.no_grad(),
        capture_hidden_states(model, [1, 4]) as states,
        capture_attention(model, [1, 4]) as inputs,
    ):
        model(**batch)
    with torch.no_grad(), capture_hidden_states(model, [1, 4]) as alone:
        model(**batch)
    assert torch.equal(states[4], alone[4])
    assert sorted(inputs) == [1, 4]


def test_layers_share_one_mask():
    model = tiny_model()
    with torch.no_grad(), capture_attention(model, [1, 2]) as captured:
        model(**tiny_batch())
    assert captured[1].mask is captured[2].mask


@pytest.mark.parametrize("backward", ["inside", "after"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradient_checkpointing(family, implementation, backward):
    grads = []
    for is_checkpointed in (False, True):
        model = without_dropout(tiny_model(family, initializer_range=0.3))
        model.set_attn_implementation(implementation)
        if is_checkpointed:
            # Checkpoints compare what is computed again with what was: other ops would be an error.
            non_reentrant = functools.partial(checkpoint, use_reentrant=False)
            model._set_gradient_checkpointing(True, non_reentrant)
        with capture_attention(model, [2, 4]) as captured:
            output = model(**tiny_batch())[0]
            kept = dict(captured)
            loss = loss_of(captured, [2, 4]) + output.square().mean()
            if backward == "inside":
                loss.backward()
        if backward == "after":
            loss.backward()
        assert all(captured[layer] is kept[layer] for layer in (2, 4))
        grads.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_reentrant_checkpointing_is_refused():
    model = without_dropout(tiny_model())
    reentrant = functools.partial(checkpoint, use_reentrant=True)
    model._set_gradient_checkpointing(True, reentrant)
    model.enable_input_require_grads()
    with (
        capture_attention(model, [2]),
        pytest.raises(RuntimeError, match="layer 2 must be captured with its gradients: reentrant"),
    ):
        model(**tiny_batch())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_autocast(family):
    model, batch = tiny_model(family, initializer_range=0.3), tiny_batch()
    losses, grads = [], []
    for is_enabled in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=is_enabled),
            capture_attention(model, [1, 2]) as captured,
        ):
            model(**batch)
            loss = loss_of(captured, [1, 2])
        # Rotary embedding is computed in float32 by transformers.
        is_half = is_enabled and family == "bert"
        assert captured[1].key.dtype == (torch.bfloat16 if is_half else torch.float32)
        losses.append(float(loss.detach()))
        grads.append(torch.autograd.grad(loss, find_blocks(model).modules[0].parameters()))
        assert loss.dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    plain, half = (torch.cat([grad.flatten() for grad in side]) for side in grads)
    assert F.cosine_similarity(plain, half, dim=0) > 0.98


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(one_process):
    def grads_of(wrap) -> list:
        student = tiny_model("bert", layers=2, labels=3, seed=2)
        distiller = Distiller(
            tiny_model("bert", labels=3, seed=1), student, attention=AttentionKLLoss(2)
        )
        module = wrap(distiller.eval())
        for seed in (1, 2):
            module(**tiny_batch(labels=3, seed=seed)).loss.backward()
        return [parameter.grad for parameter in student.parameters()]

    for plain, parallel in zip(
        grads_of(lambda module: module), grads_of(DistributedDataParallel), strict=True
    ):
        torch.testing.assert_close(parallel, plain)


def test_model_inside_distributed_data_parallel(one_process):
    model, batch = tiny_model(labels=3), tiny_batch(labels=3)
    parallel = DistributedDataParallel(model)
    with capture_attention(model, [3]) as alone:
        model(**batch)
    with capture_attention(parallel, [3]) as captured:
        output = parallel(**batch)
        (loss_of(captured, [3]) + output.loss).backward()
    assert torch.equal(captured[3].query, alone[3].query)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_flash_attention_runs_under_its_own_name(monkeypatch):
    """A stand-in of its interface: mask [B, T], window as an argument, name from the config."""
    calls = []

    def flash(module, query, key, value, attention_mask, scaling=None, **options):
        calls.append((module.config._attn_implementation, attention_mask, options))
        i = torch.arange(query.shape[2])
        shown = attention_mask[:, None, None] & (i[:, None] >= i)
        shown = (shown & ((i[:, None] - i) < options["sliding_window"])) | torch.eye(len(i)).bool()
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        output = F.scaled_dot_product_attention(query, key, value, shown, scale=scaling)
        return output.transpose(1, 2), None

    model, batch = tiny_model("mistral", sliding_window=3), tiny_batch()
    with torch.no_grad(), capture_attention(model, [1, 4]) as expected:
        output = model(**batch)[0]
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    model.config._attn_implementation = "flash_attention_2"
    with torch.no_grad(), capture_attention(model, [1, 4]) as captured:
        under_flash = model(**batch)[0]
    counted = batch["attention_mask"].bool()
    torch.testing.assert_close(under_flash[counted], output[counted])
    assert len(calls) == 4
    name, mask, options = calls[0]
    assert name == "flash_attention_2"
    assert torch.equal(mask, counted)
    assert options["sliding_window"] == 3
    for layer in (1, 4):
        got, want = captured[layer], expected[layer]
        assert (got.is_causal, got.window, got.scale) == (want.is_causal, want.window, want.scale)
        assert torch.equal(got.mask, want.mask)
