"""A whole step of distillation, forward and backward of both models with all terms of the loss.

Eager is what users write: both models return hidden states, attention maps and logits, which takes
their eager attention, and the terms are plain PyTorch. The limit is the step without a teacher's
loss: its forward pass, and forward and backward of the student with its own loss. The models are
drawn at random, of real sizes; the optimizer, alike for all, is left out.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fakd import DistillConfig, Distiller

from .device import device
from .harness import DTYPES, Step, float32_on_cpu
from .shapes import STEP_SHAPES, StepShape

OP = "train_step"
SHAPES = STEP_SHAPES
TIMED = float32_on_cpu()
RIVALS = ("eager", "limit")
TERMS = DistillConfig(alpha=1.0, beta=1.0, gamma=0.5, delta=1.0, temperature=2.0)
_CLASSES = 8


def make_model(shape: StepShape, side: int, dtype: str) -> PreTrainedModel:
    """The student (side 0) or the teacher, with SDPA and without dropout."""
    options = {"device": device(), "dtype": DTYPES[dtype]}
    sizes = {
        "num_hidden_layers": shape.layers[side],
        "hidden_size": shape.widths[side],
        "num_attention_heads": shape.heads[side],
        "intermediate_size": shape.intermediate[side],
        "vocab_size": shape.vocabulary,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(side)
    if shape.key_heads is not None:
        config = LlamaConfig(
            num_key_value_heads=shape.key_heads, tie_word_embeddings=True, use_cache=False, **sizes
        )
        return LlamaForCausalLM(config).to(**options)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(num_labels=_CLASSES, **rates, **sizes)
    return BertForSequenceClassification(config).to(**options)


def make_batch(shape: StepShape) -> dict[str, Tensor]:
    generator = torch.Generator(device()).manual_seed(0)
    options = {"generator": generator, "device": device()}
    ids = torch.randint(shape.vocabulary, (shape.batch, shape.tokens), **options)
    labels = ids if shape.key_heads else torch.randint(_CLASSES, (shape.batch,), **options)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class EagerDistiller(nn.Module):
    """The same loss from what the models return."""

    def __init__(self, like: Distiller) -> None:
        super().__init__()
        self.student, self.teacher = like.student, like.teacher.eval()
        for model in (self.student, self.teacher):
            model.set_attn_implementation("eager")  # SDPA returns no maps
        self.projections = nn.ModuleList(like.feature.projections)
        self.pairs, self.attention_pairs = like.pairs, like.attention_pairs

    def forward(self, labels: Tensor, **batch: Tensor) -> Tensor:
        wanted = {"output_hidden_states": True, "output_attentions": True, **batch}
        with torch.no_grad():
            theirs = self.teacher(**wanted)
        ours = self.student(**wanted, labels=labels)
        loss = ours.loss
        for (student, teacher), project in zip(self.pairs, self.projections, strict=True):
            p, t = project(ours.hidden_states[student]), theirs.hidden_states[teacher]
            distance = 1 - F.cosine_similarity(p, t, dim=-1).mean() + (p - t).square().mean()
            loss = loss + distance / len(self.pairs)
        for student, teacher in self.attention_pairs:
            s, t = ours.attentions[student - 1], theirs.attentions[teacher - 1]
            log_s, log_t = s.clamp_min(1e-30).log(), t.clamp_min(1e-30).log()
            distance = (t * (log_t - log_s)).sum(-1).mean()
            loss = loss + TERMS.gamma * distance / len(self.attention_pairs)
        s, t = ours.logits / TERMS.temperature, theirs.logits / TERMS.temperature
        if s.dim() == 3:
            s, t = s[:, :-1].flatten(0, 1), t[:, :-1].flatten(0, 1)
        soft = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
        return loss + TERMS.alpha * TERMS.temperature**2 * soft


class BareStep(nn.Module):
    """The teacher's forward pass, and the student's own loss."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)

    def forward(self, labels: Tensor, **batch: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher(**batch)
        return self.student(**batch, labels=labels).loss


@functools.cache
def make_module(contender: str, shape_name: str, dtype: str) -> nn.Module:
    shape = SHAPES[shape_name]
    models = [make_model(shape, side, dtype) for side in (0, 1)]
    if contender == "limit":
        return BareStep(*models)
    torch.manual_seed(2)  # of the projections
    ours, theirs = shape.layers
    # Without the last: of decoders, transformers returns that one after the final norm.
    mapping = [(layer, layer * theirs // ours) for layer in range(1, ours)]
    terms = dataclasses.replace(TERMS, mapping=mapping)
    distiller = Distiller.from_config(models[1], models[0], terms)
    distiller.to(DTYPES[dtype])  # the projections too
    if contender != "eager":
        return distiller.train()
    return EagerDistiller(distiller)


def make_step(contender: str, shape_name: str, dtype: str) -> Step:
    """One forward and backward, returning the loss and the gradients by name."""
    module = make_module(contender, shape_name, dtype)
    batch = make_batch(SHAPES[shape_name])

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        module.zero_grad()
        output = module(**batch)
        loss = output if isinstance(output, Tensor) else output.loss
        loss.backward()
        student = module.student.named_parameters()
        return loss, {name: p.grad for name, p in student if p.grad is not None}

    return step


def check(contender: str, shape_name: str, dtype: str) -> None:
    """No number on red: in float32 the loss and every gradient are those of eager."""
    got, gradients = make_step(contender, shape_name, "float32")()
    truth, expected = make_step("eager", shape_name, "float32")()
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert error < 1e-3, f"{name}: {error:.2e}"


def gflop(shape: StepShape) -> float:
    return 0.0


def moved_bytes(shape: StepShape, itemsize: int) -> int:
    return 0
