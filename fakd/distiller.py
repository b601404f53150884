"""Teacher, student and losses as one module that any training loop can call."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fakd_kernels import LinearKL, LogitKL

from .architectures import hidden_width, layer_count
from .batch import argument_names, check_tokens, token_mask
from .capture import AttentionInputs, capture_attention, capture_hidden_states
from .config import DistillConfig
from .lm_head import check_lm_head, find_lm_head, is_causal_lm
from .losses import (
    AttentionKLLoss,
    FeatureAlignmentLoss,
    LinearKLLoss,
    LogitKLLoss,
    RelationKLLoss,
)
from .mapping import attention_pairs, layer_pairs


@dataclass
class DistillerOutput(ModelOutput):
    """What one forward pass of a `Distiller` gives."""

    loss: Tensor | None = None  # [], the weighted sum of all terms
    logits: Tensor | None = None  # the student's
    # [] each, detached: every term by its name, and times its weight as "weighted_<name>".
    logs: dict[str, Tensor] | None = None


class Distiller(nn.Module):
    """A student that learns from labels and from the inside of a frozen teacher.

        loss = task_weight * L_task + L_outputs + L_features + L_attention

    L_task is the student's own loss, where the batch holds labels; L_outputs compares the models'
    predictions, L_features hidden states, L_attention attention, and each is absent, at no cost,
    if it is not asked for. The teacher is in eval mode and without gradients, always. It is no
    submodule: it follows `.to()`, but `parameters()`, `state_dict()` and therefore optimizers and
    checkpoints hold the student and the projections alone. It may be shared between distillers.

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
            classifiers, or of anything else that returns them.
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
        output: LinearKLLoss | LogitKLLoss | None = None,
        task_weight: float = 1.0,
        teacher_path: str | None = None,
        student_path: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= task_weight < float("inf"):
            raise ValueError(
                f"task_weight must be a finite number >= 0: got {task_weight}; pass one."
            )
        if teacher is student:
            raise ValueError(
                "teacher and student must be two models: got the same one twice; use copy.deepcopy."
            )
        self.student = student
        self.task_weight = task_weight
        self.feature = self.attention = self.output = None
        self.pairs: list[tuple[int, int]] = []
        self.attention_pairs: list[tuple[int, int]] = []
        # In a tuple, so that nn.Module does not register it.
        self._teacher = (teacher,)
        self._paths = (student_path, teacher_path)
        if teacher is None:
            losses = (("feature", feature), ("attention", attention), ("output", output))
            for name, loss in losses:
                if loss is not None:
                    raise ValueError(
                        f"{name} must come with a teacher: got teacher=None; pass a teacher, or "
                        f"drop {name} to train on labels alone."
                    )
            return
        if isinstance(output, LinearKLLoss):
            for model in (student, teacher):
                check_lm_head(model)
        self.output = output
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
            _check_pairs("attention", attention, self.attention_pairs)
        if feature is not None:
            _check_pairs("feature", feature, self.pairs)
        self.feature, self.attention = feature, attention

    @classmethod
    def from_config(
        cls, teacher: nn.Module | None, student: nn.Module, config: DistillConfig
    ) -> "Distiller":
        """Build the losses that `config` names."""
        has_features = not config.beta == config.delta == 0
        has_attention = config.gamma != 0
        has_outputs = config.alpha != 0
        if teacher is None or not (has_features or has_attention or has_outputs):
            return cls(None, student, task_weight=config.task_weight)
        layers = layer_count(student), layer_count(teacher)
        pairs = layer_pairs(config.mapping, *layers)
        feature = attention = output = None
        if has_outputs:
            options = {"kl_weight": config.alpha, "temperature": config.temperature}
            options["distance"] = config.output_distance
            if is_causal_lm(student):
                output = LinearKLLoss(ce_weight=config.task_weight, **options)
            else:
                output = LogitKLLoss(**options)
        if has_features:
            feature = FeatureAlignmentLoss(
                hidden_width(student),
                hidden_width(teacher),
                len(pairs),
                projection=config.projection,
                init=config.init,
                cosine_weight=config.beta,
                euclidean_weight=config.delta,
                euclidean=config.euclidean,
            )
        if has_attention:
            count = len(attention_pairs(config.attention_mapping, pairs, *layers))
            attention = AttentionKLLoss(count, heads=config.heads, weight=config.gamma)
        return cls(
            teacher,
            student,
            mapping=pairs,
            feature=feature,
            attention=attention,
            attention_mapping=config.attention_mapping,
            output=output,
            task_weight=config.task_weight,
        )

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    def forward(self, labels: Tensor | None = None, **batch) -> DistillerOutput:
        """Run both models on one batch.

        Args:
            labels: for the student alone, in the form that its own loss takes (next tokens are
                shifted inside, as Hugging Face models do).
            **batch: what the tokenizer gave. Each model receives the entries that its forward
                names. `attention_mask` [B, T] also says which tokens are compared.

        Returns:
            `DistillerOutput`; its logits are None where `LinearKLLoss` does without them.

        Raises:
            TypeError: an entry that neither model takes.
            ValueError: no labels and no teacher; models that see different numbers of tokens.
        """
        logs: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        if self.feature is None and self.attention is None and self.output is None:
            output = self._run(self.student, batch, labels)
        else:
            output, results = self._align(batch, labels)
            for loss, result in results:
                losses.append(result.loss)
                logs |= loss.logs(result)
        task = getattr(output, "loss", None)
        if task is not None and self.task_weight > 0:
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
        return DistillerOutput(loss=sum(losses), logits=getattr(output, "logits", None), logs=logs)

    @property
    def _is_headless(self) -> bool:
        """Whether models run without their LM heads, which the loss of outputs takes over."""
        return isinstance(self.output, LinearKLLoss)

    def _run(self, model: nn.Module, batch: dict, labels: Tensor | None = None) -> object:
        """One model on a batch, with its head or without."""
        model = model.base_model if self._is_headless else model
        entries = self._accepted(model, batch)
        if "use_cache" in argument_names(model):
            entries.setdefault("use_cache", False)  # keys and values that nobody would read
        if labels is not None and not self._is_headless:
            entries["labels"] = labels
        return model(**entries)

    def _align(self, batch: dict, labels: Tensor | None) -> tuple[object, list[tuple]]:
        """Both models on one batch: the student's output, and each loss with its result."""
        mask = token_mask(batch.get("attention_mask"))
        with torch.no_grad(), self._capture(1) as (their_states, their_inputs):
            their_output = self._run(self.teacher, batch)
        with self._capture(0) as (our_states, our_inputs):
            output = self._run(self.student, batch, labels)
        results: list[tuple] = []
        if self.output is not None:
            result = self._compare_outputs(output, their_output, labels, mask)
            results.append((self.output, result))
        if self.feature is not None:
            student, teacher = _pair_up(self.pairs, our_states, their_states)
            check_tokens(student[0], teacher[0])
            results.append((self.feature, self.feature(student, teacher, mask)))
        if self.attention is not None:
            student, teacher = _pair_up(self.attention_pairs, our_inputs, their_inputs)
            # The padding is among what is captured.
            results.append((self.attention, self.attention(student, teacher)))
        return output, results

    def _compare_outputs(
        self, student: object, teacher: object, labels: Tensor | None, mask: Tensor | None
    ) -> LinearKL | LogitKL:
        if not self._is_headless:
            check_tokens(student.logits, teacher.logits)
            # One row of logits per text has no tokens to mask.
            return self.output(
                student.logits, teacher.logits, mask=mask if student.logits.dim() == 3 else None
            )
        student, teacher = student[0], teacher[0]
        check_tokens(student, teacher)
        ours, theirs = find_lm_head(self.student), find_lm_head(self.teacher)
        # Each token predicts the next: the last has nothing to predict, the first nobody.
        return self.output(
            ours.scaled(student[:, :-1]),
            ours.weight,
            theirs.scaled(teacher[:, :-1]),
            theirs.weight,
            labels=None if labels is None else labels[:, 1:],
            mask=None if mask is None else mask[:, 1:],
            student_bias=ours.bias,
            teacher_bias=theirs.bias,
            student_softcap=ours.softcap,
            teacher_softcap=theirs.softcap,
        )

    @contextmanager
    def _capture(self, side: int) -> Iterator[tuple[dict[int, Tensor], dict[int, AttentionInputs]]]:
        """What the losses need of the student (side 0) or of the teacher (side 1), and no more."""
        model, path = (self.student, self.teacher)[side], self._paths[side]
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

    def _accepted(self, model: nn.Module, batch: dict) -> dict:
        """The entries that the model's forward names; all, if it names none in particular."""
        names = argument_names(model)
        known = names | argument_names(self.student)
        if self.teacher is not None:
            known |= argument_names(self.teacher)
        for key in batch:
            if "input_ids" in known and key not in known:
                raise TypeError(
                    f"batch entries must be arguments of the student or of the teacher: got "
                    f"{key!r}; drop it, or use a model whose forward takes it."
                )
        return {k: v for k, v in batch.items() if "input_ids" not in names or k in names}

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


def _check_pairs(name: str, loss: nn.Module, pairs: list[tuple[int, int]]) -> None:
    if loss.pairs != len(pairs):
        raise ValueError(
            f"{name} must be built for the {len(pairs)} pairs of the map {pairs}: got one for "
            f"{loss.pairs}; pass pairs={len(pairs)} to it."
        )


def _pair_up(pairs: list[tuple[int, int]], ours: dict, theirs: dict) -> tuple[list, list]:
    return [ours[layer] for layer, _ in pairs], [theirs[layer] for _, layer in pairs]
