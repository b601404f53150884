"""The losses that a config names, built for two models."""

from collections.abc import Sequence

from torch import nn

from .architectures import hidden_width, layer_count
from .config import DistillConfig
from .lm_head import check_lm_head, find_lm_head, is_causal_lm, takes_text_alone
from .losses import (
    AttentionKLLoss,
    FeatureAlignmentLoss,
    LinearKLLoss,
    LogitKLLoss,
    TopKKLLoss,
)
from .mapping import attention_pairs, layer_pairs

_NO_CLASSES = ("regression", "multi_label_classification")  # `config.problem_type`


def build_losses(
    config: DistillConfig, teacher: nn.Module | None, student: nn.Module, vocab: str | None = None
) -> dict:
    """What `Distiller` takes as `mapping`, `feature`, `attention` and `output`.

    Empty without a teacher, or where no term looks at it. `vocab` is "prefix" for models of one
    tokenizer, whose heads may be padded to unequal sizes.
    """
    if teacher is None or not any((config.alpha, config.beta, config.gamma, config.delta)):
        return {}
    feature = attention = None
    output = build_output(config, student, vocab)
    if not any((config.beta, config.gamma, config.delta)):
        return {"mapping": config.mapping, "output": output}
    layers = layer_count(student), layer_count(teacher)
    pairs = layer_pairs(config.mapping, *layers)
    if config.beta != 0 or config.delta != 0:
        feature = FeatureAlignmentLoss(
            hidden_width(student),
            hidden_width(teacher),
            len(pairs),
            projection=config.projection,
            init=config.init,
            cosine_weight=config.beta,
            euclidean_weight=config.delta,
            euclidean=config.euclidean,
            learn_weights=config.learn_weights,
        )
    if config.gamma != 0:
        count = len(attention_pairs(config.attention_mapping, pairs, *layers))
        attention = AttentionKLLoss(count, heads=config.heads, weight=config.gamma)
    return {"mapping": pairs, "feature": feature, "attention": attention, "output": output}


def build_output(
    config: DistillConfig, student: nn.Module, vocab: str | None = None
) -> LinearKLLoss | LogitKLLoss | TopKKLLoss | None:
    """The loss of predictions; None where its weight is 0."""
    if config.alpha == 0:
        return None
    options = {"kl_weight": config.alpha, "temperature": config.temperature}
    options["distance"] = config.output_distance
    if not (is_causal_lm(student) and takes_text_alone(student)):
        kind = getattr(student.config, "problem_type", None)
        if getattr(student.config, "num_labels", None) == 1 or kind in _NO_CLASSES:
            raise ValueError(
                f"distill.alpha must be 0 for a regression or several labels: got {config.alpha}"
                ", for a softmax over what are not the classes of one label; align features or "
                "attention."
            )
        return LogitKLLoss(**options)
    options |= {"ce_weight": config.task_weight, "vocab": vocab}
    return LinearKLLoss(**options) if config.top_k is None else TopKKLLoss(**options)


def check_output(output: nn.Module | None, teacher: nn.Module | None, student: nn.Module) -> None:
    """Check that a loss of next tokens fits the heads of both models."""
    if not isinstance(output, LinearKLLoss | TopKKLLoss):
        return
    models = [model for model in (student, teacher) if model is not None]
    for model in models:
        check_lm_head(model)
    if getattr(student.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "output_router_logits of the student must be False where it runs without its LM head, "
            "which adds that loss: got True; change its config, or use LogitKLLoss."
        )
    sizes = [find_lm_head(model).weight.shape[0] for model in models]
    if len(set(sizes)) > 1 and output.vocab is None:
        raise ValueError(
            f"vocabularies must be of equal size: got {sizes[0]} (student) and {sizes[1]} "
            "(teacher); if one is only padded, compare what they share with vocab='prefix'."
        )


def check_apart(teacher: nn.Module | None, student: nn.Module) -> None:
    """Check that freezing the teacher leaves the student as it is."""
    if teacher is student:
        raise ValueError(
            "teacher and student must be two models: got the same one twice; use copy.deepcopy."
        )
    theirs = set() if teacher is None else set(teacher.parameters())
    shared = [n for n, each in student.named_parameters() if each in theirs and each.requires_grad]
    if shared:
        raise ValueError(
            f"teacher and student must not share what the student learns: got {shared[0]!r} and "
            f"{len(shared) - 1} more, frozen with the teacher; use copy.deepcopy, or freeze them "
            "with requires_grad_(False) if that is meant."
        )


def check_stored(
    mapping: str | Sequence,
    feature: nn.Module | None,
    attention: nn.Module | None,
    output: nn.Module | None,
) -> None:
    """Check that losses without a teacher are of what batches may hold of one."""
    losses = {"attention": attention}
    if isinstance(mapping, str):
        losses["feature"] = feature
    if not isinstance(output, LogitKLLoss | TopKKLLoss):
        losses["output"] = output
    for name, loss in losses.items():
        if loss is not None:
            raise ValueError(
                f"{name} must come with a teacher: got teacher=None; pass a teacher, or drop "
                f"{name} to train on labels alone."
            )


def check_pairs(name: str, loss: nn.Module, pairs: list[tuple[int, int]]) -> None:
    """Check that a loss was built for a map of layers."""
    if loss.pairs != len(pairs):
        raise ValueError(
            f"{name} must be built for the {len(pairs)} pairs of the map {pairs}: got one for "
            f"{loss.pairs}; pass pairs={len(pairs)} to it."
        )
