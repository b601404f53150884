"""The head of a causal language model: hidden states that enter it, and what it does to them."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .architectures import inner_model
from .batch import argument_names, is_encoder_decoder

# What configs call the factor of the logits; "logits_scaling" (Granite) divides.
_FACTORS = ("logit_scale", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
# Classes that predict next tokens end so: multimodal ones are "ForConditionalGeneration".
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "BertGenerationDecoder")
# Among them `config.model_type` of those whose labels stand at their own places: decoders of what
# also comes with an encoder, and a few of their own.
_UNSHIFTED = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "flaubert", "marian"),
    *("mbart", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper", "xlm", "xlnet"),
}
_ENLARGED = 128  # a power of 2 rounds nothing
_WIDENED_ROWS = 8192  # of a head in half precision, in float32 at a time


@dataclass(frozen=True)
class LMHead:
    """logits = softcap(factor * (h W^T) + bias), softcap(x) = cap tanh(x / cap) where it is one."""

    weight: Tensor  # [V, D], the embedding's own where they are tied
    bias: Tensor | None  # [V]
    factor: float
    softcap: float | None

    def scaled(self, hidden: Tensor) -> Tensor:
        """Hidden states with the factor, so that a plain product with `weight` follows."""
        return hidden if self.factor == 1 else hidden * self.factor

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits as models compute them, in the dtype of the head."""
        return self._capped(nn.functional.linear(self.scaled(hidden), self.weight, self.bias))

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 of hidden [N, D] of any dtype, under autocast too.

        Rounded to half precision, the likeliest entries of a row would tie.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.is_cuda and hidden.dtype == self.weight.dtype != torch.float32:
                logits = torch.mm(hidden, self.weight.T, out_dtype=torch.float32)
            else:  # the head is widened part by part
                wide = hidden.float()
                parts = self.weight.split(_WIDENED_ROWS)
                logits = torch.cat([wide @ part.float().T for part in parts], 1)
            logits = logits * self.factor
            if self.bias is not None:
                logits = logits + self.bias.float()
            return self._capped(logits)

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model predicts the next token of a vocabulary, and shifts labels in its loss."""
    model = inner_model(model)
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        return False
    if is_encoder_decoder(model) or model.config.model_type in _UNSHIFTED:
        return False
    return any(each.__name__.endswith(_CAUSAL) for each in type(model).__mro__)


def takes_text_alone(model: nn.Module) -> bool:
    """Whether forward runs from token ids, where some multimodal models must have an image too."""
    parameters = inspect.signature(inner_model(model).forward).parameters.values()
    named = (each for each in parameters if each.kind is not each.VAR_KEYWORD)
    return all(each.default is not each.empty or each.name == "input_ids" for each in named)


def body_of(model: nn.Module) -> nn.Module:
    """A causal LM without its head: where adapters (peft) wrap it, the layers that hold them.

    Compiled as `torch.compile(model)` is; of `model.compile()` it knows nothing.
    """
    compiled = getattr(model, "dynamo_ctx", lambda body: body)
    return compiled(inner_model(model).base_model)


def find_lm_head(model: nn.Module) -> LMHead:
    """The head of a Hugging Face causal LM: tied or not, biased, scaled or capped.

    Raises:
        ValueError: a model without a linear head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} must have an LM head that is a torch.nn.Linear, without "
            f"adapters: got {type(head).__module__}.{type(head).__name__}; pass a model for causal "
            "language modelling."
        )
    config = model.config.get_text_config()
    factor = 1.0
    for name in _FACTORS:
        factor *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        factor /= getattr(config, name, None) or 1.0
    softcap = next((cap for name in _CAPS if (cap := getattr(config, name, None))), None)
    return LMHead(
        head.weight, head.bias, float(factor), None if softcap is None else float(softcap)
    )


def keep_one_name(module: nn.Module, state: dict, prefix: str, _metadata: object) -> None:
    """Hook of `state_dict`: tied weights under their first name, as files of safetensors want."""
    for name in _tied_names(module):
        state.pop(prefix + name, None)


def give_all_names(module: nn.Module, state: dict, prefix: str, *_) -> None:
    """Hook of `load_state_dict`: the other names again."""
    for name, first in _tied_names(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])


def _tied_names(module: nn.Module) -> dict[str, str]:
    """From each further name of a weight to its first."""
    first: dict[Tensor, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    return {name: first[weight] for name, weight in names if first.setdefault(weight, name) != name}


@torch.no_grad()
def check_lm_head(model: nn.Module) -> None:
    """Compare the head as it was found with the model's own logits, on two tokens.

    Raises:
        ValueError: the model does something to its logits that is not known here.
    """
    if not takes_text_alone(model):
        raise ValueError(
            f"{type(model).__name__} must run from input_ids alone to run without its LM head: its "
            "forward must have more; use LogitKLLoss."
        )
    model = getattr(model, "_orig_mod", model)  # not worth compiling
    was_training = model.training
    model.eval()
    device = model.get_input_embeddings().weight.device
    entries = {"input_ids": torch.tensor([[0, 1]], device=device)}
    if "use_cache" in argument_names(model):
        entries["use_cache"] = False
    hidden = body_of(model)(**entries)[0]
    factors = [1]

    def enlarge(_head, args) -> tuple:
        return args[0] * factors[0], *args[1:]

    head = find_lm_head(model)
    is_known = True
    with model.get_output_embeddings().register_forward_pre_hook(enlarge):
        # Caps show in logits that are large, which those of a new model are not.
        for factors[0] in (1, _ENLARGED):
            own, found = model(**entries).logits, head.logits(hidden * factors[0])
            atol = 1e-2 * max(1.0, own.abs().max().item())
            is_like = own.shape == found.shape and torch.allclose(found, own, rtol=1e-2, atol=atol)
            is_known = is_known and is_like
    model.train(was_training)
    if not is_known:
        raise ValueError(
            f"{type(model).__name__} must compute its logits as a linear head does (scaled or "
            "softcapped): its own differ from those; compute logits yourself and use LogitKLLoss."
        )
