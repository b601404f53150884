"""Alignment of output distributions, from hidden states and LM heads."""

from .op import LinearKL, linear_kl
from .reference import linear_kl_reference

__all__ = ["LinearKL", "linear_kl", "linear_kl_reference"]
