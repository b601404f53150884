"""What a batch holds: entries that a model takes, and tokens that count."""

import inspect

from torch import Tensor, nn


def argument_names(model: nn.Module) -> set[str]:
    """What the model's forward takes."""
    return set(inspect.signature(model.forward).parameters)


def token_mask(attention_mask: Tensor | None) -> Tensor | None:
    """[B, T] bool: the tokens to compare hidden states on."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [B, T]: got {list(attention_mask.shape)}; pass the "
            "tokenizer's own, which also says which tokens count in the loss."
        )
    return None if attention_mask is None else attention_mask.bool()


def check_tokens(student: Tensor, teacher: Tensor) -> None:
    """Raise where two models did not see the same tokens."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher and student must see the same tokens: got {list(teacher.shape[:-1])} and "
            f"{list(student.shape[:-1])}; use one tokenizer for both, and models that add no "
            "tokens of their own."
        )
