"""Alignment with an offline teacher: the stored log-probabilities of its k likeliest tokens."""

from .op import TopKKL, topk_kl
from .reference import topk_kl_reference

__all__ = ["TopKKL", "topk_kl", "topk_kl_reference"]
