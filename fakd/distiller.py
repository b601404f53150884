"""Teacher, student and losses as one module that any training loop can call."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .architectures import hidden_width, layer_count
from .batch import (
    COUNTS,
    check_tokens,
    count_batch,
    counted_tokens,
    readable,
    run_model,
    shares,
    token_masks,
)
from .capture import AttentionInputs, capture_attention, capture_hidden_states
from .config import DistillConfig
from .distribute import unsharded
from .lm_head import body_of, give_all_names, is_causal_lm, keep_one_name
from .losses import (
    AttentionKLLoss,
    FeatureAlignmentLoss,
    LinearKLLoss,
    LogitKLLoss,
    RelationKLLoss,
    TopKKLLoss,
)
from .mapping import attention_pairs, layer_pairs
from .outputs import compare_outputs, stored_states, take_stored
from .terms import build_losses, check_apart, check_output, check_pairs, check_stored
from .weighting import Weighting


@dataclass
class DistillerOutput(ModelOutput):
    """What one forward pass of a `Distiller` gives."""

    loss: Tensor | None = None  # [], the weighted sum of all terms
    # The student's; detached under normalizers. Hugging Face's Trainer keeps these and logs: with
    # preprocess_logits_for_metrics=lambda output, labels: output[0] the logits. For an eval_loss
    # without labels it takes label_names=["input_ids"].
    logits: Tensor | None = None
    # [] each, detached: every term by its name, and times its weight as "weighted_<name>".
    logs: dict[str, Tensor] | None = None


class Distiller(nn.Module):
    """A student that learns from labels and from the inside of a frozen teacher.

        loss = task_weight * L_task + L_outputs + L_features + L_attention

    L_task is the student's own loss, where the batch holds labels; L_outputs compares the models'
    predictions, L_features hidden states, L_attention attention, and each is absent, at no cost,
    if it is not asked for. The teacher is in eval mode and without gradients, always. It is no
    submodule: it follows `.to()`, but `parameters()`, `state_dict()` and therefore optimizers and
    checkpoints hold the student and the projections alone (tied weights once). It may be shared
    between distillers. The models, or all of it, may be compiled where no attention is aligned.

    Args:
        teacher: a Hugging Face model, with or without a head; None trains on labels alone, which
            is the baseline of every comparison.
        student: a Hugging Face model; with a head it computes L_task from the batch's labels.
        mapping: preset or pairs, see `fakd.layer_pairs`.
        feature: the loss of the hidden states, built for the widths of `mapping`; None builds one
            with its defaults from the models' configs, unless there is a loss of attention.
        attention: the loss of attention, built for the pairs of its map; None aligns none. Both
            models must use the attention interface of transformers (`fakd.capture_attention`).
        attention_mapping: the map of attention; None takes `mapping`, without the embeddings.
        output: the loss of predictions; None aligns none. `LinearKLLoss` is for two causal language
            models of one vocabulary: their logits are never stored, labels go into the same pass,
            and its `ce_weight` stands for `task_weight`. `LogitKLLoss` compares the logits of
            classifiers, or of anything else that returns them. `TopKKLLoss` takes the teacher's
            `top_k` likeliest next tokens. The latter two also without a teacher, from what the
            batches hold of it: "teacher_logits", or "teacher_indices" and "teacher_logprobs".
            Likewise `feature`, with explicit pairs and "teacher_state_<layer>" [B, T, D].
        top_k: of a `TopKKLLoss` with a teacher.
        weighting: weights that change from step to step; None leaves them as they are.
        task_weight: weight of L_task, >= 0.
        teacher_path: where the teacher's list of blocks is, if it cannot be found.
        student_path: likewise.

    Raises:
        ValueError: a map, a loss and two models that do not fit each other.
    """

    # Tells the Hugging Face Trainer to divide the loss by the accumulation steps itself: ours are
    # means over the tokens of one batch.
    accepts_loss_kwargs = False

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        *,
        mapping: str | Sequence[tuple[int, int]] = "uniform",
        feature: FeatureAlignmentLoss | None = None,
        attention: AttentionKLLoss | RelationKLLoss | None = None,
        attention_mapping: str | Sequence[tuple[int, int]] | None = None,
        output: LinearKLLoss | LogitKLLoss | TopKKLLoss | None = None,
        top_k: int = 64,
        weighting: Weighting | None = None,
        task_weight: float = 1.0,
        teacher_path: str | None = None,
        student_path: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= task_weight < float("inf"):
            raise ValueError(
                f"task_weight must be a finite number >= 0: got {task_weight}; pass one."
            )
        check_apart(teacher, student)
        self.student = student
        # So that the Hugging Face Trainer can write checkpoints.
        self.register_state_dict_post_hook(keep_one_name)
        self.register_load_state_dict_pre_hook(give_all_names)
        self.task_weight = task_weight
        self.feature = self.attention = self.output = None
        self.pairs: list[tuple[int, int]] = []
        self.attention_pairs: list[tuple[int, int]] = []
        self._teacher = (teacher,)  # in a tuple, so that nn.Module does not register it
        self.block_paths = (student_path, teacher_path)
        self.top_k = top_k
        self.weighting = weighting or Weighting()
        check_output(output, teacher, student)
        self.output = output
        if teacher is None:
            check_stored(mapping, feature, attention, output)
            if feature is not None:
                self.feature, self.pairs = feature, list(mapping)
                check_pairs("feature", feature, self.pairs)
            return
        teacher.requires_grad_(False).eval()
        if output is not None and feature is None and attention is None:
            return
        layers = layer_count(student, student_path), layer_count(teacher, teacher_path)
        self.pairs = layer_pairs(mapping, *layers)
        if feature is None and attention is None:
            feature = FeatureAlignmentLoss(
                hidden_width(student), hidden_width(teacher), len(self.pairs)
            )
        if attention is not None:
            self.attention_pairs = attention_pairs(attention_mapping, self.pairs, *layers)
            check_pairs("attention", attention, self.attention_pairs)
        if feature is not None:
            check_pairs("feature", feature, self.pairs)
            feature.to(next(student.parameters()).device)  # projections are drawn on the CPU
        self.feature, self.attention = feature, attention

    @classmethod
    def from_config(
        cls,
        teacher: nn.Module | None,
        student: nn.Module,
        config: DistillConfig,
        losses: Mapping[str, Any] | None = None,
    ) -> "Distiller":
        """Build the losses that `config` names; without a teacher, those of labels alone.

        `losses` are what `build_losses` gave for these models, or for one that is stored now.
        """
        if losses is None:
            losses = build_losses(config, teacher, student)
        return cls(
            teacher if losses else None,
            student,
            **losses,
            attention_mapping=config.attention_mapping,
            top_k=config.top_k or 0,
            weighting=Weighting(config.schedules, config.balance),
            task_weight=config.task_weight,
        )

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    def counts(self, labels: Tensor | None = None, **batch) -> dict[str, Tensor]:
        """What the means of the terms over this batch are divided by.

        Args:
            labels, **batch: as `forward` takes them.

        Returns:
            [] int64 each (exact, and spared by the casts of mixed precision): "tokens" of features,
            attention and logits per token, "decoder_tokens" where these are of a decoder behind an
            encoder; "next_tokens" of `LinearKLLoss`; "rows" of logits per text; "labels" of L_task.
            Their sums over all batches of a step are `normalizers`.
        """
        batch = readable(self.student, batch, labels)
        ignore_index = self.output.ignore_index if self._is_headless else -100
        is_causal = is_causal_lm(self.student)
        return count_batch(batch, labels, is_causal=is_causal, ignore_index=ignore_index)

    def forward(
        self,
        labels: Tensor | None = None,
        normalizers: dict[str, Tensor] | None = None,
        **batch,
    ) -> DistillerOutput:
        """Run both models on one batch.

        Args:
            labels: for the student's own loss, in its form (next tokens are shifted inside, as
                Hugging Face models do); both decoders behind encoders read them, shifted.
            normalizers: what to divide the sums over this batch by, in place of `counts()` of it.
                With the counts of several batches, of other processes too, their losses, gradients
                and logs add up to those of all their rows in one batch.
            **batch: what the tokenizer gave. Each model receives the entries that its forward
                names. `attention_mask` [B, T], or labels of decoders, say what is compared.

        Returns:
            `DistillerOutput`; its logits are None where `LinearKLLoss` does without them.

        Raises:
            TypeError: an entry that neither model takes.
            ValueError: no labels and no teacher; models that see different numbers of tokens;
                normalizers that lack one.
        """
        logs: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        # Every term is a mean over this batch; its share makes it a part of the mean over several.
        # One factor is right for values, gradients and penalties of learned weights alike.
        share = dict.fromkeys(COUNTS, 1.0)
        batch = readable(self.student, batch, labels)
        if normalizers is not None:
            share = shares(self.counts(labels, **batch), normalizers)
            if labels is not None and not self._is_headless:
                # The mean over no label is NaN, even times 0. Any class serves for that, and every
                # process goes through the same modules.
                labels = torch.where(share["labels"] > 0, labels, 0)
        if self.feature is None and self.attention is None and self.output is None:
            output = self._run(self.student, batch, labels)
        else:
            output, results = self._align(batch, labels)
            for loss, result, counted in results:
                losses.append(share[counted] * result.loss)
                logs |= {name: share[counted] * log for name, log in loss.logs(result).items()}
        task = getattr(output, "loss", None)
        if task is not None and self.task_weight > 0:
            # Losses of labels by other names are means over texts.
            task = share["labels" if labels is not None else "rows"] * task
            losses.append(self.task_weight * task)
            logs |= {"task": task.detach(), "weighted_task": losses[-1].detach()}
        if labels is not None and task is None and not self._is_headless:
            raise ValueError(
                "labels must go to a student that computes a loss from them: got "
                f"{type(self.student).__name__}; give it a head, or drop the labels."
            )
        if not losses:
            raise ValueError(
                f"batch must hold labels where there is no teacher: got {sorted(batch)}; "
                "add labels, or pass a teacher."
            )
        logits = getattr(output, "logits", None)
        if normalizers is not None and logits is not None:
            # Data parallelism takes all that has a history for a part of the loss.
            logits = logits.detach()
        return DistillerOutput(loss=sum(losses), logits=logits, logs=logs)

    @property
    def _is_headless(self) -> bool:
        """Whether models run without their LM heads, which the loss of outputs takes over."""
        return isinstance(self.output, LinearKLLoss | TopKKLLoss)

    def _run(self, model: nn.Module, batch: dict, labels: Tensor | None = None) -> object:
        """One model on a batch, with its head or without."""
        others = self.student, self.teacher
        if self._is_headless:
            return run_model(body_of(model), batch, None, others)
        return run_model(model, batch, labels, others)

    def _align(self, batch: dict, labels: Tensor | None) -> tuple[object, list[tuple]]:
        """Both models on one batch: the student's output, and each loss, its result, its count."""
        masks = token_masks(batch, labels)
        results: list[tuple] = []
        stored, batch = take_stored(batch)
        with unsharded(self.teacher):
            if self.teacher is None:
                their_output, layers = stored, {theirs for _, theirs in self.pairs}
                their_states = stored_states(stored, layers)
            else:
                with torch.no_grad(), self._capture(1) as (their_states, their_inputs):
                    their_output = self._run(self.teacher, batch)
            with self._capture(0) as (our_states, our_inputs):
                output = self._run(self.student, batch, labels)
            if self.output is not None:
                sides = (self.student, output), (self.teacher, their_output)
                result = compare_outputs(self.output, *sides, labels, masks, top_k=self.top_k)
                results.append((self.output, *result))
        if self.feature is not None or self.attention is not None:
            counted = counted_tokens(self.student, self.block_paths[0])
        if self.feature is not None:
            student, teacher = _pair_up(self.pairs, our_states, their_states)
            check_tokens(student[0], teacher[0])
            result = self.feature(student, teacher, masks[counted])
            results.append((self.feature, result, counted))
        if self.attention is not None:
            student, teacher = _pair_up(self.attention_pairs, our_inputs, their_inputs)
            # The padding is among what is captured.
            results.append((self.attention, self.attention(student, teacher), counted))
        return output, results

    @contextmanager
    def _capture(self, side: int) -> Iterator[tuple[dict[int, Tensor], dict[int, AttentionInputs]]]:
        """What the losses need of the student (side 0) or of the teacher (side 1), and no more."""
        model, path = (self.student, self.teacher)[side], self.block_paths[side]
        states, inputs = {}, {}
        with ExitStack() as contexts:
            if self.feature is not None:
                layers = [pair[side] for pair in self.pairs]
                states = contexts.enter_context(capture_hidden_states(model, layers, path=path))
            if self.attention is not None:
                layers = [pair[side] for pair in self.attention_pairs]
                capture = capture_attention(
                    model, layers, path=path, values=self.attention.needs_values
                )
                inputs = contexts.enter_context(capture)
            yield states, inputs

    def activation_checkpointing_enable(self, **options) -> None:
        """Of the student, as the Hugging Face Trainer asks for it."""
        self.student.activation_checkpointing_enable(**options)

    def gradient_checkpointing_enable(self, **options) -> None:
        """The same by its name in older releases."""
        self.student.gradient_checkpointing_enable(**options)

    def train(self, mode: bool = True) -> "Distiller":
        """Switch the student's mode; the teacher stays in eval."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def _apply(self, fn, recurse: bool = True) -> "Distiller":
        """Carry the teacher along in `.to()` and its kin."""
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _pair_up(pairs: list[tuple[int, int]], ours: dict, theirs: dict) -> tuple[list, list]:
    return [ours[layer] for layer, _ in pairs], [theirs[layer] for _, layer in pairs]
