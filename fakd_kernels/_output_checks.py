"""Argument checks of the ops on outputs (`linear_kl`, `logit_kl`, `topk_kl`).

The last two read data, so they serve CPU tensors only: a GPU would have to wait.
"""

import torch
from torch import Tensor

from . import _validate

DISTANCES = ("kl", "reverse_kl", "jsd")
# What the sum of a row of exp(teacher_logprobs) may exceed 1 by: bfloat16 rounds a logarithm by up
# to 1/256 of it, which 10 nats of entropy turn into 4 %.
_EXCESS = 0.05


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool: got {type(value).__name__}; pass True or False.")


def check_labels(
    labels: Tensor, leading: torch.Size, device: torch.device, ignore_index: int
) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(
            f"ignore_index must be an int: got {type(ignore_index).__name__}; pass -100."
        )
    _validate.check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64: got {labels.dtype}; convert them with .long().")
    check_tokens("labels", labels, leading, device)


def check_tokens(name: str, tensor: Tensor, leading: torch.Size, device: torch.device) -> None:
    _validate.check_device(name, tensor, "the student", device)
    if tensor.shape != leading and tensor.shape != (leading.numel(),):
        raise ValueError(
            f"{name} must have one entry per token of the student: got {list(tensor.shape)} for "
            f"{list(leading)}; pass [B, T] or [N], labels already shifted."
        )


def check_same_tokens(name: str, tensor: Tensor, leading: torch.Size, device: torch.device) -> None:
    """A tensor of the teacher, against the student's."""
    _validate.check_device(name, tensor, "the student", device)
    if tensor.shape[:-1] != leading:
        raise ValueError(
            f"{name} must have the same tokens as the student: got {list(tensor.shape[:-1])} and "
            f"{list(leading)}; give both models the same tokens."
        )


def check_projection(side: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    """Hidden states and the head that turns them into logits."""
    _validate.check_float(f"{side}_hidden", hidden)
    _validate.check_rank(f"{side}_hidden", hidden, (2, 3), "[B, T, D] or [N, D]")
    _validate.check_float(f"{side}_head", head)
    _validate.check_rank(f"{side}_head", head, (2,), "[V, D]")
    _validate.check_device(f"{side}_head", head, f"{side}_hidden", hidden.device)
    if head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_head must be as wide as {side}_hidden: got {list(head.shape)} for "
            f"{hidden.shape[-1]} wide states; pass the weight as nn.Linear(D, V) holds it, [V, D]."
        )
    if bias is not None:
        _validate.check_float(f"{side}_bias", bias)
        _validate.check_device(f"{side}_bias", bias, f"{side}_hidden", hidden.device)
        if tuple(bias.shape) != (head.shape[0],):
            raise ValueError(
                f"{side}_bias must have the shape [V] = [{head.shape[0]}]: got "
                f"{list(bias.shape)}; nn.Linear(D, V).bias fits."
            )


def check_distance(distance: str, jsd_beta: float) -> None:
    _validate.check_choice("distance", distance, DISTANCES)
    _validate.check_number("jsd_beta", jsd_beta, minimum=0.0)
    if not jsd_beta < 1:
        raise ValueError(
            f"jsd_beta must be less than 1: got {jsd_beta}; for its limits 0 and 1 use "
            "distance='kl' and 'reverse_kl'."
        )


def compared_vocab(student: int, teacher: int, vocab: str | None) -> int:
    """How many entries of the vocabularies are compared."""
    if vocab is not None:
        _validate.check_choice("vocab", vocab, ("prefix",))
    elif student != teacher:
        raise ValueError(
            f"vocabularies must be of equal size: got {student} (student) and {teacher} (teacher); "
            "if one is only padded, compare what they share with vocab='prefix'."
        )
    return least_vocab(min(student, teacher))


def least_vocab(size: int) -> int:
    if size < 1:
        raise ValueError(f"the vocabulary must hold at least 1 entry: got {size}; pass a head.")
    return size


def check_values(labels: Tensor | None, row_weights: Tensor | None, vocab: int) -> None:
    """Row weights and labels."""
    if row_weights is None or row_weights.device.type != "cpu":
        return
    _validate.check_row_weights("mask", row_weights)
    if labels is None:
        return
    is_wrong = (row_weights != 0) & ((labels < 0) | (labels >= vocab))
    if bool(is_wrong.any()):
        raise ValueError(
            f"labels must be from 0 to {vocab - 1}, or ignore_index: got "
            f"{int(labels[is_wrong][0])}; check the tokenizer, or mask these tokens."
        )


def check_support(
    indices: Tensor, logprobs: Tensor, row_weights: Tensor | None, vocab: int
) -> None:
    """The stored outputs of a teacher; rows that do not count may hold anything."""
    if indices.device.type != "cpu":
        return
    if row_weights is not None:
        is_counted = (row_weights != 0)[:, None]
        indices, logprobs = torch.where(is_counted, indices, -1), logprobs.where(is_counted, 0)
    is_wrong = (indices < -1) | (indices >= vocab)
    if bool(is_wrong.any()):
        raise ValueError(
            f"teacher_indices must be from 0 to {vocab - 1}, or -1 for an unused entry: got "
            f"{int(indices[is_wrong][0])}; the teacher's tokenizer must be the student's."
        )
    ordered = indices.sort(dim=1).values
    is_twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(is_twice.any()):
        raise ValueError(
            "teacher_indices must differ within a token: got "
            f"{int(ordered[:, 1:][is_twice][0])} twice; pass the indices of torch.topk."
        )
    mass = logprobs.double().exp().masked_fill(indices < 0, 0).sum(1)
    is_above = mass > 1 + _EXCESS
    if bool(is_above.any()):
        raise ValueError(
            "teacher_logprobs must be log-probabilities, which sum to at most 1: got a sum of "
            f"{float(mass[is_above][0]):.4g}; pass torch.log_softmax(logits, -1) at the indices."
        )
