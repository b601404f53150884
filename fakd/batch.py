"""What a batch holds: entries that a model takes, and rows and tokens that count."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .architectures import find_blocks, inner_model

# What means are taken over.
COUNTS = ("rows", "tokens", "decoder_tokens", "next_tokens", "labels")
# What transformers' own losses leave out.
_HIDDEN_LABEL = -100


def argument_names(model: nn.Module) -> set[str]:
    """What the model's forward takes, or hands on to what it wraps (adapters) or builds upon."""
    names: set[str] = set()
    inner = inner_model(model)
    for module in dict.fromkeys((model, inner, getattr(inner, "base_model", inner))):
        parameters = inspect.signature(module.forward).parameters
        names |= set(parameters)
        if all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
            break
    return names


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


def run_model(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    labels: Tensor | None,
    others: Sequence[nn.Module | None],
) -> object:
    """What a model makes of the entries of a batch that it takes; see `accepted_entries`."""
    entries = accepted_entries(model, batch, others)
    if "use_cache" in argument_names(model):
        entries.setdefault("use_cache", False)  # keys and values that nobody would read
    if labels is not None:
        entries["labels"] = labels
    output = model(**entries)
    if isinstance(output, tuple):
        raise ValueError(
            f"config.return_dict of {type(model).__name__} must be True: got a tuple; set it."
        )
    return output


def token_mask(attention_mask: Tensor | None, name: str = "attention_mask") -> Tensor | None:
    """[B, T] bool: the tokens to compare hidden states on."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"{name} must be [B, T]: got {list(attention_mask.shape)}; pass the "
            "tokenizer's own, which also says which tokens count in the loss."
        )
    return None if attention_mask is None else attention_mask.bool()


def is_encoder_decoder(model: nn.Module | None) -> bool:
    return getattr(getattr(inner_model(model), "config", None), "is_encoder_decoder", False)


def readable(
    student: nn.Module, batch: Mapping[str, Tensor], labels: Tensor | None
) -> Mapping[str, Tensor]:
    """The batch, with what decoders read: models make it of labels, which the teacher has not.

    That is the labels, shifted to the right behind the student's first token.
    """
    for name in ("past_key_values", "cache_params"):
        if batch.get(name) is not None:
            raise ValueError(
                f"batch must not hold {name}: got one cache, which teacher and student would both "
                "fill; drop it, and run whole texts."
            )
    if labels is None or not is_encoder_decoder(student) or _decoder_inputs(batch) is not None:
        return batch
    if labels.dim() != 2 or student.get_output_embeddings() is None:  # not of tokens
        return batch
    if hasattr(student, "prepare_decoder_input_ids_from_labels"):
        ids = student.prepare_decoder_input_ids_from_labels(labels=labels)
        return {**batch, "decoder_input_ids": ids}
    config = inner_model(student).config
    first = getattr(config, "decoder_start_token_id", None)
    if first is None:
        return batch
    ids = torch.cat((torch.full_like(labels[:, :1], first), labels[:, :-1]), 1)
    return {
        **batch,
        "decoder_input_ids": ids.masked_fill(ids == _HIDDEN_LABEL, config.pad_token_id),
    }


def _decoder_inputs(batch: Mapping[str, Tensor]) -> Tensor | None:
    """[B, T] token ids or [B, T, D] embeddings."""
    ids = batch.get("decoder_input_ids")
    return batch.get("decoder_inputs_embeds") if ids is None else ids


def decoder_mask(batch: Mapping[str, Tensor], labels: Tensor | None) -> Tensor | None:
    """[B, T] bool: the tokens of a decoder behind an encoder that count; None: all.

    Those with a label, where the batch has decoder inputs and labels for them; else, of decoders
    that read what their encoders read, those of the encoder.
    """
    mask = token_mask(batch.get("decoder_attention_mask"), "decoder_attention_mask")
    read = _decoder_inputs(batch)
    if read is None:
        return token_mask(batch.get("attention_mask")) if mask is None else mask
    if labels is not None and labels.shape == read.shape[:2]:
        is_labelled = labels != _HIDDEN_LABEL
        mask = is_labelled if mask is None else mask & is_labelled
    return (
        torch.ones(read.shape[:2], dtype=torch.bool, device=read.device) if mask is None else mask
    )


def token_masks(batch: Mapping[str, Tensor], labels: Tensor | None) -> dict[str, Tensor | None]:
    """By the name of their count: the tokens to compare, [B, T] bool each; None: all."""
    mask = token_mask(batch.get("attention_mask"))
    return {"tokens": mask, "decoder_tokens": decoder_mask(batch, labels)}


def counted_tokens(model: nn.Module, path: str | None) -> str:
    """Which tokens the blocks of a model see: a decoder's, if they are behind an encoder."""
    is_behind = is_encoder_decoder(model) and "decoder" in find_blocks(model, path).path.split(".")
    return "decoder_tokens" if is_behind else "tokens"


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
        batch: with `attention_mask` [B, T], or else `input_ids` or `inputs_embeds`; where rows are
            no texts, each counts as one token.
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
        shapes = [(*each.shape[:2], each.device) for each in given]
        shapes += [(len(each), 1, each.device) for each in batch.values() if torch.is_tensor(each)]
        if not shapes:
            raise ValueError(
                f"batch must hold tensors to be counted: got {sorted(batch)}; add input_ids."
            )
        *shape, device = shapes[0]
        mask = torch.ones(shape, dtype=torch.bool, device=device)
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
    read = decoder_mask(batch, labels)
    return {
        "rows": rows,
        "tokens": mask.sum(),
        "decoder_tokens": (mask if read is None else read).sum(),
        "next_tokens": following.sum(),
        "labels": shown,
    }


def shares(counts: Mapping[str, Tensor], normalizers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[] each: what turns a mean over one batch into its part of the mean over a greater one."""
    if missing := [name for name in COUNTS if name not in normalizers]:
        raise ValueError(
            f"normalizers must hold {', '.join(COUNTS)}: got no {', '.join(missing)}; pass the "
            "sums of Distiller.counts()."
        )
    # Where nothing counts anywhere: 0 / 1.
    return {name: counts[name] / normalizers[name].clamp_min(1) for name in COUNTS}
