"""Whether student and teacher attend alike: over the same tokens, and to the same keys."""

import torch
from torch import Tensor

from ..capture import AttentionInputs
from .shared import check_lengths


def row_weights(student, teacher, pairs: int, mask: Tensor | None) -> list[Tensor | None]:
    """The row weights of every pair, once both sides are seen to attend alike."""
    for name, side in (("student", student), ("teacher", teacher)):
        is_list = isinstance(side, (list, tuple))
        if not is_list or not all(isinstance(entry, AttentionInputs) for entry in side):
            raise TypeError(
                f"{name} must be a list of AttentionInputs, one per pair: got "
                f"{type(side).__name__}{'' if not is_list else ' of others'}; pass what "
                "capture_attention gives, such as [captured[1], captured[2]]."
            )
        check_lengths(name, len(side), pairs)
    counted = None if mask is None else mask != 0
    # Layers share their masks, and every look at one waits for the device.
    equal: set[tuple[int, int]] = set()
    for index, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        _check_alike(index, ours, theirs)
        others = [("padding", theirs.mask)] + ([] if mask is None else [("mask", counted)])
        for name, other in others:
            if (id(ours.mask), id(other)) not in equal and not _is_same(ours.mask, other):
                raise ValueError(_UNEQUAL[name].format(index=index))
            equal.add((id(ours.mask), id(other)))
    return [ours.mask if mask is None else mask for ours in student]


_UNEQUAL = {
    "padding": (
        "student and teacher of pair {index} must count the same tokens: got masks that differ; "
        "give both models the same attention_mask."
    ),
    "mask": (
        "mask must be 0 exactly where the models of pair {index} mask tokens: got other zeros, and "
        "the op would hide those keys too; pass positive weights, or drop mask."
    ),
}


def _is_same(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two masks [B, T] count the same tokens; None counts all."""
    if first is None or second is None:
        return first is second or bool((second if first is None else first).all())
    return torch.equal(first, second)


def _check_alike(index: int, student: AttentionInputs, teacher: AttentionInputs) -> None:
    ours, theirs = (
        ((side.query.shape[0], side.query.shape[2]), side.is_causal, side.window)
        for side in (student, teacher)
    )
    for (rule, remedy), mine, yours in zip(_RULES, ours, theirs, strict=True):
        if mine != yours:
            raise ValueError(
                f"student and teacher of pair {index} must {rule}: got {mine} and {yours}; "
                f"{remedy}."
            )


_RULES = (
    ("see the same tokens, [B, T]", "use one tokenizer for both"),
    ("both be causal, or neither", "align hidden states instead, or choose models of one kind"),
    ("have the same window", "map layers of like windows to each other"),
)
