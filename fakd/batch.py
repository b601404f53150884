"""What a batch holds: entries that a model takes, and rows and tokens that count."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

# What means are taken over.
COUNTS = ("rows", "tokens", "next_tokens", "labels")
# What transformers' own losses leave out.
_HIDDEN_LABEL = -100


def argument_names(model: nn.Module) -> set[str]:
    """What the model's forward takes."""
    return set(inspect.signature(model.forward).parameters)


def accepted_entries(model: nn.Module, batch: Mapping, others: Sequence[nn.Module | None]) -> dict:
    """The entries that the model's forward names; all, if it names none in particular.

    Raises:
        TypeError: an entry that neither it nor one of the others names.
    """
    names = argument_names(model)
    known = names.union(*(argument_names(other) for other in others if other is not None))
    for key in batch:
        if "input_ids" in known and key not in known:
            raise TypeError(
                f"batch entries must be arguments of the student or of the teacher: got "
                f"{key!r}; drop it, or use a model whose forward takes it."
            )
    return {k: v for k, v in batch.items() if "input_ids" not in names or k in names}


def token_mask(attention_mask: Tensor | None) -> Tensor | None:
    """[B, T] bool: the tokens to compare hidden states on."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [B, T]: got {list(attention_mask.shape)}; pass the "
            "tokenizer's own, which also says which tokens count in the loss."
        )
    return None if attention_mask is None else attention_mask.bool()


def predicted_tokens(mask: Tensor) -> Tensor:
    """[B, T - 1]: the tokens after the first that count, and that one which counts predicts.

    What a model predicts from padding, on the left of a text, is nobody's to learn.
    """
    return mask[:, 1:] & mask[:, :-1]


def check_tokens(student: Tensor, teacher: Tensor) -> None:
    """Raise where two models did not see the same tokens."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher and student must see the same tokens: got {list(teacher.shape[:-1])} and "
            f"{list(student.shape[:-1])}; use one tokenizer for both, and models that add no "
            "tokens of their own."
        )


def count_batch(
    batch: Mapping[str, Tensor], labels: Tensor | None, *, is_causal: bool, ignore_index: int
) -> dict[str, Tensor]:
    """What the means over one batch are divided by.

    Args:
        batch: with `attention_mask` [B, T], or else `input_ids` or `inputs_embeds`.
        labels: of the batch, or None.
        is_causal: whether the student's own loss shifts labels, so that tokens predict the next.
        ignore_index: of the loss of next tokens.

    Returns:
        [] int64 for each of `COUNTS`: next tokens have a label, where there are labels, and one
        that counts before them; labels are those of the student's own loss.
    """
    mask = token_mask(batch.get("attention_mask"))
    if mask is None:
        given = [batch[name] for name in ("input_ids", "inputs_embeds") if name in batch]
        if not given:
            raise ValueError(
                "batch must hold attention_mask, input_ids or inputs_embeds to be counted: got "
                f"{sorted(batch)}; add one."
            )
        mask = torch.ones(given[0].shape[:2], dtype=torch.bool, device=given[0].device)
    following = predicted_tokens(mask)
    if labels is not None and labels.shape == mask.shape:
        following = following & (labels[:, 1:] != ignore_index)
    rows = mask.new_full((), mask.shape[0], dtype=torch.int64)
    if labels is None:
        shown = torch.zeros_like(rows)
    elif labels.is_floating_point():  # regression, which knows no hidden labels
        shown = rows
    else:
        shown = ((labels[:, 1:] if is_causal else labels) != _HIDDEN_LABEL).sum()
    return {"rows": rows, "tokens": mask.sum(), "next_tokens": following.sum(), "labels": shown}


def shares(counts: Mapping[str, Tensor], normalizers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[] each: what turns a mean over one batch into its part of the mean over a greater one."""
    if missing := [name for name in COUNTS if name not in normalizers]:
        raise ValueError(
            f"normalizers must hold {', '.join(COUNTS)}: got no {', '.join(missing)}; pass the "
            "sums of Distiller.counts()."
        )
    # Where nothing counts anywhere: 0 / 1.
    return {name: counts[name] / normalizers[name].clamp_min(1) for name in COUNTS}
