"""What a model computes on its way, layer by layer: hidden states, and queries and keys."""

from .attention import AttentionInputs, capture_attention
from .hidden_states import capture_hidden_states

__all__ = ["AttentionInputs", "capture_attention", "capture_hidden_states"]
