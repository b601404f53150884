"""The losses that a config names, built for two models."""

from torch import nn

from .architectures import hidden_width, layer_count
from .config import DistillConfig
from .lm_head import is_causal_lm
from .losses import (
    AttentionKLLoss,
    FeatureAlignmentLoss,
    LinearKLLoss,
    LogitKLLoss,
    TopKKLLoss,
)
from .mapping import attention_pairs, layer_pairs


def build_losses(config: DistillConfig, teacher: nn.Module | None, student: nn.Module) -> dict:
    """What `Distiller` takes as `mapping`, `feature`, `attention` and `output`.

    Empty without a teacher, or where no term looks at it.
    """
    if teacher is None or not any((config.alpha, config.beta, config.gamma, config.delta)):
        return {}
    layers = layer_count(student), layer_count(teacher)
    pairs = layer_pairs(config.mapping, *layers)
    feature = attention = None
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
    output = build_output(config, student)
    return {"mapping": pairs, "feature": feature, "attention": attention, "output": output}


def build_output(
    config: DistillConfig, student: nn.Module
) -> LinearKLLoss | LogitKLLoss | TopKKLLoss | None:
    """The loss of predictions; None where its weight is 0."""
    if config.alpha == 0:
        return None
    options = {"kl_weight": config.alpha, "temperature": config.temperature}
    options["distance"] = config.output_distance
    if not is_causal_lm(student):
        return LogitKLLoss(**options)
    options["ce_weight"] = config.task_weight
    return LinearKLLoss(**options) if config.top_k is None else TopKKLLoss(**options)


def check_pairs(name: str, loss: nn.Module, pairs: list[tuple[int, int]]) -> None:
    """Check that a loss was built for a map of layers."""
    if loss.pairs != len(pairs):
        raise ValueError(
            f"{name} must be built for the {len(pairs)} pairs of the map {pairs}: got one for "
            f"{loss.pairs}; pass pairs={len(pairs)} to it."
        )
