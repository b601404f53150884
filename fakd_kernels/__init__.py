"""Fused losses for feature-alignment knowledge distillation: tensors in, losses out."""

from ._engines import EngineStatus, engines, explain
from .ops.attention_kl import AttentionKL, attention_kl
from .ops.attention_map_kl import attention_map_kl
from .ops.feature_alignment import FeatureAlignment, feature_alignment

__all__ = [
    "AttentionKL",
    "EngineStatus",
    "FeatureAlignment",
    "attention_kl",
    "attention_map_kl",
    "engines",
    "explain",
    "feature_alignment",
]
