"""Which keys each query may attend to, read from what an attention function is given.

A mask that comes as a map of queries by keys is read as a function of the offset i - j, and held to
it: only padding, causality and a window survive that, and everything else is refused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ENTRIES = 4 << 20  # of a mask that are read at a time
# Additive masks hold 0, or at least this much less: the minimum of their dtype, -inf or -10000.
_MASKED = -1e4


@dataclass(frozen=True)
class Pattern:
    """Query i attends to key j if j counts, j <= i (where causal) and |i - j| < window."""

    is_causal: bool
    window: int | None  # None also where it hides nothing
    mask: Tensor | None  # [B, T] bool, the tokens that count; None: all do


def read_pattern(
    implementation: str,
    attention_mask: object,
    *,
    batch: int,
    tokens: int,
    is_causal: bool,
    window: int | None,
) -> Pattern:
    """Read the pattern of one call.

    Args:
        implementation: the name that the model's config has for its attention function.
        attention_mask: what that function is given: None, [B, T] (flash attention) or
            [B or 1, H or 1, T or 1, T], bool or additive.
        batch: B.
        tokens: T.
        is_causal: what the call, or else its module, says. Holds where there is no map; decides
            between readings of a map that come to the same.
        window: likewise.

    Raises:
        RuntimeError: a mask that cannot be read, or that is no such pattern.
    """
    if attention_mask is None:
        # Eager functions mask nothing by themselves, and SDPA knows causality, but no window.
        if implementation == "eager":
            return Pattern(False, None, None)
        has_window = implementation != "sdpa" and window is not None and window < tokens
        return Pattern(is_causal, window if has_window else None, None)
    if isinstance(attention_mask, Tensor):
        if attention_mask.dim() == 4 and (attention_mask.dtype, implementation) != (
            torch.bool,
            "eager",
        ):
            return _read_map(attention_mask, batch, tokens, is_causal)
        if attention_mask.shape == (batch, tokens) and implementation not in ("eager", "sdpa"):
            return _read_padding(attention_mask.bool(), is_causal, window)
        received = f"{list(attention_mask.shape)} {attention_mask.dtype}"
    else:
        received = type(attention_mask).__name__
    raise RuntimeError(
        f"attention_mask of {implementation!r} attention must be a map [B, 1, T, T], bool or (for "
        f"'eager') additive, or [B, T] for flash attention, with B = {batch} and T = {tokens}: got "
        f"{received}; give the model the tokenizer's own attention_mask, and 'sdpa', 'eager' or "
        "flash attention."
    )


def _read_padding(mask: Tensor, is_causal: bool, window: int | None) -> Pattern:
    if window is not None and window < mask.shape[1]:
        place = torch.arange(mask.shape[1], device=mask.device)
        first = place.where(mask, mask.shape[1]).amin(1)
        spans = (place.where(mask, -1).amax(1) + 1 - first).clamp_min(0)
        # Flash attention drops the padding before it counts how far apart two tokens are.
        if (spans != mask.sum(1)).any():
            raise RuntimeError(
                "attention_mask must have its padding at the ends where flash attention has a "
                "window: got padding between tokens; move it, or use 'sdpa' attention."
            )
        window = window if window < int(spans.max()) else None
    else:
        window = None
    return Pattern(is_causal, window, None if mask.all() else mask)


def _read_map(attention_mask: Tensor, batch: int, tokens: int, is_causal: bool) -> Pattern:
    try:
        # A cache may hold room for more keys than there are.
        whole = attention_mask[..., :tokens].expand(batch, -1, tokens, tokens)
    except RuntimeError:
        raise RuntimeError(
            f"attention_mask must cover {batch} rows of {tokens} tokens: got "
            f"{list(attention_mask.shape)}; give the model the tokenizer's own attention_mask."
        ) from None
    # Causal or not, with whatever window: a token that counts attends to itself.
    counted = _is_allowed(whole.diagonal(dim1=2, dim2=3)).all(1)  # [B, T]
    shown, hidden = _by_offset(whole, counted)
    offsets = torch.arange(1 - tokens, tokens)
    for causal in (is_causal, not is_causal):
        reached = offsets >= 0 if causal else torch.ones_like(shown)
        beyond = offsets[hidden & reached].abs()
        window = int(beyond.min()) if beyond.numel() else None
        if window is not None:
            reached = reached & (offsets.abs() < window)
        if not (shown & ~reached).any() and not (hidden & reached).any():
            return Pattern(causal, window, None if counted.all() else counted)
    raise RuntimeError(_other_pattern(attention_mask))


def _by_offset(whole: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Whether some counted query sees (shown), or does not see (hidden), a counted key i - j away.

    Two vectors [2 T - 1] for the offsets 1 - T to T - 1, on the host.
    """
    batch, heads, tokens, _ = whole.shape
    place = torch.arange(tokens, device=whole.device)
    shown, hidden = torch.zeros(2, 2 * tokens - 1, dtype=torch.bool, device=whole.device)
    rows = max(1, _BLOCK_ENTRIES // (batch * heads * tokens))
    for begin in range(0, tokens, rows):
        block = whole[:, :, begin : begin + rows]
        offset = place[begin : begin + rows, None] - place + tokens - 1  # [R, T]
        query, key = counted[:, None, begin : begin + rows, None], counted[:, None, None]
        allowed = _is_allowed(block)
        if (allowed & ~key).any():
            raise RuntimeError(_other_pattern(whole))
        shown[offset[(allowed & query).flatten(0, 1).any(0)]] = True
        hidden[offset[(~allowed & query & key).flatten(0, 1).any(0)]] = True
    return shown.cpu(), hidden.cpu()


def _is_allowed(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point() or ((mask != 0) & (mask > _MASKED)).any():
        raise RuntimeError(
            "attention_mask must only show and hide keys: got one that adds other values to the "
            "scores (relative positions, ALiBi, or 1 for tokens); such attention cannot be "
            "rebuilt from queries and keys: align hidden states instead."
        )
    return mask == 0


def _other_pattern(mask: Tensor) -> str:
    return (
        "attention_mask must be padding, causal or not, with or without a window |i - j| < w, the "
        f"same for all heads: got a map {list(mask.shape)} of another pattern (packed documents, "
        "a prefix, chunks); give each row one document, or align hidden states instead."
    )
