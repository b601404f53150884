"""Losses as modules: they own hyper-parameters and projections, and call one kernel each."""

from .attention import AttentionKLLoss
from .attention_maps import AttentionMapKLLoss
from .features import FeatureAlignmentLoss
from .outputs import LinearKLLoss, LogitKLLoss, TopKKLLoss
from .relations import RelationKLLoss

__all__ = [
    "AttentionKLLoss",
    "AttentionMapKLLoss",
    "FeatureAlignmentLoss",
    "LinearKLLoss",
    "LogitKLLoss",
    "RelationKLLoss",
    "TopKKLLoss",
]
