"""What one training is made of: data, models and losses, built from its settings and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .architectures import hidden_width, layer_count
from .config import RunConfig
from .data import Prepared, check_tokenizers, prepare, tokenizer_hash
from .distiller import Distiller
from .language_models import check_causal, check_packing
from .models import (
    check_length,
    check_vocabulary,
    load_teacher,
    load_tokenizer,
    make_student,
    output_names,
)
from .teacher_cache import Identity, TeacherCache, hash_weights
from .terms import build_losses


@dataclass(frozen=True)
class Parts:
    """What a training is made of."""

    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared
    teacher: nn.Module | None  # None too where its predictions are stored
    teacher_hash: str | None  # of its weights
    student: nn.Module
    cache: TeacherCache | None
    # What `Distiller` takes: the map of layers and the losses; empty without a teacher.
    losses: Mapping[str, Any]
    # Of "teacher" and "student": blocks, and features of a hidden state.
    layers: dict[str, int]
    widths: dict[str, int]


def build(config: RunConfig) -> Parts:
    """Data and models, checked against each other before anything is computed.

    Raises:
        ModuleNotFoundError, OSError, ValueError: what is not there, or does not fit.
    """
    sources = {"teacher": config.teacher, "student.path": config.student.path}
    if not any(sources.values()):
        # A config alone need not bring a tokenizer, where a model does.
        sources = {"student.config": config.student.config}
    tokenizers = [load_tokenizer(path, name) for name, path in sources.items() if path is not None]
    tokenizer = tokenizers[0]
    for other in tokenizers[1:]:
        check_tokenizers(other, tokenizer)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    order = None if config.teacher is None else output_names(config, "teacher")
    prepared = prepare(config.data, config.task, tokenizer, order)
    torch.manual_seed(config.train.seed)  # of what is drawn for the student
    teacher = None if config.teacher is None else load_teacher(config, prepared.labels)
    student = make_student(config, teacher, prepared.labels)
    models = {"teacher": teacher, "student": student}
    models = {role: model for role, model in models.items() if model is not None}
    for role, model in models.items():
        name = f"the {role}"
        check_length(config.data, model, name)
        check_vocabulary(tokenizer, model, name)
        if config.task == "causal_lm":
            check_causal(model)
        if config.data.layout == "packed":
            check_packing(model)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
    # Of one tokenizer, so their heads differ in padding at most.
    losses = build_losses(config.distill, teacher, student, vocab="prefix")
    teacher_hash = None if teacher is None else hash_weights(teacher)
    cache = None
    if config.teacher_cache is not None:
        cache = TeacherCache(config.teacher_cache)
        cache.check(cache_identity(config, tokenizer, prepared, teacher_hash, losses))
    return Parts(
        tokenizer,
        prepared,
        teacher=teacher if cache is None else None,
        teacher_hash=teacher_hash,
        student=student,
        cache=cache,
        losses=losses,
        layers={role: layer_count(model) for role, model in models.items()},
        widths={role: hidden_width(model) for role, model in models.items()},
    )


def cache_identity(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    teacher_hash: str,
    losses: Mapping[str, Any],
) -> Identity:
    """What a cache of this training's teacher is made of."""
    pairs = losses["mapping"] if losses.get("feature") is not None else []
    needs_tokens = config.task == "causal_lm" and losses.get("output") is not None
    return Identity(
        task=config.task,
        teacher=teacher_hash,
        tokenizer=tokenizer_hash(tokenizer),
        data=prepared.fingerprint,
        rows=len(prepared.train),
        top_k=config.distill.top_k if needs_tokens else None,
        layers=sorted({theirs for _, theirs in pairs}),
        dtype=config.teacher_cache_dtype,
    )


def make_distiller(config: RunConfig, parts: Parts) -> Distiller:
    """Teacher, student and losses as one module."""
    return Distiller.from_config(parts.teacher, parts.student, config.distill, parts.losses)
