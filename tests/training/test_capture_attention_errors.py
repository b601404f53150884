"""What attention capture refuses, and what it says."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, BertModel, T5Config, T5EncoderModel

from fakd import capture_attention, capture_hidden_states
from fakd.capture.masks import read_pattern
from tests.support.models import tiny_batch, tiny_model

CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def refused(model, match, layers=(2,), **batch):
    """Capture raises in forward, and the model runs as before."""
    with pytest.raises(RuntimeError, match=match), capture_attention(model, layers) as captured:
        model(**(batch or tiny_batch()))
    with torch.no_grad(), capture_hidden_states(model, [1]) as states:
        model(**(batch or tiny_batch()))
    assert list(states) == [1]
    return captured


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([], "layers must name at least one layer"),
        ([0, 1], r"from 1 \(the embeddings, 0, have no attention\) to 4: got 0; BertModel has 4"),
        ([5], "to 4: got 5"),
        ([True], "got True"),
    ],
)
def test_layers(layers, match):
    with pytest.raises(ValueError, match=match), capture_attention(tiny_model(), layers):
        pass


def test_an_absent_layer_says_what_to_do():
    model = tiny_model()
    with capture_attention(model, [1]) as captured:
        pass
    with pytest.raises(KeyError, match=r"layer 1 must be captured .* got layers \[\]; name it"):
        captured[1]


@pytest.mark.parametrize(
    ("family", "block"), [("mpnet", "MPNetLayer"), ("deberta-v2", "DebertaV2Layer")]
)
def test_models_without_the_attention_interface(family, block):
    refused(
        tiny_model(family),
        f"{block} must compute attention through the attention interface of transformers: got no "
        r"call of it in layers \[2\]; .* align hidden states instead",
    )


def test_xlnet():
    sizes = {"vocab_size": 60, "d_model": 16, "n_layer": 4, "n_head": 2, "d_inner": 32}
    model = AutoModel.from_config(AutoConfig.for_model("xlnet", **sizes)).eval()
    refused(model, "XLNetLayer must compute attention through")


def test_relative_position_bias():
    config = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = T5EncoderModel(config).eval()
    with (
        capture_attention(model, [1], path="encoder.block"),
        pytest.raises(RuntimeError, match=r"got a relative position bias \(position_bias\) in T5A"),
    ):
        model(**tiny_batch())


def test_attention_sinks():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = tiny_model("gpt_oss", head_dim=8, num_key_value_heads=1, **experts)
    refused(model, r"layer 2 must have attention that follows .* got attention sinks \(s_aux\)")


def test_softcap_under_sdpa():
    model = tiny_model("gemma2")
    model.config._attn_implementation = "sdpa"
    match = r"layer 1 must apply its softcap: .* load Gemma2Attention with attn_implementation='eag"
    with capture_attention(model, [1]), pytest.raises(RuntimeError, match=match):
        model(**tiny_batch())


def test_layer_drop():
    model = tiny_model("opt", layerdrop=1.0).train()
    with (
        capture_attention(model, [2]),
        pytest.raises(RuntimeError, match=r"\[2\] did not; switch LayerDrop off"),
    ):
        model(**tiny_batch())


def test_two_attentions_in_one_layer():
    model = tiny_model("albert", inner_group_num=2)
    refused(model, "layer 2 must compute attention once .* got a second call, by AlbertAttention")


def test_cross_attention():
    config = tiny_model().config
    config.is_decoder = config.add_cross_attention = True
    model = BertModel(config).eval()
    batch = tiny_batch() | {"encoder_hidden_states": torch.randn(3, 5, 16)}
    refused(model, "got 7 queries and 5 keys of BertCrossAttention; .* leave cross", **batch)
    # As many keys as queries do not hide it.
    batch["encoder_hidden_states"] = torch.randn(3, 7, 16)
    refused(model, "got 7 queries and 7 keys of BertCrossAttention|got a second call", **batch)


def test_filled_cache():
    model = tiny_model("llama")
    cache = model(**tiny_batch(padding="none"), use_cache=True).past_key_values
    batch = {"input_ids": torch.full((3, 2), 5), "past_key_values": cache}
    with (
        capture_attention(model, [2]),
        pytest.raises(RuntimeError, match=r"got 2 queries and 9 keys .* \(use_cache=False\)"),
    ):
        model(**batch)


def test_an_empty_cache_is_fine():
    model = tiny_model("mistral", sliding_window=3)
    with torch.no_grad(), capture_attention(model, [2]) as captured:
        model(**tiny_batch(), use_cache=True)
    assert captured[2].window == 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    # With a cache, transformers does not look for documents.
    batch = {"input_ids": torch.full((1, 7), 5), "position_ids": position_ids, "use_cache": False}
    refused(model, r"map \[1, 1, 7, 7\] of another pattern \(packed documents", **batch)


def test_custom_masks():
    model, ids = tiny_model("llama"), torch.full((2, 6), 5)
    mask = CAUSAL.expand(2, 1, 6, 6)
    with torch.no_grad(), capture_attention(model, [2]) as captured:
        model(input_ids=ids, attention_mask=mask)
    assert captured[2].is_causal
    prefix = mask | (torch.arange(6) < 3)
    refused(model, "another pattern .*a prefix", input_ids=ids, attention_mask=prefix)
    heads = torch.stack([CAUSAL, CAUSAL.T | CAUSAL]).expand(2, 2, 6, 6)
    refused(model, "the same for all heads", input_ids=ids, attention_mask=heads)
    bias = torch.zeros(2, 1, 6, 6).masked_fill(~CAUSAL, -torch.inf) + 0.5
    refused(model, r"adds other values to the scores", input_ids=ids, attention_mask=bias)


@pytest.mark.parametrize("where", ["model", "blocks"])
def test_compiled(where):
    model, batch = tiny_model(layers=2), tiny_batch()
    run = torch.compile(model, backend="eager") if where == "model" else model
    if where == "blocks":
        for block in model.encoder.layer:
            block.compile(backend="eager")
    with (
        torch.no_grad(),
        capture_attention(model, [1]),
        pytest.raises(RuntimeError, match=r"uncompiled: got a call inside torch\.compile; call"),
    ):
        run(**batch)


def test_another_model_may_be_compiled():
    model, other, batch = tiny_model(layers=2), tiny_model("gpt2", layers=2), tiny_batch()
    compiled = torch.compile(other, backend="eager")
    with torch.no_grad(), capture_attention(model, [1]) as captured:
        expected = other(**batch)[0]
        torch.testing.assert_close(compiled(**batch)[0], expected)
        model(**batch)
    assert list(captured) == [1]


class Foreign(nn.Module):
    """A model that is none of transformers."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 2})()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_foreign_models():
    model = Foreign()
    with (
        capture_attention(model, [1]),
        pytest.raises(RuntimeError, match="Linear must compute attention through the attention"),
    ):
        model(torch.randn(2, 4))


def pattern(mask, implementation="sdpa", *, is_causal=False, window=None, batch=2, tokens=6):
    found = read_pattern(
        implementation,
        mask,
        batch=batch,
        tokens=tokens,
        is_causal=is_causal,
        window=window,
    )
    return found.is_causal, found.window, found.mask


PADDING = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
DISTANCE = (torch.arange(6)[:, None] - torch.arange(6)).abs()


@pytest.mark.parametrize(
    ("implementation", "is_causal", "window", "expected"),
    [
        ("sdpa", True, None, (True, None)),
        ("sdpa", False, None, (False, None)),
        ("sdpa", True, 3, (True, None)),  # SDPA knows no window
        ("eager", True, 3, (False, None)),  # and eager functions nothing but their mask
        ("flash_attention_2", True, 3, (True, 3)),
        ("flash_attention_2", False, 6, (False, None)),  # hides nothing
        ("somebody's own", False, 2, (False, 2)),
    ],
)
def test_no_mask(implementation, is_causal, window, expected):
    found = pattern(None, implementation, is_causal=is_causal, window=window)
    assert found == (*expected, None)


@pytest.mark.parametrize("says_causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("form", ["bool", "additive"])
def test_maps_are_read_back(form, is_causal, window, says_causal):
    """Whatever the module says of itself: the mask decides."""
    shown = CAUSAL if is_causal else torch.ones_like(CAUSAL)
    if window is not None:
        shown = shown & (DISTANCE < window)
    whole = (shown & PADDING[:, None, None]).clone()
    if form == "additive":
        whole = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)
    causal, found, mask = pattern(whole, is_causal=says_causal)
    assert causal == (says_causal if window == 1 else is_causal)
    assert found == window
    assert torch.equal(mask, PADDING)


def test_large_maps_are_read_in_blocks(monkeypatch):
    monkeypatch.setattr("fakd.capture.masks._BLOCK_ENTRIES", 24)
    shown = (CAUSAL & (DISTANCE < 3)) & PADDING[:, None, None]
    causal, window, mask = pattern(shown)
    assert (causal, window) == (True, 3)
    assert torch.equal(mask, PADDING)
    shown = shown.clone()
    shown[1, 0, 5, 2] = True
    with pytest.raises(RuntimeError, match="of another pattern"):
        pattern(shown)


def test_windows_that_hide_nothing_are_none():
    short = torch.tensor([[True] * 3 + [False] * 3] * 2)
    assert pattern(short[:, None, None].expand(2, 1, 6, 6))[:2] == (False, None)
    assert pattern(short, "flash_attention_2", window=3)[:2] == (False, None)
    assert pattern(short, "flash_attention_2", window=2)[:2] == (False, 2)


@pytest.mark.parametrize("shape", [(1, 1, 1, 6), (2, 1, 1, 6), (1, 1, 6, 6), (2, 4, 6, 9)])
def test_maps_that_broadcast(shape):
    assert pattern(torch.ones(shape, dtype=torch.bool)) == (False, None, None)


def test_nothing_counts():
    _, window, mask = pattern(torch.zeros(2, 1, 6, 6, dtype=torch.bool))
    assert window is None
    assert not mask.any()


@pytest.mark.parametrize(
    ("mask", "implementation", "match"),
    [
        (torch.ones(2, 6), "sdpa", r"mask of 'sdpa' attention must be a map .* got \[2, 6\] torch"),
        (torch.ones(2, 5), "flash_attention_2", r"with B = 2 and T = 6: got \[2, 5\]"),
        (object(), "flex_attention", "got object; give the model the tokenizer's own"),
        (CAUSAL[None, None], "eager", r"got \[1, 1, 6, 6\] torch.bool"),
        (torch.ones(3, 1, 6, 6), "sdpa", r"must cover 2 rows of 6 tokens: got \[3, 1, 6, 6\]"),
        (torch.ones(2, 1, 6, 6).long(), "sdpa", "1 for tokens"),
        (~CAUSAL[None, None], "sdpa", "another pattern"),
    ],
)
def test_masks_that_cannot_be_read(mask, implementation, match):
    with pytest.raises(RuntimeError, match=match):
        pattern(mask, implementation)


def test_padding_between_tokens_under_flash_attention():
    mask = torch.tensor([[True, True, False, True, True, True]] * 2)
    assert pattern(mask, "flash_attention_2", is_causal=True)[:2] == (True, None)
    with pytest.raises(RuntimeError, match=r"padding at the ends .* got padding between tokens"):
        pattern(mask, "flash_attention_2", window=2)
