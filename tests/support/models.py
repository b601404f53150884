"""Tiny random models of every family, built from their configs: nothing is downloaded."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 60

# Families whose last `hidden_states` entry in transformers is the output of a final norm.
FINAL_NORM = {
    "gpt2": "ln_f",
    "llama": "norm",
    "mistral": "norm",
    "qwen3": "norm",
    "gemma2": "norm",
    "modernbert": "final_norm",
    "gpt_neox": "final_layer_norm",
    "phi": "final_layernorm",
    "opt": "decoder.final_layer_norm",
}
FAMILIES = (
    "bert",
    "roberta",
    "distilbert",
    "mpnet",
    "deberta-v2",
    "electra",
    "albert",
    *FINAL_NORM,
)

_COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXTRA = {
    "distilbert": {"hidden_dim": 32},
    "electra": {"embedding_size": 8},
    "albert": {"embedding_size": 8, "num_hidden_groups": 2},
    "deberta-v2": {"conv_kernel_size": 3, "relative_attention": True},
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8},
    "modernbert": {"cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
}


def tiny_model(
    family: str = "bert",
    *,
    layers: int = 4,
    width: int = 16,
    labels: int | None = None,
    seed: int = 0,
    **options,
) -> PreTrainedModel:
    """A random model in eval mode, with a classification head where `labels` is given."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 2 * width} | _COMMON | _EXTRA.get(family, {})
    config = AutoConfig.for_model(family, **sizes | options)
    torch.manual_seed(seed)
    if labels is None:
        model = AutoModel.from_config(config)
    else:
        config.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def tiny_batch(
    rows: int = 3,
    tokens: int = 7,
    *,
    labels: int | None = None,
    seed: int = 0,
    padding: str = "right",
) -> dict:
    """Token ids with padding in the later rows: on the right, on the left, or none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(tokens, tokens - rows, -1).clamp_min(2)
    attention_mask = (torch.arange(tokens)[None] < lengths[:, None]).long()
    if padding == "left":
        attention_mask = attention_mask.flip(1)
    elif padding == "none":
        attention_mask = torch.ones_like(attention_mask)
    input_ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    batch: dict[str, Tensor] = {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
    }
    if labels is not None:
        batch["labels"] = torch.randint(0, labels, (rows,), generator=generator)
    return batch


def tiny_lm(
    family: str = "llama", *, layers: int = 6, width: int = 16, **options
) -> PreTrainedModel:
    """A random causal language model in eval mode."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 2 * width, "vocab_size": VOCABULARY, "pad_token_id": 0}
    sizes |= {"num_key_value_heads": 1} if family != "gpt2" else {}
    sizes |= {"head_dim": 8} if family in ("gemma2", "qwen3") else {}
    config = AutoConfig.for_model(
        family, max_position_embeddings=40, bos_token_id=1, eos_token_id=2, **sizes | options
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


class Adapted(nn.Module):
    """As peft wraps a model: forward names some entries, and hands on all.

    Its base_model has the head, and get_base_model the adapters too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model, self.config = nn.ModuleDict({"model": model}), model.config

    def get_base_model(self) -> PreTrainedModel:
        return self.base_model["model"]

    def get_output_embeddings(self) -> nn.Module | None:
        return self.get_base_model().get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.get_base_model().get_input_embeddings()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        entries = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return self.get_base_model()(**entries, **kwargs)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the form w0, w1, ...; other words are unknown."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    words = [f"w{index}" for index in range(VOCABULARY - len(special))]
    vocabulary = {word: index for index, word in enumerate(special + words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
