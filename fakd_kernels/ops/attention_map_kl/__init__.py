"""Alignment of attention maps that exist already, over many layer pairs."""

from .op import attention_map_kl
from .reference import attention_map_kl_reference

__all__ = ["attention_map_kl", "attention_map_kl_reference"]
