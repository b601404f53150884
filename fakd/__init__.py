"""Feature-alignment knowledge distillation of transformers: losses, capture and training."""

from typing import TYPE_CHECKING

from .capture import AttentionInputs, capture_attention, capture_hidden_states
from .config import DistillConfig, TrainConfig
from .losses import (
    AttentionKLLoss,
    AttentionMapKLLoss,
    FeatureAlignmentLoss,
    LinearKLLoss,
    LogitKLLoss,
    RelationKLLoss,
    TopKKLLoss,
)
from .mapping import layer_pairs

if TYPE_CHECKING:
    from .distiller import Distiller, DistillerOutput

__all__ = [
    "AttentionInputs",
    "AttentionKLLoss",
    "AttentionMapKLLoss",
    "DistillConfig",
    "Distiller",
    "DistillerOutput",
    "FeatureAlignmentLoss",
    "LinearKLLoss",
    "LogitKLLoss",
    "RelationKLLoss",
    "TopKKLLoss",
    "TrainConfig",
    "capture_attention",
    "capture_hidden_states",
    "layer_pairs",
]


def __getattr__(name: str) -> object:
    # Imported when asked for: the distiller needs transformers, the losses need torch alone.
    if name in ("Distiller", "DistillerOutput"):
        from . import distiller

        return getattr(distiller, name)
    raise AttributeError(f"module 'fakd' has no attribute {name!r}")
