"""Fused losses for feature-alignment knowledge distillation: tensors in, losses out."""

from ._engines import EngineStatus, engines, explain
from .ops.feature_alignment import FeatureAlignment, feature_alignment

__all__ = ["EngineStatus", "FeatureAlignment", "engines", "explain", "feature_alignment"]
