"""Fused losses for feature-alignment knowledge distillation: tensors in, losses out."""

from ._engines import EngineStatus, engines, explain
from .ops.attention_kl import AttentionKL, attention_kl
from .ops.attention_map_kl import attention_map_kl
from .ops.feature_alignment import FeatureAlignment, feature_alignment
from .ops.linear_kl import LinearKL, linear_kl
from .ops.logit_kl import LogitKL, logit_kl
from .ops.topk_kl import TopKKL, topk_kl

__all__ = [
    "AttentionKL",
    "EngineStatus",
    "FeatureAlignment",
    "LinearKL",
    "LogitKL",
    "TopKKL",
    "attention_kl",
    "attention_map_kl",
    "engines",
    "explain",
    "feature_alignment",
    "linear_kl",
    "logit_kl",
    "topk_kl",
]
