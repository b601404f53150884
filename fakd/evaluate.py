"""Scores of a model on held-out rows, the rows shared out over all processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from .batch import argument_names
from .data import Prepared, collate, lengths
from .metrics import perplexity, score


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on held-out rows."""

    # By metric; of `Prepared.more_tests` as "<set>/<metric>".
    scores: dict[str, float]
    # By set ("test", then `more_tests`), of each row, less is better: 0 or 1 for classes, the
    # squared error for numbers, the mean cross-entropy of its next tokens for language models.
    errors: dict[str, list[float]]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    prepared: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    *,
    accelerator: Accelerator,
    rows: int = 32,
) -> Evaluation:
    """Score a model in eval mode; a collective of all processes, with one result in all of them.

    Args:
        model: a classifier (or regression), or a causal language model, on its device.
        prepared: its `test` and `more_tests` are scored.
        tokenizer: pads batches.
        accelerator: of the training, or a plain one.
        rows: texts in a batch; a quarter of it for language models, whose logits are large.

    Returns:
        Each of `prepared.metrics` by name, in its order, and the errors of each row. The perplexity
        is exp of the mean cross-entropy of all next tokens that count.
    """
    was_training = model.training
    model.eval()
    is_lm = "label" not in prepared.test.column_names
    task = "causal_lm" if is_lm else "classification"
    per_batch = max(1, rows // 4) if is_lm else rows
    scores, errors = {}, {}
    for name, part in {"test": prepared.test, **prepared.more_tests}.items():
        found = _outputs(model, part, collate(tokenizer, task), accelerator, per_batch)
        values, errors[name] = _summary(part, found, prepared.metrics, is_lm)
        prefix = "" if name == "test" else f"{name}/"
        scores |= {f"{prefix}{metric}": value for metric, value in values.items()}
    model.train(was_training)
    return Evaluation(scores, errors)


def _outputs(
    model: nn.Module, rows: Dataset, collator, accelerator: Accelerator, per_batch: int
) -> dict[int, Sequence[float]]:
    """By row: its logits, or the sum of the cross-entropy of its tokens and how many count."""
    order = lengths(rows).argsort(kind="stable").tolist()  # little padding
    batches = [order[first : first + per_batch] for first in range(0, len(order), per_batch)]
    processes, process = accelerator.num_processes, accelerator.process_index
    # Equally many forward passes in every process, or one would wait for ever.
    while len(batches) % processes:
        batches.append(batches[-1])
    found: list[tuple[int, list[float]]] = []
    accepted = argument_names(model)
    for indices in batches[process::processes]:
        batch = send_to_device(collator([rows[index] for index in indices]), accelerator.device)
        labels = batch.pop("labels")
        entries = {name: value for name, value in batch.items() if name in accepted}
        if "use_cache" in accepted:
            entries["use_cache"] = False
        logits = model(**entries).logits.float()
        if labels.dim() == 2:
            logits = _token_losses(logits, labels)
        found += zip(indices, logits.tolist(), strict=True)
    return dict(gather_object(found))


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, 2]: the summed cross-entropy of the next tokens that count, and their number."""
    next_tokens = labels[:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), next_tokens, reduction="none")
    return torch.stack([each.double().sum(1), (next_tokens != -100).sum(1).double()], dim=1)


def _summary(
    rows: Dataset, found: dict[int, Sequence[float]], metrics: Sequence[str], is_lm: bool
) -> tuple[dict[str, float], list[float]]:
    """The scores of all rows together, and the error of each."""
    values = np.array([found[index] for index in range(len(rows))])
    if is_lm:
        losses, tokens = values.T
        total = perplexity(float(losses.sum()), round(tokens.sum()))
        return {"perplexity": total}, (losses / np.maximum(tokens, 1)).tolist()
    truth = np.array(rows["label"][:])
    if values.shape[1] == 1:
        errors = (values[:, 0] - truth) ** 2
    else:
        errors = (values.argmax(axis=1) != truth).astype(float)
    return score(metrics, truth, values), errors.tolist()
