"""Heads of causal language models: what was found gives the model's own logits."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fakd.lm_head import check_lm_head, find_lm_head, is_causal_lm
from tests.support.models import tiny_model

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
FAMILIES = {
    "gpt2": {},
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},
}


def causal_lm(family: str, **changes):
    names = SIZES if family not in ("gpt2",) else {**SIZES, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = AutoConfig.for_model(family, **names | FAMILIES[family] | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own(family):
    model = causal_lm(family)
    assert is_causal_lm(model)
    ids = torch.randint(3, 60, (2, 5))
    head = find_lm_head(model)
    hidden = model.base_model(input_ids=ids)[0]
    torch.testing.assert_close(head.logits(hidden), model(input_ids=ids).logits)
    check_lm_head(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_logits_are_not_rounded(family, dtype):
    model = causal_lm(family).to(dtype)
    head, hidden = find_lm_head(model), torch.randn(7, 16, dtype=dtype)
    truth = find_lm_head(model.double()).logits(hidden.double())
    model.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head.exact_logits(hidden)
    torch.testing.assert_close(logits, truth.float(), rtol=1e-5, atol=1e-5)


def test_unknown_treatment_of_logits_is_refused():
    model = causal_lm("gemma2")
    model.config.final_logit_softcapping = 2.0
    head = model.lm_head
    head.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="as a linear head does"):
        check_lm_head(model)


def test_encoders_have_no_lm_head():
    model = tiny_model("bert")
    assert not is_causal_lm(model)
    with pytest.raises(
        ValueError, match=r"must have an LM head that is a torch.nn.Linear.*NoneType"
    ):
        find_lm_head(model)
