"""Cosine and Euclidean alignment of hidden states over many layer pairs."""

from .op import FeatureAlignment, feature_alignment
from .reference import feature_alignment_reference

__all__ = ["FeatureAlignment", "feature_alignment", "feature_alignment_reference"]
