"""Alignment of output distributions, from logits that are there already."""

from .op import LogitKL, logit_kl
from .reference import logit_kl_reference

__all__ = ["LogitKL", "logit_kl", "logit_kl_reference"]
