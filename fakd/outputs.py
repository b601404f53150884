"""The term of predictions: two models' next tokens or logits, or what was stored of a teacher."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fakd_kernels import LinearKL, LogitKL, TopKKL

from .batch import check_tokens, is_encoder_decoder, predicted_tokens
from .lm_head import find_lm_head
from .losses import LinearKLLoss, LogitKLLoss, TopKKLLoss

# What batches hold of a teacher that is not there begins with this, as "teacher_logits" [B, C],
# "teacher_indices" and "teacher_logprobs" [B, T, k], "teacher_state_3" [B, T, D] of layer 3.
_STORED = "teacher_"


@dataclass(frozen=True)
class TopEntries:
    """A teacher's likeliest next tokens."""

    indices: Tensor  # [..., k]
    logprobs: Tensor  # [..., k] float32, of the whole vocabulary at temperature 1


def take_stored(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a batch holds of a teacher, and the rest."""
    stored = {name: value for name, value in batch.items() if name.startswith(_STORED)}
    return stored, {name: value for name, value in batch.items() if name not in stored}


def stored_states(stored: Mapping[str, Tensor], layers: Iterable[int]) -> dict[int, Tensor]:
    """By layer: the hidden states that were stored of a teacher."""
    return {layer: _stored(stored, f"teacher_state_{layer}") for layer in layers}


def compare_outputs(
    loss: LinearKLLoss | LogitKLLoss | TopKKLLoss,
    student: tuple[nn.Module, object],
    teacher: tuple[nn.Module | None, object],
    labels: Tensor | None,
    masks: Mapping[str, Tensor | None],
    *,
    top_k: int,
) -> tuple[LinearKL | LogitKL | TopKKL, str]:
    """The term of predictions, and what its mean is taken over.

    Args:
        loss: of next tokens, from models that ran without their heads; or of logits.
        student: the model, and its output.
        teacher: likewise; without a model, what was stored of it, by name.
        labels: [B, T], not shifted; of next tokens only.
        masks: of "tokens" and of "decoder_tokens", [B, T] each: those that count.
        top_k: entries per token for a `TopKKLLoss` with a teacher.
    """
    (our_model, ours), (their_model, theirs) = student, teacher
    if isinstance(loss, LogitKLLoss):
        compared = _logits(our_model, ours)
        if their_model is None:
            logits = _stored(theirs, "teacher_logits")
        else:
            logits = _logits(their_model, theirs)
        check_tokens(compared, logits)
        # One row of logits per text has no tokens to mask.
        counted = "rows"
        if compared.dim() == 3:
            counted = "decoder_tokens" if is_encoder_decoder(our_model) else "tokens"
        return loss(compared, logits, mask=masks.get(counted)), counted
    if their_model is None:
        names = ("teacher_indices", "teacher_logprobs")
        compared = TopEntries(*(_stored(theirs, name) for name in names))
    elif isinstance(loss, TopKKLLoss):
        vocabulary = None
        if loss.vocab == "prefix":
            vocabulary = find_lm_head(our_model).weight.shape[0]
        compared = top_entries(their_model, theirs[0], top_k, vocabulary)
    else:
        compared = their_model, theirs[0]
    states = our_model, ours[0]
    return compare_next_tokens(loss, states, compared, labels, masks["tokens"]), "next_tokens"


def compare_next_tokens(
    loss: LinearKLLoss | TopKKLLoss,
    student: tuple[nn.Module, Tensor],
    teacher: tuple[nn.Module, Tensor] | TopEntries,
    labels: Tensor | None,
    mask: Tensor | None,
) -> LinearKL | TopKKL:
    """The loss of the next tokens that two causal LMs predict.

    Args:
        loss: see `LinearKLLoss` and `TopKKLLoss`.
        student: the model, and what enters its head, [B, T, D].
        teacher: likewise; or what was stored of it, for a `TopKKLLoss`.
        labels: [B, T], not shifted.
        mask: [B, T], the tokens that count.
    """
    model, hidden = student
    ours = find_lm_head(model)
    # Each token predicts the next: the last has nothing to predict, the first nobody.
    options = {
        "labels": None if labels is None else labels[:, 1:],
        "mask": None if mask is None else predicted_tokens(mask),
        "student_bias": ours.bias,
        "student_softcap": ours.softcap,
    }
    states = ours.scaled(hidden[:, :-1]), ours.weight
    if isinstance(teacher, TopEntries):
        check_tokens(hidden, teacher.indices)
        return loss(*states, teacher.indices[:, :-1], teacher.logprobs[:, :-1], **options)
    theirs, their_hidden = find_lm_head(teacher[0]), teacher[1]
    check_tokens(hidden, their_hidden)
    return loss(
        *states,
        theirs.scaled(their_hidden[:, :-1]),
        theirs.weight,
        teacher_bias=theirs.bias,
        teacher_softcap=theirs.softcap,
        **options,
    )


@torch.no_grad()
def top_entries(
    model: nn.Module, hidden: Tensor, count: int, vocabulary: int | None = None, rows: int = 256
) -> TopEntries:
    """The likeliest next tokens of a causal LM.

    Args:
        model: the language model.
        hidden: what enters its head, [B, T, D].
        count: entries per token, at most the vocabulary.
        vocabulary: the first so many entries are all that exist; None: those of the model.
        rows: tokens at a time, so that logits exist for so many and no more.
    """
    head = find_lm_head(model)
    vocabulary = min(vocabulary or head.weight.shape[0], head.weight.shape[0])
    if not 1 <= count <= vocabulary:
        raise ValueError(
            f"top_k must be from 1 to {vocabulary}, the vocabulary: got {count}; change it."
        )
    parts = []
    for part in hidden.flatten(0, -2).split(rows):
        logits = head.exact_logits(part)[:, :vocabulary]
        parts.append(logits.log_softmax(-1).topk(count))
    shape = (*hidden.shape[:-1], count)
    logprobs, indices = (torch.cat(each).view(shape) for each in zip(*parts, strict=True))
    return TopEntries(indices, logprobs)


def _stored(entries: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in entries:
        raise ValueError(
            f"batch must hold {name} where there is no teacher: got none; add what was stored of "
            "it, or pass a teacher."
        )
    return entries[name]


def _logits(model: nn.Module, output: object) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"{type(model).__name__} must return logits for LogitKLLoss: got "
            f"{', '.join(output) if isinstance(output, Mapping) else type(output).__name__}; use a "
            "model with a head that does, or align features or attention."
        )
    return logits
