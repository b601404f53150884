"""Teacher, student and losses as one module that any training loop can call."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from fakd_kernels import FeatureAlignment

from .architectures import hidden_width, layer_count
from .capture import capture_hidden_states
from .config import DistillConfig
from .losses import FeatureAlignmentLoss
from .mapping import layer_pairs


@dataclass
class DistillerOutput(ModelOutput):
    """What one forward pass of a `Distiller` gives."""

    loss: Tensor | None = None  # [], the weighted sum of all terms
    logits: Tensor | None = None  # the student's
    # [] each, detached: every term by its name, and times its weight as "weighted_<name>".
    logs: dict[str, Tensor] | None = None


class Distiller(nn.Module):
    """A student that learns from labels and from the hidden states of a frozen teacher.

        loss = task_weight * L_task + L_features

    L_task is the student's own loss, where the batch holds labels. The teacher is in eval mode
    and without gradients, always. It is no submodule: it follows `.to()`, but `parameters()`,
    `state_dict()` and therefore optimizers and checkpoints hold the student and the projections
    alone. It may be shared between distillers.

    Args:
        teacher: a Hugging Face model, with or without a head; None trains on labels alone, which
            is the baseline of every comparison.
        student: a Hugging Face model; with a head it computes L_task from the batch's labels.
        mapping: preset or pairs, see `fakd.layer_pairs`.
        feature: the loss of the hidden states, built for the widths of `mapping`; None builds one
            with its defaults from the models' configs.
        task_weight: weight of L_task, >= 0.
        teacher_path: where the teacher's list of blocks is, if it cannot be found.
        student_path: likewise.

    Raises:
        ValueError: a map, a loss and two models that do not fit each other.
    """

    # Tells the Hugging Face Trainer to divide the loss by the accumulation steps itself: L_features
    # is a mean over the tokens of one batch.
    accepts_loss_kwargs = False

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        *,
        mapping: str | Sequence[tuple[int, int]] = "uniform",
        feature: FeatureAlignmentLoss | None = None,
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
        self.feature = None
        self.pairs: list[tuple[int, int]] = []
        # In a tuple, so that nn.Module does not register it.
        self._teacher = (teacher,)
        self._paths = (student_path, teacher_path)
        if teacher is None:
            if feature is not None:
                raise ValueError(
                    "feature must come with a teacher: got teacher=None; pass a teacher, or drop "
                    "feature to train on labels alone."
                )
            return
        self.pairs = layer_pairs(
            mapping, layer_count(student, student_path), layer_count(teacher, teacher_path)
        )
        self.feature = feature or FeatureAlignmentLoss(
            hidden_width(student), hidden_width(teacher), len(self.pairs)
        )
        if self.feature.pairs != len(self.pairs):
            raise ValueError(
                f"feature must be built for the {len(self.pairs)} pairs of the map {self.pairs}: "
                f"got one for {self.feature.pairs}; pass pairs={len(self.pairs)} to it."
            )
        teacher.requires_grad_(False).eval()

    @classmethod
    def from_config(
        cls, teacher: nn.Module | None, student: nn.Module, config: DistillConfig
    ) -> "Distiller":
        """Build the losses that `config` names."""
        if teacher is None or config.beta == config.delta == 0:
            return cls(None, student, task_weight=config.task_weight)
        pairs = layer_pairs(config.mapping, layer_count(student), layer_count(teacher))
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
        return cls(teacher, student, mapping=pairs, feature=feature, task_weight=config.task_weight)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    def forward(self, labels: Tensor | None = None, **batch) -> DistillerOutput:
        """Run both models on one batch.

        Args:
            labels: for the student alone, in the form that its own loss takes.
            **batch: what the tokenizer gave. Each model receives the entries that its forward
                names. `attention_mask` [B, T] also says which tokens the hidden states are
                compared on.

        Returns:
            `DistillerOutput`.

        Raises:
            TypeError: an entry that neither model takes.
            ValueError: no labels and no teacher; models that see different numbers of tokens.
        """
        student_batch = self._accepted(self.student, batch)
        if labels is not None:
            student_batch["labels"] = labels
        logs: dict[str, Tensor] = {}
        if self.feature is None:
            output = self.student(**student_batch)
            losses = []
        else:
            output, result = self._align(student_batch, batch)
            losses = [result.loss]
            logs |= self.feature.logs(result)
        task = getattr(output, "loss", None)
        if task is not None and self.task_weight > 0:
            losses.append(self.task_weight * task)
            logs |= {"task": task.detach(), "weighted_task": losses[-1].detach()}
        if labels is not None and task is None:
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

    def _align(self, student_batch: dict, batch: dict) -> tuple[object, FeatureAlignment]:
        """Both models on one batch: the student's output, and the loss of the hidden states."""
        student_layers, teacher_layers = zip(*self.pairs, strict=True)
        student_path, teacher_path = self._paths
        teacher_batch = self._accepted(self.teacher, batch)
        with (
            torch.no_grad(),
            capture_hidden_states(self.teacher, teacher_layers, path=teacher_path) as theirs,
        ):
            self.teacher(**teacher_batch)
        with capture_hidden_states(self.student, student_layers, path=student_path) as ours:
            output = self.student(**student_batch)
        student_hiddens = [ours[layer] for layer in student_layers]
        teacher_hiddens = [theirs[layer] for layer in teacher_layers]
        _check_tokens(student_hiddens[0], teacher_hiddens[0])
        mask = _token_mask(batch.get("attention_mask"))
        return output, self.feature(student_hiddens, teacher_hiddens, mask)

    def _accepted(self, model: nn.Module, batch: dict) -> dict:
        """The entries that the model's forward names; all, if it names none in particular."""
        names = _argument_names(model)
        known = names | _argument_names(self.student)
        if self.teacher is not None:
            known |= _argument_names(self.teacher)
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


def _argument_names(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _token_mask(attention_mask: Tensor | None) -> Tensor | None:
    """[B, T] bool: the tokens to compare hidden states on."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be [B, T]: got {list(attention_mask.shape)}; pass the "
            "tokenizer's own, which also says which tokens count in the loss."
        )
    return None if attention_mask is None else attention_mask.bool()


def _check_tokens(student: Tensor, teacher: Tensor) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher and student must see the same tokens: got {list(teacher.shape[:-1])} and "
            f"{list(student.shape[:-1])}; use one tokenizer for both, and models that add no "
            "tokens of their own."
        )
