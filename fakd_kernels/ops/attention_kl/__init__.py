"""Alignment of attention distributions, from queries and keys, over many layer pairs."""

from .op import AttentionKL, attention_kl
from .reference import attention_kl_reference

__all__ = ["AttentionKL", "attention_kl", "attention_kl_reference"]
